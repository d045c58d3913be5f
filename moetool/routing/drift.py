"""The distance between the routers and experts of two checkpoints, from the files only."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.reader import CheckpointReader
from moetool.layers import layer_of
from moetool.progress import Progress, silent
from moetool.routing.alignment import Alignment

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_FUSED = re.compile(r"\.experts\.\w*proj(\.weight)?$|block_sparse_moe\.(input|output)_linear\.weight$")
_ROUTER = re.compile(r"\.(gate|router)(\.layer|\.wg|\.gate|\.classifier)?\.weight$")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK = 1 << 25  # bytes read at a time
ROUTER = "router"  # stands for a router's tensor among the names of an expert's


def drift(
    before: Path,
    after: Path,
    num_experts: int | tuple[int, int],
    progress: Progress = silent,
    alignment: Alignment | None = None,
) -> list[dict[str, Any]]:
    """Relative change of the weights: |B - A| / |A|, Frobenius norms over all tensors of a router or expert.

    Args:
        before: folder of checkpoint A.
        after: folder of checkpoint B.
        num_experts: routed experts per layer, of both or of each.
        progress: reports tensors.
        alignment: which experts of the two correspond, where not by their numbers; of several copies in A the first.

    Returns:
        For each layer `layer`, `router` and `experts` (one value per expert of B); null where the files hold
        no plain weights of that name and shape (quantised ones, say), A has no such expert or A is all zero. A router
        is compared by the rows of experts that both have.

    Raises:
        CheckpointError: a folder is damaged.
    """
    counts = (num_experts, num_experts) if isinstance(num_experts, int) else num_experts
    with CheckpointReader(before) as old, CheckpointReader(after) as new:
        parts = [_parts(reader, number) for reader, number in zip((old, new), counts, strict=True)]
        layers = sorted({layer for layer, _ in parts[0]})
        rows: list[dict[str, Any]] = []
        for done, layer in enumerate(layers, start=1):
            those = alignment.counterparts(layer) if alignment else [[expert] for expert in range(counts[1])]
            router, experts = torch.zeros(2, dtype=torch.float64), []
            for expert, counterparts in enumerate(those):
                squares = {True: torch.zeros(2, dtype=torch.float64), False: torch.zeros(2, dtype=torch.float64)}
                if counterparts:
                    a, b = parts[0].get((layer, counterparts[0]), {}), parts[1].get((layer, expert), {})
                    for name in a.keys() | b.keys():
                        squares[name == ROUTER] += _squares(old, new, a.get(name), b.get(name))
                router += squares[True]
                experts.append(_relative(squares[False]))
            rows.append({"layer": layer, "router": _relative(router), "experts": experts})
            progress("drift of weights", done, len(layers))
    return rows


def _parts(reader: CheckpointReader, num_experts: int) -> dict[tuple[int, int], dict[str, TensorInfo]]:
    """(layer, expert) -> its matrices by a name that all experts share, and its row of the router."""
    found: dict[tuple[int, int], dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in reader.tensors.items():
        if (layer := layer_of(name)) is None:
            continue
        whole = info.shape[:1] == (num_experts,)
        if one := _EXPERT.search(name):
            found[layer, int(one[1])][_EXPERT.sub(".experts.", name)] = info
        elif whole and (_FUSED.search(name) if len(info.shape) == 3 else len(info.shape) == 2 and _ROUTER.search(name)):
            size = info.size // num_experts
            for expert in range(num_experts):
                part = replace(info, shape=info.shape[1:], start=info.start + expert * size, size=size)
                found[layer, expert][name if len(info.shape) == 3 else ROUTER] = part
    return found


def _squares(old: CheckpointReader, new: CheckpointReader, a: TensorInfo | None, b: TensorInfo | None) -> Tensor:
    """Squared norms of the difference and of A, (2,); NaN where the two cannot be compared."""
    total = torch.zeros(2, dtype=torch.float64)
    if a is None or b is None or a.shape != b.shape or not {a.dtype, b.dtype} <= DTYPES.keys():
        return total + math.nan
    for start in range(0, a.num_elements, _BLOCK // 8):
        elements = (start, min(_BLOCK // 8, a.num_elements - start))
        one, other = read_block(old, a, *elements), read_block(new, b, *elements)
        total += torch.stack([(other - one).square().sum(), one.square().sum()])
    return total


def read_block(
    reader: CheckpointReader, info: TensorInfo, start: int, count: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Elements [start, start + count) of a tensor of one of `DTYPES`, as `dtype`."""
    item = info.size // info.num_elements
    buffer = bytearray(count * item)
    reader.read_into(info, start * item, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=DTYPES[info.dtype]).to(dtype)


def _relative(squares: Tensor) -> float | None:
    changed, before = squares.tolist()
    value = math.sqrt(changed / before) if before else math.nan
    return value if math.isfinite(value) else None
