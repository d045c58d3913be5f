"""How far the routers and experts of one checkpoint lie from those of another, from the files alone.

Shapes: E experts.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetool.checkpoint.reader import CheckpointReader, TensorInfo
from moetool.progress import Progress, silent

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_FUSED = re.compile(r"\.experts\.\w*proj(\.weight)?$|block_sparse_moe\.(input|output)_linear\.weight$")
_ROUTER = re.compile(r"\.(gate|router)(\.layer|\.wg|\.gate|\.classifier)?\.weight$")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK = 1 << 25  # bytes read at a time


def drift(before: Path, after: Path, num_experts: int, progress: Progress = silent) -> list[dict[str, Any]]:
    """Relative change of the weights: |B - A| / |A|, Frobenius norms over all tensors of a router or expert.

    Args:
        before: folder of checkpoint A.
        after: folder of checkpoint B.
        num_experts: routed experts per layer.

    Returns:
        For each layer `layer`, `router` and `experts` (one value per expert); null where the files hold
        no plain weights of that name and shape (quantised ones, say) or A is all zero.

    Raises:
        CheckpointError: a folder is damaged.
    """
    # (layer, expert or None for the router) -> squared norms of the difference and of A
    squares: dict[tuple[int, int | None], Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    layers: set[int] = set()
    with CheckpointReader(before) as old, CheckpointReader(after) as new:
        for done, (name, info) in enumerate(old.tensors.items(), start=1):
            progress("drift of weights", done, len(old.tensors))
            owners = _owners(info, num_experts)
            other = new.tensors.get(name)
            if not owners:
                continue
            layers.add(owners[0][0])
            alike = other is not None and other.shape == info.shape and {info.dtype, other.dtype} <= DTYPES.keys()
            for part, owner in enumerate(owners):
                squares[owner] += _squares(old, new, info, other, part, len(owners)) if other and alike else math.nan
    return [
        {
            "layer": layer,
            "router": _relative(squares, (layer, None)),
            "experts": [_relative(squares, (layer, expert)) for expert in range(num_experts)],
        }
        for layer in sorted(layers)
    ]


def _owners(info: TensorInfo, num_experts: int) -> list[tuple[int, int | None]]:
    """To whom equal parts of a tensor belong: (layer, expert), or (layer, None) for the router."""
    found = _LAYER.search(info.name)
    if found is None:
        return []
    layer = int(found[1])
    if expert := _EXPERT.search(info.name):
        return [(layer, int(expert[1]))]
    if _FUSED.search(info.name) and len(info.shape) == 3 and info.shape[0] == num_experts:
        return [(layer, expert) for expert in range(num_experts)]
    if _ROUTER.search(info.name) and len(info.shape) == 2 and info.shape[0] == num_experts:
        return [(layer, None)]
    return []


def _squares(
    old: CheckpointReader, new: CheckpointReader, info: TensorInfo, other: TensorInfo, part: int, parts: int
) -> Tensor:
    total = torch.zeros(2, dtype=torch.float64)
    length = info.num_elements // parts
    for start in range(0, length, _BLOCK // 8):
        elements = (part * length + start, min(_BLOCK // 8, length - start))
        a, b = read_block(old, info, *elements), read_block(new, other, *elements)
        total += torch.stack([(b - a).square().sum(), a.square().sum()])
    return total


def read_block(
    reader: CheckpointReader, info: TensorInfo, start: int, count: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Elements [start, start + count) of a tensor of one of `DTYPES`, as `dtype`."""
    item = info.size // info.num_elements
    buffer = bytearray(count * item)
    reader.read_into(info, start * item, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=DTYPES[info.dtype]).to(dtype)


def _relative(squares: dict[tuple[int, int | None], Tensor], owner: tuple[int, int | None]) -> float | None:
    changed, before = squares[owner].tolist() if owner in squares else (0.0, 0.0)
    value = math.sqrt(changed / before) if before else math.nan
    return value if math.isfinite(value) else None
