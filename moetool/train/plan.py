"""What a run is going to do, told before it does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moetool.data.mixture import TokenMixture
from moetool.routing.capture import RouterCapture
from moetool.train.batches import Corpus
from moetool.train.config import TrainConfig
from moetool.train.memory import device_memory, estimate, flops_per_token, parameters


def describe(
    config: TrainConfig,
    model: Any,
    mixture: TokenMixture,
    corpus: Corpus,
    num_processes: int,
    sharded: bool,
    zero_stage: int = 0,
) -> dict[str, Any]:
    """The plan of a run, as plain values.

    Args:
        config: resolved.
        model: without weights, see `checkpoint.model.skeleton`.
        mixture: of the sources.
        corpus: what they and the validation sets are.
        num_processes: of the run.
        sharded: whether each process holds a share of the weights.
        zero_stage: of DeepSpeed; 0 without it.
    """
    total, active = parameters(model)
    ledger = mixture.ledger(config.max_steps * config.global_batch_size)
    return {
        "num_parameters": total,
        "num_active_parameters": active,
        "flops_per_token": flops_per_token(model, config.seq_len),
        "memory": estimate(model, config, num_processes, sharded, zero_stage),
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
                "available_tokens": mixture.sources[name].stream.num_tokens,
            }
            for name, entry in ledger.items()
        },
        "val": {name: stream.num_tokens for name, stream in corpus.val.items()},
    }


def memory_warnings(
    memory: Mapping[str, int], device: torch.device, fitting: Callable[[int], Sequence[tuple[str, int]]]
) -> list[str]:
    """A warning where the estimate is more than a device has, with the options that would make the run fit.

    Args:
        memory: see `estimate`.
        device: of this process.
        fitting: the bytes of a device -> options and what the run would need with them.
    """
    there = device_memory(device)
    if there is None or memory["total"] <= there:
        return []
    ways = [f"{options} ({need / 1e9:.3g} GB)" for options, need in fitting(there)]
    advice = f"it fits with {'; or with '.join(ways)}" if ways else "no option makes it fit"
    return [
        f"this run needs about {memory['total'] / 1e9:.3g} GB a process, {device} has {there / 1e9:.3g} GB; {advice};"
        " or shard the weights (docs/multi-gpu.md)"
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
        "top-1 routing with weights divided by their sum: every weight is the same, so the language loss gives the"
        f" router no gradient and {trained}; use a top-k of 2 or more, or a family that does not normalise"
    ]
