"""Several processes, started by `accelerate launch` or `torchrun`; each takes a share of the documents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed

from moetool import launch
from moetool.errors import ConfigError


@contextmanager
def joined(device: str, device_map: str | None) -> Iterator[str]:
    """Join the processes of the launch, if there are several; return this one's device.

    Args:
        device: such as `cuda`; each process takes the GPU of its local rank.
        device_map: must be None with several processes, which would each spread over all GPUs.

    Raises:
        ConfigError: --device-map with several processes, or more processes than GPUs.
    """
    if launch.num_processes() == 1:
        yield device
        return
    if device_map is not None:
        raise ConfigError("--device-map spreads one process over all devices; launch one process, or leave it out")
    if device == "cuda":
        local_rank = launch.local_rank()
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"more processes than the {torch.cuda.device_count()} GPUs; launch one process per GPU")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    # On long tasks the shares differ by hours, so waiting is not an error.
    distributed.init_process_group(backend, timeout=timedelta(weeks=52))
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def from_first(value: Any) -> Any:
    """The first process's value, in all processes."""
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]
