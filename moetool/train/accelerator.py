"""The processes of a run: accelerate's view of them, what they agree on, and tensors that they shard.

The only file that imports accelerate.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator as Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from moetool import launch
from moetool.cost.memory import Sharing
from moetool.errors import ConfigError
from moetool.train import zero
from moetool.train.config import TrainConfig

Value = TypeVar("Value")


def make_accelerator(trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """accelerate's view of the machine; mixed precision and accumulation are the loop's own.

    Args:
        trackers: that receive metrics, by accelerate's names.
        folder: for trackers that write files.

    Raises:
        ConfigError: accelerate does not see as many processes as were launched: they would be separate
            runs that write the same folder. Or it is configured for something that cpt cannot do, or a
            tracker's package is not installed.
    """
    known = [str(tracker) for tracker in get_available_trackers()]
    if absent := [name for name in trackers if name not in known]:
        raise ConfigError(f"--log-with {absent[0]}: that package is not installed; run pip install {absent[0]}")
    deepspeed, fsdp = _wanted("DEEPSPEED"), _wanted("FSDP")
    if deepspeed and find_spec("deepspeed") is None:
        raise ConfigError("accelerate is configured for DeepSpeed, which is not installed; run pip install deepspeed")
    if fsdp:
        # Each process loads for itself: accelerate's way of loading on one fails for models with buffers.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # What they say of each other's versions is nothing that a user can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"accelerate\.|torch\.distributed\.")
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    accelerator.gradient_accumulation_steps = 1
    launched = launch.num_processes()
    if accelerator.num_processes != launched:
        found = "" if torch.cuda.is_available() else " because there is no GPU"
        raise ConfigError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}{found}; on a CPU"
            " launch with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m moetool cpt ..."
        )
    if deepspeed:
        if not zero_stage(accelerator):
            raise ConfigError(
                f"accelerate is configured for DeepSpeed but would train with {accelerator.distributed_type.value};"
                " launch it on GPUs, or without DeepSpeed"
            )
        zero.check(accelerator.state.deepspeed_plugin.deepspeed_config)
        zero.take_over()
    if fsdp and not (is_sharded(accelerator) and getattr(accelerator, "is_fsdp2", False)):
        raise ConfigError(
            f"accelerate is configured for FSDP but would train with {accelerator.distributed_type.value};"
            " FSDP needs GPUs and fsdp_version: 2, see docs/accelerate/fsdp2.yaml"
        )
    return accelerator


def _wanted(plugin: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() in ("true", "1")


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's ZeRO stage, which shards moments, from 2 on gradients, in 3 weights; 0 without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return int(accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"])


def track(accelerator: Accelerator, row: Mapping[str, Any]) -> None:
    """Send a row of metrics to the trackers: one number for all layers, the worst one's."""
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
    """Whether a process holds a share of each weight (FSDP, ZeRO-3) and not all of it."""
    return bool(accelerator.distributed_type == DistributedType.FSDP) or zero_stage(accelerator) == 3


def sharing(accelerator: Accelerator) -> Sharing:
    """How the processes shard weights and moments."""
    return Sharing(accelerator.num_processes, is_sharded(accelerator), zero_stage(accelerator))


def agreed(accelerator: Accelerator, value: Value) -> Value:
    """The main process's value, in every process."""
    if accelerator.num_processes == 1:
        return value
    values: list[Any] = [value]
    broadcast_object_list(values)
    chosen: Value = values[0]
    return chosen


def is_shared_out(tensor: Tensor) -> bool:
    """Whether this process holds a share of a tensor."""
    return isinstance(tensor, DTensor) or zero.is_shared(tensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU; gathered from all processes, which must all call, where it is shared out."""
    if zero.is_shared(tensor):
        return zero.gathered(tensor)
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


def is_mixed(accelerator: Accelerator, precision: str) -> bool:
    """Whether a process holds bf16 weights beside fp32 ones (mixed.py): bf16, and whole weights."""
    return precision == "bf16" and sharing(accelerator).whole


def autocast(accelerator: Accelerator, precision: str) -> torch.autocast:
    """bf16 arithmetic over fp32 weights, where FSDP or DeepSpeed shards these."""
    enabled = precision == "bf16" and not is_mixed(accelerator, precision)
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=enabled)


def mean_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of a step over the processes, where no wrapper of the model does."""
    if accelerator.num_processes > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= accelerator.num_processes


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> tuple[Any, Any]:
    """The model and its optimizer, wrapped for sharding over the processes; the weights are in place.

    Args:
        accelerator: of the run.
        model: on this process's device, or on the CPU where its weights are going to be sharded.
        optimizer: over its parameters.
        config: of the run.
    """
    if is_mixed(accelerator, config.precision):  # DDP would reduce bf16 gradients, a micro-batch's at a time
        return model, optimizer
    if stage := zero_stage(accelerator):
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings.update(zero.configured(settings, config, accelerator.num_processes))
        if stage == 3:
            zero.partition(model, settings)
        engine, _ = accelerator.prepare(model, optimizer)
        zero.begin(engine, optimizer)
        accelerator.deepspeed_engine_wrapped = steps = zero.Steps(engine)
        return engine, steps
    if is_sharded(accelerator) and config.precision == "bf16":
        # Autocast alone would keep a bf16 copy of every whole matrix until the backward, sharded or not.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    wrapped: tuple[Any, Any] = accelerator.prepare(model, optimizer)
    return wrapped


def accumulating(accelerator: Accelerator, model: Any, last: bool) -> AbstractContextManager[Any]:
    """Around each backward of a step: only the last one's ends with the sum over the processes."""
    if zero_stage(accelerator):
        model.set_gradient_accumulation_boundary(last)
        return nullcontext()
    return nullcontext() if last else accelerator.no_sync(model)
