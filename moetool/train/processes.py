"""The processes of a run: accelerate's view of them, what they agree on, and tensors that they share out.

The only file that imports accelerate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator as Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast_object_list
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from moetool.errors import ConfigError

Value = TypeVar("Value")


def make_accelerator(trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """accelerate's view of the machine; mixed precision and accumulation are the loop's own.

    Args:
        trackers: to be told of metrics, by accelerate's names.
        folder: where those write that write files.

    Raises:
        ConfigError: accelerate sees another number of processes than were launched: they would be so
            many separate runs that write one folder. Or it was configured for what cpt cannot do, or a
            tracker's package is not installed.
    """
    known = [str(tracker) for tracker in get_available_trackers()]
    if absent := [name for name in trackers if name not in known]:
        raise ConfigError(f"--log-with {absent[0]}: that package is not installed; run pip install {absent[0]}")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        raise ConfigError(
            "accelerate is configured for DeepSpeed, which moetool cpt does not train with; use its FSDP2"
            " configuration, docs/accelerate/fsdp2.yaml, which shards the same"
        )
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    if fsdp:
        # Each process loads for itself: accelerate's way of loading on one fails for models with buffers.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    accelerator.gradient_accumulation_steps = 1
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched, accelerate sees {accelerator.num_processes}; on a CPU launch with"
            " ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m moetool cpt ..."
        )
    if fsdp and not (is_sharded(accelerator) and getattr(accelerator, "is_fsdp2", False)):
        raise ConfigError(
            f"accelerate is configured for FSDP but would train with {accelerator.distributed_type.value};"
            " FSDP needs GPUs and fsdp_version: 2, see docs/accelerate/fsdp2.yaml"
        )
    return accelerator


def track(accelerator: Accelerator, row: Mapping[str, Any]) -> None:
    """Tell the trackers a row of metrics: one number for all layers, the worst one's."""
    worst: dict[str, Callable[[Any], float]] = {
        "mri": max,
        "entropy": min,
        "dead_experts": lambda layers: sum(map(len, layers)),
    }
    values: dict[str, float] = {}
    for key, value in row.items():
        if key in ("val", "balance"):
            values |= {f"{key}/{name}": loss for name, loss in value.items()}
        elif key == "routing":
            for name, measures in value.items():
                values |= {f"{measure}/{name}": worst[measure](layers) for measure, layers in measures.items()}
        elif key != "step":
            values[f"train/{key}"] = worst[key](value) if key in worst else value
    accelerator.log(values, step=row["step"])


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a process holds a share of each weight (FSDP) and not all of it."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def agreed(accelerator: Accelerator, value: Value) -> Value:
    """The main process's value, in every process."""
    if accelerator.num_processes == 1:
        return value
    values: list[Any] = [value]
    broadcast_object_list(values)
    chosen: Value = values[0]
    return chosen


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU; gathered from all processes, which must all call, where it is sharded."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a tensor that every process has, placed and sharded as `like`."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor) and tensor.ndim:
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def number(tensor: Tensor) -> Tensor:
    """A norm that accelerate may give as a sharded tensor, as a plain one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_dtype(device: torch.device) -> torch.dtype:
    """In which dtype sums over a step are exact enough."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no double precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Arithmetic in bf16 over fp32 weights, or in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def gather_in(accelerator: Accelerator, precision: str) -> None:
    """Gather sharded weights in the precision of the arithmetic, before `prepare`.

    Autocast alone would keep a bf16 copy of every whole matrix until the backward, sharded or not.
    """
    if is_sharded(accelerator) and precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
