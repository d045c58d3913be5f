"""The memory that a device has, and the operations that it can do in a second."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Dense bf16 operations per second of tensor cores, from the vendors' data sheets (without sparsity).
_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations per second that a device can do in bf16; None where it is not known."""
    import torch

    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_FLOPS.items() if known in name), None)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory, or that the machine has free; None where that is not known."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return free_memory(device.type)


def free_memory(device: str) -> int | None:
    """Bytes that a device has left for this process; None where that is not known.

    Of the CPU's these are what the machine, a container's limit (cgroup) and `ulimit -v` leave, whichever is least.
    """
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if device != "cpu":
        return None
    found = [_machine(), _container(), _limit()]
    return min((left for left in found if left is not None), default=None)


def _machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _container(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the limit of a container leaves; pages of files that it holds can be given up."""
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        lines = (root / "memory.stat").read_text().splitlines()
        files = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
        return max(0, limit - used + files)
    except (OSError, ValueError):  # no such limit: "max"
        return None


def _limit() -> int | None:
    import resource

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return None
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return most
    return max(0, most - used)
