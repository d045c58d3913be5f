"""Similarity of an upcycled checkpoint's experts to each other and to the dense FFN, from the files.

Shapes: E experts; M of them that hold one part of the dense FFN, and that part in each dense model; F
intermediate units of an expert, R rows and C columns of a block of a matrix, U the units in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetool.arch.dense_config import open_dense
from moetool.arch.moe_source import MoESource, moe_source
from moetool.arch.spec import dense_ffn
from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.reader import CheckpointReader
from moetool.errors import CheckpointError
from moetool.outside import finite
from moetool.progress import Progress, silent
from moetool.recipe import PROJECTIONS
from moetool.routing.drift import DTYPES, read_block
from moetool.routing.origin import Origin
from moetool.units import permutation

PARTS = ("all", "kept", "redrawn")
_BLOCK = 1 << 22  # elements of all experts together that are read at a time


def similarity(
    folder: Path, origin: Origin, dense: Sequence[Path] | None, progress: Progress = silent
) -> list[dict[str, Any]]:
    """Cosine similarity of experts, gate, up and down taken together as one vector.

    Experts are compared with those that began as the same part of the dense FFN, and against that part
    in the dense model that they come from, its down-projection times the factor that the experts'
    carry. `kept` and `redrawn` take the entries of units that were kept in both, and the rest (changed
    in at least one). Matrices whose units were permuted are put back into the dense order first.

    Args:
        folder: the upcycled checkpoint, trained further or not.
        origin: from `origin.read_origin`.
        dense: folders of the dense models, from `origin.find_dense`.

    Returns:
        For each layer `layer`, `between_experts` and `with_dense` (None without `dense`); each has the
        means `all`, `kept`, `redrawn`, `min` and `max` of all, and `experts`, the three of each expert
        (its mean over the others). None where there are no such units, or no other expert.

    Raises:
        CheckpointError: a file is damaged, or does not hold plain weights of the experts.
    """
    rows = []
    with ExitStack() as stack:
        moe = moe_source(stack.enter_context(CheckpointReader(folder)))
        if moe is None or moe.layers != origin.layers:
            raise CheckpointError("the files do not hold the experts of all layers")
        sources = [stack.enter_context(open_dense(path)) for path in dense or ()]
        for done, layer in enumerate(origin.layers):
            progress("similarity of experts", done, len(origin.layers))
            rows.append({"layer": layer} | _layer(moe, sources, origin, layer))
    progress("similarity of experts", len(origin.layers), len(origin.layers))
    return rows


def _layer(moe: MoESource, sources: Sequence[CheckpointReader], origin: Origin, layer: int) -> dict[str, Any]:
    E = origin.num_experts
    between = {part: torch.full((E, E), math.nan, dtype=torch.float64) for part in PARTS}
    dense = {part: torch.full((E, 1), math.nan, dtype=torch.float64) for part in PARTS}
    for experts in origin.parts(layer):
        of = torch.tensor(experts)
        rows = torch.arange(len(experts))
        donors = (
            torch.tensor([origin.recipe.donor(origin.first(layer, expert)) for expert in experts]) if sources else rows
        )
        for part, cosine_MM in _cosines(moe, sources, origin, layer, experts).items():
            between[part][of[:, None], of] = cosine_MM[: len(experts), : len(experts)]
            between[part][of, of] = math.nan
            if sources:
                dense[part][of, 0] = cosine_MM[rows, len(experts) + donors]
    return {"between_experts": _summary(between), "with_dense": _summary(dense) if sources else None}


@dataclass(frozen=True)
class Matrix:
    """A matrix that is part of a tensor, with its units in the order of the dense FFN.

    Attributes:
        reader: of its checkpoint.
        info: the tensor.
        start: element at which it begins.
        stride: elements from a row to the next.
        columns: in a row.
        place_F: unit of the part, in the dense order -> its position in the matrix; None where they are the same.
        factor: what is read is multiplied with it.
    """

    reader: CheckpointReader
    info: TensorInfo
    start: int
    stride: int
    columns: int
    place_F: Tensor | None = None
    factor: float = 1.0

    def read(self, projection: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as float32."""
        if self.place_F is not None and projection != "down":
            return torch.cat([self._rows(row, row + 1) for row in self.place_F[start:stop].tolist()])
        block_RC = self._rows(start, stop)
        return block_RC if self.place_F is None else block_RC[:, self.place_F]

    def _rows(self, start: int, stop: int) -> Tensor:
        count = (stop - start - 1) * self.stride + self.columns
        flat = read_block(self.reader, self.info, self.start + start * self.stride, count, torch.float32)
        return flat.as_strided((stop - start, self.columns), (self.stride, 1)) * self.factor


def _matrices(
    moe: MoESource,
    sources: Sequence[CheckpointReader],
    origin: Origin,
    layer: int,
    experts: Sequence[int],
    projection: str,
) -> tuple[list[Matrix], int]:
    """One projection of experts of one part, then of that part in each dense model; and its rows."""
    F, hidden = origin.num_units, moe.expert(layer, experts[0], "gate").shape[1]
    rows, columns = (hidden, F) if projection == "down" else (F, hidden)
    found = []
    for expert in experts:
        info = moe.expert(layer, expert, projection)
        order_F = permutation(origin.recipe, layer, origin.first(layer, expert), F)
        place_F = None if order_F is None else order_F.argsort()
        found.append(Matrix(moe.reader, _plain(info, layer, (rows, columns)), 0, columns, columns, place_F))
    first, units = origin.recipe.first_unit(origin.first(layer, experts[0]), F), F * origin.recipe.granularity
    held_F = origin.held(layer, experts[0])
    for source in sources:
        info = _plain(source.tensors[dense_ffn(layer)[projection]], layer)
        if held_F is not None:
            stride, factor = (units, origin.factor) if projection == "down" else (hidden, 1.0)
            found.append(Matrix(source, info, 0, stride, stride, held_F, factor))
        elif projection == "down":
            found.append(Matrix(source, info, first, units, columns, factor=origin.factor))
        else:
            found.append(Matrix(source, info, first * hidden, hidden, columns))
    return found, rows


def _plain(info: TensorInfo, layer: int, shape: tuple[int, ...] | None = None) -> TensorInfo:
    if info.dtype not in DTYPES or shape not in (None, info.shape):
        name = info.name.rpartition(".layers.")[2]
        raise CheckpointError(f"layer {layer}: the files do not hold {name} as plain weights of one shape")
    return info


def _cosines(
    moe: MoESource, sources: Sequence[CheckpointReader], origin: Origin, layer: int, experts: Sequence[int]
) -> dict[str, Tensor]:
    """Part -> cosine similarity (M, M); NaN where a part is empty."""
    M = len(experts) + len(sources)
    some = origin.num_redrawn[origin.layers.index(layer)] > 0
    changed_M = torch.zeros(M, dtype=torch.bool)
    # Inner products over all entries, over those kept in both, and the squared norm of the first over
    # the latter.
    total_MM, kept_MM, norm_MM = (torch.zeros(M, M, dtype=torch.float64) for _ in range(3))
    for projection in PROJECTIONS:
        matrices, R = _matrices(moe, sources, origin, layer, experts, projection)
        kept_MF = torch.ones(M, origin.num_units)
        for row, expert in enumerate(experts if some else ()):
            redrawn_F, place_F = origin.redrawn(layer, expert, projection), matrices[row].place_F
            changed_M[row] |= redrawn_F.any()
            kept_MF[row] = (~(redrawn_F if place_F is None else redrawn_F[place_F])).float()
        step = max(1, _BLOCK // (M * matrices[0].columns))
        for start in range(0, R, step):
            stop = min(R, start + step)
            block_MRC = torch.stack([matrix.read(projection, start, stop) for matrix in matrices])
            total_MM += _inner(block_MRC)
            if not some:
                continue
            if projection == "down":
                kept_MU, squares_MU = kept_MF, block_MRC.square().sum(dim=1)
                block_MRC *= kept_MU[:, None, :]
            else:
                kept_MU, squares_MU = kept_MF[:, start:stop], block_MRC.square().sum(dim=2)
                block_MRC *= kept_MU[:, :, None]
            kept_MM += _inner(block_MRC)
            norm_MM += ((squares_MU * kept_MU) @ kept_MU.T).double()
    whole_MM = total_MM.diagonal()[:, None].expand(M, M)
    if origin.drawn:  # nothing was kept, and nothing redrawn
        norm_MM, rest_MM = torch.zeros_like(total_MM), torch.zeros_like(total_MM)
    else:
        if not some:
            kept_MM, norm_MM = total_MM, whole_MM
        rest_MM = whole_MM - norm_MM
        changed_MM = changed_M[:, None] | changed_M
        rest_MM[~changed_MM | (rest_MM <= 1e-6 * whole_MM)] = 0  # nothing but rounding
    parts = ((total_MM, whole_MM), (kept_MM, norm_MM), (total_MM - kept_MM, rest_MM))
    return {
        name: torch.where(of_MM * of_MM.T > 0, inner_MM / (of_MM * of_MM.T).sqrt(), math.nan).clamp(-1, 1)
        for name, (inner_MM, of_MM) in zip(PARTS, parts, strict=True)
    }


def _inner(block_MRC: Tensor) -> Tensor:
    flat = block_MRC.flatten(1)
    return (flat @ flat.T).double()


def _summary(values: dict[str, Tensor]) -> dict[str, Any]:
    """Means, minimum and maximum of similarities (E, n) by part."""
    experts = zip(*(values[part].nanmean(dim=1).tolist() for part in PARTS), strict=True)
    every = values["all"][~values["all"].isnan()]
    return (
        {part: finite(values[part].nanmean().item()) for part in PARTS}
        | {"min": every.min().item() if len(every) else None, "max": every.max().item() if len(every) else None}
        | {"experts": [dict(zip(PARTS, map(finite, three), strict=True)) for three in experts]}
    )
