"""The memory of devices, and their operations per second."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, from its data sheet.

    Attributes:
        name: as `torch.cuda.get_device_name` contains it.
        memory: bytes.
        peak_flops: dense bf16 operations per second of its tensor cores (without sparsity).
        link: bytes per second that it sends to others of its machine, in one direction: NVLink, else PCIe.
    """

    name: str
    memory: float
    peak_flops: float
    link: float


PCIE_4, PCIE_5 = 32e9, 64e9  # 16 lanes, one direction
# As `moetool plan --gpu` names them. Of two whose names begin alike, the longer comes first.
GPUS = {
    "b200": Gpu("B200", 180e9, 2250e12, 900e9),
    "h200": Gpu("H200", 141e9, 989e12, 450e9),
    "h100-nvl": Gpu("H100 NVL", 94e9, 835e12, 300e9),
    "h100-pcie": Gpu("H100 PCIe", 80e9, 756e12, PCIE_5),
    "h100": Gpu("H100", 80e9, 989e12, 450e9),
    "a100-40": Gpu("A100-SXM4-40GB", 40e9, 312e12, 300e9),
    "a100": Gpu("A100", 80e9, 312e12, 300e9),
    "l40s": Gpu("L40S", 48e9, 362e12, PCIE_4),
    "rtx-4090": Gpu("RTX 4090", 24e9, 165e12, PCIE_4),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations per second that a device can do in bf16; None where it is not known."""
    import torch

    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.peak_flops for gpu in GPUS.values() if gpu.name in name), None)


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
