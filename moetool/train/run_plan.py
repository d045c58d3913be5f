"""The plan of a run, made before its weights are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moetool.cost import devices
from moetool.cost.memory import Training, estimate, in_gb, loading_bytes, saving_bytes, smaller
from moetool.cost.operations import flops_per_token, router_gradient_flops
from moetool.cost.parameters import sizes_of
from moetool.data.mixture import TokenMixture
from moetool.routing.capture import RouterCapture
from moetool.train import balance, schedules
from moetool.train.accelerator import Accelerator
from moetool.train.batches import Corpus, mix
from moetool.train.config import TrainConfig
from moetool.train.export import source_dtype
from moetool.train.teacher import share_taught
from moetool.train.terms import Term


@dataclass(frozen=True)
class RunPlan:
    """All of a run that is known before its weights are read.

    Attributes:
        config: resolved.
        accelerator: of its processes.
        corpus: its text.
        mixture: of its sources.
        identity: see TrainConfig.identity.
        step: updates that were made before.
        save_dtype: of its checkpoints.
        schedule: step -> learning rate.
        terms: losses beside the language loss, by name.
        peak_flops: operations per second that each device can do; None where that is not known.
        values: what is printed about it, as plain values.
        warnings: what the user should know before the weights are read.
    """

    config: TrainConfig
    accelerator: Accelerator
    corpus: Corpus
    mixture: TokenMixture
    identity: Mapping[str, Any]
    step: int
    save_dtype: str
    schedule: Callable[[int], float]
    terms: Mapping[str, Term]
    peak_flops: float | None
    values: Mapping[str, Any]
    warnings: Sequence[str]


def plan_run(
    config: TrainConfig,
    accelerator: Accelerator,
    model: Any,
    corpus: Corpus,
    identity: Mapping[str, Any],
    step: int,
    teacher: Any = None,
) -> RunPlan:
    """Plan a run of a model and its teacher, without weights (see `checkpoint.model.skeleton`).

    The rest is as in RunPlan.

    Raises:
        CheckpointError: the model's weights cannot be read.
        ConfigError: options about the text or the schedule contradict each other.
        DataError: a source holds less than one sequence.
    """
    device = accelerator.device
    mixture = mix(corpus, config)
    schedule = schedules.build(config.schedule, config.max_steps, vars(config))
    save_dtype = source_dtype(config.model) if config.save_dtype == "auto" else config.save_dtype
    terms = balance.build_terms(config.balance)
    sizes, taught_by = sizes_of(model), sizes_of(teacher) if teacher else None
    training = Training(
        seq_len=config.seq_len,
        micro_batch_size=config.micro_batch_size,
        precision=config.precision,
        moments=config.moments,
        master_weights=config.master_weights,
        gradient_checkpointing=config.gradient_checkpointing,
        freeze_router=config.freeze_router,
        train_only=config.train_only,
        router_gradient=config.router_gradient,
        compiled_loss=config.compile or config.liger,
        whole_logits=any("logits" in term.needs for term in terms.values()),
        coupled="erc" in config.balance,
        rounds=source_dtype(config.model) != "bfloat16",
        teacher=taught_by,
    )
    trained = training.trained(sizes)
    total, active = sizes.count()
    operations = alone = flops_per_token(sizes, config.seq_len, trained)
    taught: dict[str, Any] = {}
    if taught_by:
        more = round(share_taught(config) * flops_per_token(taught_by, config.seq_len) / 3)  # a forward alone
        taught = {
            "model": str(config.teacher),
            "num_parameters": taught_by.total,
            "share": share_taught(config),
            "operations": more / alone,
            "weight": config.teacher_weight,
            "temperature": config.teacher_temperature,
        }
        operations += more
    values: dict[str, Any] = {
        "num_parameters": total,
        "num_active_parameters": active,
        "num_trained_parameters": sizes.count(trained)[0],
        "trained": "everything but routers" if config.freeze_router else config.train_only,
        "flops_per_token": operations,
        "router_gradient": {
            "kind": config.router_gradient,
            "operations": router_gradient_flops(sizes, config.router_gradient) / alone,
        },
        "memory": estimate(sizes, training, config.mesh),
        "loading_memory": max(
            loading_bytes(one, config.mesh, device.type == "cuda") for one in (sizes, taught_by) if one is not None
        ),
        "saving_memory": saving_bytes(sizes, training, accelerator.num_processes, device.type == "cuda"),
        "steps": config.max_steps,
        "tokens": config.max_tokens,
        "seq_len": config.seq_len,
        "global_batch_size": config.global_batch_size,
        "micro_batch_size": config.micro_batch_size,
        "precision": config.precision,
        "balance": dict(config.balance),
        "sources": {
            name: {
                **entry,
                "replay": name in config.replay,
                "weight": config.weight.get(name, 1),
                "available_tokens": mixture.sources[name].stream.num_tokens,
            }
            for name, entry in mixture.ledger(config.max_steps * config.global_batch_size).items()
        },
        **({"teacher": taught} if taught else {}),
        "val": {name: stream.num_tokens for name, stream in corpus.val.items()},
        "val_from_end": [name for name, stream in corpus.val.items() if stream.is_part],
        "step": step,
        "save_dtype": save_dtype,
        "device": str(device),
        "mesh": "" if config.mesh.whole else str(config.mesh),
        "num_processes": accelerator.num_processes,
    }
    warnings = memory_warnings(values["memory"], device, lambda there: smaller(sizes, training, there, config.mesh))
    warnings += validation_warnings(values["val"], config) + unreached(config)
    peak = devices.peak_flops(device, config.precision)
    return RunPlan(
        config, accelerator, corpus, mixture, identity, step, save_dtype, schedule, terms, peak, values, warnings
    )


def memory_warnings(
    memory: Mapping[str, int], device: torch.device, fitting: Callable[[int], Sequence[tuple[str, Mapping[str, int]]]]
) -> list[str]:
    """Warnings where the estimate is more than a device has, with the options that would make the run fit, or the host.

    Args:
        memory: see `estimate`.
        device: of this process.
        fitting: the bytes of a device -> options and what the run would need with them.
    """
    free, there = devices.free_memory("cpu"), devices.device_memory(device)
    warnings: list[str] = []
    if free is not None and memory["host"] > free:
        warnings.append(
            f"--moments offload: weights and moments need about {memory['host'] / 1e9:.3g} GB of host memory per"
            f" process, but {free / 1e9:.3g} GB are free; use --moments 8bit, or shard the weights (docs/multi-gpu.md)"
        )
    if there is None or memory["total"] <= there:
        return warnings
    ways = [f"{options} ({in_gb(need)})" for options, need in fitting(there)]
    advice = f"it fits with {'; or with '.join(ways)}" if ways else "no option makes it fit"
    return [
        *warnings,
        f"this run needs about {memory['total'] / 1e9:.3g} GB per process, but {device} has {there / 1e9:.3g} GB;"
        f" {advice}; or shard the weights (--fsdp, docs/multi-gpu.md)",
    ]


def validation_warnings(val: Mapping[str, int], config: TrainConfig) -> list[str]:
    """A warning where validation would take longer than training: a token takes a third of the arithmetic.

    Args:
        val: tokens of each set.
        config: resolved.
    """
    times, tokens = 1 + math.ceil(config.max_steps / config.eval_every), sum(val.values())
    longer = times * tokens / 3 / config.max_tokens
    if longer <= 1 or tokens < 10**6:  # a small set is no matter of time
        return []
    return [
        f"validating {times} times on {tokens:.1e} tokens takes about {longer:.1f} times as long as training on"
        f" {config.max_tokens:.1e}; give smaller sets (--val, --val-fraction) or raise --eval-every"
    ]


def unreached(config: TrainConfig) -> list[str]:
    """Warnings about what a run does not reach. It may be made longer later, so nothing is refused.

    Args:
        config: resolved.
    """
    told, steps = [], config.max_steps
    if config.replay_ratio == 1:
        told.append("--replay-ratio 1 never reads --train; give a smaller one, or the replayed text as --train")
    if "warmup_steps" in schedules.parameters(config.schedule) and 1 < config.warmup_steps == steps:
        told.append(f"all {steps} steps are warm-up, so the learning rate only rises; lower --warmup-steps or -ratio")
    if config.keep_weights and config.keep_weights > steps:
        told.append(f"--keep-weights {config.keep_weights} keeps no snapshot in {steps} steps; give at most that")
    return told


@torch.no_grad()
def untrained_routers(model: nn.Module, capture: RouterCapture, losses: Sequence[str]) -> list[str]:
    """A warning where the language loss does not reach the routers.

    Seen in what they return, so that it holds for every family and every flag.

    Args:
        model: with its weights.
        capture: on its routers.
        losses: the balance losses of the run.
    """
    device = next(model.parameters()).device
    with capture.collect() as routes:
        model(input_ids=torch.arange(8, device=device)[None], use_cache=False)
    # A family may multiply the normalised weight by a factor, so it is the same number rather than 1.
    if routes[0].indices_TK.shape[-1] > 1 or any(route.weights_TK.unique().numel() > 1 for route in routes):
        return []
    trained = f"only {', '.join(losses)} train{'s' if len(losses) == 1 else ''} it" if losses else "nothing trains it"
    return [
        "top-1 routing divides weights by their sum, so the language loss gives the router no gradient and"
        f" {trained}; use a top-k of 2 or more, or a family that does not normalise"
    ]
