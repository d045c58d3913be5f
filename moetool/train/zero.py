"""DeepSpeed's ZeRO: its engine in the trainer's order of things, and the states that it shards.

accelerate's own way would clip and step inside of the last backward, before any check. The optimizer is
the trainer's AdamW, which DeepSpeed turns over flat parts of all parameters. Imports DeepSpeed only in
a run that it was launched for.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moetool.errors import ConfigError
from moetool.train.config import TrainConfig

# What accelerate's configuration may say; the rest is what the options of cpt say.
_OWN = {
    "zero_optimization",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
}


def check(settings: Mapping[str, Any]) -> None:
    """Refuse a DeepSpeed configuration that cpt cannot train with.

    Raises:
        ConfigError: says what to change in it.
    """
    zero = settings["zero_optimization"]
    if zero["stage"] not in (1, 2, 3):
        raise ConfigError(f"DeepSpeed is configured for ZeRO stage {zero['stage']}; set zero_stage to 1, 2 or 3")
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            raise ConfigError(
                f"DeepSpeed is configured for {key}, which moetool cpt does not train with; set it to none"
            )
    for key, value in settings.items():
        if key not in _OWN and not (isinstance(value, dict) and value.get("enabled") is False):
            raise ConfigError(
                f"DeepSpeed is configured for {key}, which moetool cpt decides itself; leave only zero_optimization"
            )


def check_options(config: TrainConfig, stage: int) -> None:
    """Refuse options that do not work with ZeRO-3.

    Args:
        config: resolved.
        stage: of ZeRO; 0 without DeepSpeed.

    Raises:
        ConfigError: says what to use instead.
    """
    if stage == 3 and "loss-free" in config.balance:
        raise ConfigError(
            "--balance loss-free: ZeRO-3 shards the selection bias and cannot update it without a gradient; set"
            " zero_stage to 2, or use docs/accelerate/fsdp2.yaml"
        )
    if stage == 3 and config.compile:
        raise ConfigError(
            "--compile: ZeRO-3 gathers each layer's weights in hooks that torch.compile would recompile for every"
            " layer, up to its limit; set zero_stage to 2, use docs/accelerate/fsdp2.yaml, or leave it out"
        )


def take_over() -> None:
    """Keep DeepSpeed's log out of the output, which may be one JSON document, and transformers out of ZeRO-3.

    It would shard the weights while it reads them; `partition` does, once they are there and checked.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)


def configured(settings: Mapping[str, Any], config: TrainConfig, num_processes: int) -> dict[str, Any]:
    """A DeepSpeed configuration with what the options of a run say, and fp32 between the processes."""
    batch = {"train_micro_batch_size_per_gpu": config.micro_batch_size, "gradient_accumulation_steps": 1}
    batch["train_batch_size"] = config.micro_batch_size * num_processes
    # Only modules of a class named here would be sent in bf16, and Identity has nothing to send.
    precision = {"dtype": "bfloat16", "lower_precision_safe_modules": ["torch.nn.Identity"]}
    autocast = {"torch_autocast": {"enabled": True, **precision}} if config.precision == "bf16" else {}
    return {**settings, **batch, "gradient_clipping": config.grad_clip or 0.0, **autocast}


def partition(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Shard the weights of a model on the CPU, one after the other; no device ever holds all (ZeRO-3)."""
    import deepspeed

    deepspeed.zero.Init(module=model, config_dict_or_path=dict(settings), dtype=torch.float32)


def begin(engine: Any, optimizer: torch.optim.Optimizer) -> None:
    """Make AdamW's moments for the flat parts that DeepSpeed has put in place of the parameters.

    AdamW makes them in its first step, but DeepSpeed finds a parameter's part of them only in its first group.
    """
    zero = engine.optimizer
    flat = "fp32_partitioned_groups_flat" if engine.zero_optimization_partition_weights() else None
    for part in getattr(zero, flat or "single_partition_of_fp32_groups"):
        step = torch.zeros((), dtype=torch.float32, device=part.device)  # where the fused form wants it
        optimizer.state[part] = {"step": step, "exp_avg": torch.zeros_like(part), "exp_avg_sq": torch.zeros_like(part)}
    if not flat:
        zero._lazy_init_hp_params_optimizer_state()


class Steps:
    """The engine's backward, gradient norm and update, each when the trainer asks for it.

    Stands for accelerate's wrapper of the engine and for its wrapper of the optimizer.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def backward(self, loss: Tensor, **_: Any) -> None:
        """Add to the gradient; the engine reduces it on the step's last call."""
        self.engine.backward(loss)

    def get_global_grad_norm(self) -> Tensor:
        """The norm of the gradient before it is clipped, which `step` does; infinite where it is not finite."""
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "scaled_global_norm"):
            norm = optimizer.scaled_global_norm()
        else:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(optimizer._get_norm_groups())
        return torch.as_tensor(norm)

    def step(self) -> None:
        """Clip, update, forget the gradient."""
        self.engine.step()

    def zero_grad(self) -> None:
        """Nothing: `step` did."""


def is_shared(parameter: Tensor) -> bool:
    """Whether DeepSpeed shards a parameter (ZeRO-3)."""
    return hasattr(parameter, "ds_id")


def is_updated(parameter: Tensor) -> bool:
    """Whether DeepSpeed shards the optimizer's state of a parameter."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def gathered(parameter: Tensor) -> Tensor:
    """The whole parameter, on the CPU; all processes must call."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().cpu().clone()


def moments(parameter: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's whole state of a parameter; all processes must call."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if not parameter.requires_grad:
        return {}
    part = next(iter(optimizer.state.values()))  # all are as old
    return {
        key: safe_get_full_optimizer_state(parameter, key) if value.ndim else value.clone()
        for key, value in part.items()
    }


def set_moments(engine: Any, optimizer: torch.optim.Optimizer, moments: Mapping[Any, Mapping[str, Tensor]]) -> None:
    """Keep this process's part of AdamW's state.

    Args:
        engine: DeepSpeed's.
        optimizer: that it was given, see `begin`.
        moments: of each parameter, whole.
    """
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    for parameter, values in moments.items():
        for key, value in values.items():
            if not value.ndim:
                for state in optimizer.state.values():
                    state[key].copy_(value)
            elif is_shared(parameter):  # the last process's part may be longer than what is left for it
                part = parameter.ds_tensor
                padded = torch.zeros(part.numel() * engine.dp_world_size).to(part)
                padded[: value.numel()] = value.flatten()
                safe_set_local_optimizer_state(parameter, padded.split(part.numel())[engine.global_rank], key)
            else:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
