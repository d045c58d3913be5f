"""The processes of a run: accelerate's view of them, their agreement, and sharded tensors.

The only file that imports accelerate.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator as Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from moetool import launch
from moetool.errors import ConfigError, in_one_line
from moetool.mesh import Mesh

Value = TypeVar("Value")


def make_accelerator(trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """accelerate's view of the machine; mixed precision and accumulation are the loop's own.

    Args:
        trackers: that receive metrics, by accelerate's names.
        folder: for trackers that write files.

    Raises:
        ConfigError: a process is missing, or accelerate does not see as many as were launched: they would be
            separate runs that write the same folder. Or it is configured for something that cpt cannot do, or a
            tracker's package is not installed.
    """
    known = [str(tracker) for tracker in get_available_trackers()]
    if absent := [name for name in trackers if name not in known]:
        raise ConfigError(f"--log-with {absent[0]}: that package is not installed; run pip install {absent[0]}")
    for plugin in ("FSDP", "DeepSpeed"):
        if os.environ.get(f"ACCELERATE_USE_{plugin.upper()}", "false").lower() in ("true", "1"):
            raise ConfigError(
                f"accelerate is configured for {plugin}, which moetool cpt does not use; launch it without that, and"
                " shard the weights with --fsdp N (docs/multi-gpu.md)"
            )
    # Nothing in a decoder adds to FSDP's outputs in place, and torch's notes on sharded tensors help no user.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    launched = launch.num_processes()
    try:
        accelerator = Accelerator(
            mixed_precision="no",
            log_with=list(trackers) or None,
            project_dir=folder,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    except torch.distributed.DistError as error:
        reason = in_one_line(error)
        raise ConfigError(
            f"not all of the {launched} processes found each other ({reason}); start all of them, on every machine,"
            " with the same address and port"
        ) from None
    accelerator.gradient_accumulation_steps = 1
    if accelerator.num_processes != launched:
        found = "" if torch.cuda.is_available() else " because there is no GPU"
        raise ConfigError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}{found}; on a CPU"
            " launch with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m moetool cpt ..."
        )
    return accelerator


def track(accelerator: Accelerator, row: Mapping[str, Any]) -> None:
    """Send a row of metrics to the trackers: one number for all layers, the worst one's."""
    worst: dict[str, Callable[[Any], float]] = {
        "mri": max,
        "entropy": min,
        "adaptive_aux": max,
        "dead_experts": lambda layers: sum(map(len, layers)),
    }
    values: dict[str, float] = {}
    for key, value in row.items():
        if key in ("val", "balance"):
            values |= {f"{key}/{name}": loss for name, loss in value.items()}
        elif key == "routing":
            for name, measures in value.items():
                values |= {f"{measure}/{name}": worst[measure](layers) for measure, layers in measures.items()}
        elif key not in ("step", "load", "sources"):
            values[f"train/{key}"] = worst[key](value) if key in worst else value
    accelerator.log(values, step=row["step"])


def peak_memory(device: torch.device) -> dict[str, int]:
    """`memory`: bytes of its GPU that this process has held at most; nothing where it trains on a CPU."""
    return {"memory": int(torch.cuda.max_memory_allocated(device))} if device.type == "cuda" else {}


def total(accelerator: Accelerator, mesh: Mesh, tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes that read different text; those that read the same count once."""
    summed: Tensor = accelerator.reduce(tensor if mesh.counts(accelerator.process_index) else torch.zeros_like(tensor))
    return summed


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a tensor that every process has, placed and sharded as `like`."""
    tensor = tensor.to(like.device, non_blocking=True)
    if isinstance(like, DTensor) and tensor.ndim:
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def sum_dtype(device: torch.device) -> torch.dtype:
    """In which dtype sums over a step are exact enough."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no double precision


def mean_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of a step over the processes, where no wrapper of the model does."""
    if accelerator.num_processes > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= accelerator.num_processes


@torch.no_grad()
def clip_shards(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scale a gradient that is sharded over meshes of several kinds down to a norm; returns its norm before, on all.

    Each process adds up its shards, what several hold alike counts once, and one reduction sums that.

    Args:
        parameters: with their gradients.
        most: the largest norm; infinite: nothing is scaled.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    processes = torch.distributed.get_world_size()
    shards = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    norms = torch.stack(torch._foreach_norm(shards, dtype=torch.float64)) if shards else torch.zeros(0)
    parts = norms.new_tensor([_num_shards(gradient) / processes for gradient in gradients])
    squares = (norms.square() * parts).sum()
    torch.distributed.all_reduce(squares)
    norm = squares.sqrt().float()
    if most < float("inf"):
        torch._foreach_mul_(shards, (most / (norm + 1e-6)).clamp_max(1.0))
    return norm


def _num_shards(tensor: Tensor) -> int:
    """Of how many different shards a tensor consists; the processes beyond that hold copies."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh, placements = tensor.device_mesh, tensor.placements
    return math.prod(mesh.size(dim) for dim, placement in enumerate(placements) if not placement.is_replicate())


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP has kept gathered after a forward without a backward, and put the shards back."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, ddp: bool) -> tuple[Any, Any]:
    """The model and its optimizer, wrapped for the processes of a run; the weights are in place.

    Args:
        accelerator: of the run.
        model: on this process's device.
        optimizer: over its parameters.
        ddp: whether DDP sums the gradients. It would reduce bf16 ones in bf16, a micro-batch's at a time, and FSDP
            reduces its own.
    """
    if not ddp:
        return model, optimizer
    wrapped: tuple[Any, Any] = accelerator.prepare(model, optimizer)
    return wrapped


def accumulating(accelerator: Accelerator, model: Any, last: bool) -> AbstractContextManager[Any]:
    """Around each backward of a step: only the last one's ends with a sum over processes that hold the same weights.

    FSDP reduces every micro-batch's gradient to its shards, for it would hold whole gradients otherwise; the shards
    are summed over the replicas with the last.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
        return nullcontext()
    return nullcontext() if last else accelerator.no_sync(model)
