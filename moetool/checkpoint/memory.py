"""The memory needed to load a checkpoint, from its headers, and the memory available."""

from __future__ import annotations

import os
from pathlib import Path

from moetool.checkpoint.reader import CheckpointReader

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def weight_bytes(folder: Path, dtype: str = "auto") -> int:
    """Bytes of a checkpoint's weights in memory.

    Args:
        folder: a safetensors checkpoint.
        dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.

    Raises:
        CheckpointError: it is not a readable checkpoint.
    """
    with CheckpointReader(folder) as reader:
        return sum(
            info.size if dtype == "auto" else info.num_elements * _BYTES[dtype] for info in reader.tensors.values()
        )


def free_memory(device: str) -> int | None:
    """Bytes that a device has left for this process; None if unknown.

    For the CPU this is the least of the memory left by the machine, a container's limit (cgroup) and `ulimit -v`.
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
    """Bytes left by a container's limit; its cached file pages count as free."""
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        lines = (root / "memory.stat").read_text().splitlines()
        files = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
        return max(0, limit - used + files)
    except (OSError, ValueError):  # no limit: "max"
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
