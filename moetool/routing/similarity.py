"""How alike the experts of an upcycled checkpoint are, to each other and to the dense FFN, from the files.

Shapes: E experts, M = E or, with the dense FFN as the last one, E + 1; F intermediate units, R rows and
C columns of a block of a matrix, U the units in it.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetool.arch.dense import FFN
from moetool.checkpoint.reader import CheckpointReader, TensorInfo
from moetool.errors import CheckpointError
from moetool.progress import Progress, silent
from moetool.recipe import PROJECTIONS, permutation
from moetool.routing.drift import DTYPES, read_block
from moetool.routing.origin import Origin

PARTS = ("all", "kept", "redrawn")
_BLOCK = 1 << 22  # elements of all experts together that are read at a time


def similarity(folder: Path, origin: Origin, dense: Path | None, progress: Progress = silent) -> list[dict[str, Any]]:
    """Cosine similarity of experts, gate, up and down taken together as one vector.

    `kept` and `redrawn` take the entries of units that were kept in both, and the rest (redrawn in at
    least one). Matrices whose units were permuted are put back into the dense order first.

    Args:
        folder: the upcycled checkpoint, trained further or not.
        origin: from `origin.read_origin`.
        dense: folder of the dense source, from `origin.find_dense`.

    Returns:
        For each layer `layer`, `between_experts` and `with_dense` (None without `dense`); each has the
        means `all`, `kept`, `redrawn`, `min` and `max` of all, and `experts`, the three of each expert
        (its mean over the others). None where there are no such units.

    Raises:
        CheckpointError: a file is damaged, or holds no plain weights of the experts.
    """
    rows = []
    with ExitStack() as stack:
        reader = stack.enter_context(CheckpointReader(folder))
        source = stack.enter_context(CheckpointReader(dense)) if dense else None
        for layer in range(origin.num_layers):
            progress("similarity of experts", layer, origin.num_layers)
            cosines = _cosines(_matrices(reader, source, origin, layer), origin, layer)
            rows.append({"layer": layer} | _row(cosines, origin.recipe.num_experts, dense is not None))
    progress("similarity of experts", origin.num_layers, origin.num_layers)
    return rows


Matrix = tuple[CheckpointReader, TensorInfo]


def _matrices(
    reader: CheckpointReader, source: CheckpointReader | None, origin: Origin, layer: int
) -> dict[str, list[Matrix]]:
    """Projection -> the matrices of a layer's experts, the dense one last."""
    found: dict[str, list[Matrix]] = {}
    for projection, dense_name in zip(PROJECTIONS, FFN, strict=True):
        pattern = origin.spec.experts[projection]
        names = [(reader, pattern.format(layer=layer, expert=e)) for e in range(origin.recipe.num_experts)]
        if source:
            names.append((source, f"model.layers.{layer}.{dense_name}"))
        pairs = [(file, file.tensors.get(name)) for file, name in names]
        matrices = [(file, info) for file, info in pairs if info is not None and info.dtype in DTYPES]
        shapes = {info.shape for _, info in matrices}
        units = {shape[-1 if projection == "down" else 0] for shape in shapes}
        if len(matrices) < len(names) or len(shapes) > 1 or units != {origin.num_units}:
            raise CheckpointError(f"layer {layer}: the files hold no plain {projection} weights of one shape")
        found[projection] = matrices
    return found


def _cosines(matrices: dict[str, list[Matrix]], origin: Origin, layer: int) -> dict[str, Tensor]:
    """Part -> cosine similarity (M, M); NaN where a part is empty."""
    M = len(matrices["gate"])
    # Inner products over all entries, over those kept in both, and the squared norm of the first over
    # the latter.
    total_MM, kept_MM, norm_MM = (torch.zeros(M, M, dtype=torch.float64) for _ in range(3))
    for projection, files in matrices.items():
        places = [_places(origin, layer, m) for m in range(M)]
        kept_MF = torch.ones(M, origin.num_units)
        for expert in range(origin.recipe.num_experts if origin.num_redrawn else 0):
            redrawn_F, order_F = origin.redrawn(layer, expert, projection), places[expert]
            kept_MF[expert] = (~(redrawn_F if order_F is None else redrawn_F[order_F])).float()
        R, C = files[0][1].shape
        step = max(1, _BLOCK // (M * C))
        for start in range(0, R, step):
            stop = min(R, start + step)
            block_MRC = torch.stack(
                [_read(*file, start, stop, place, projection) for file, place in zip(files, places, strict=True)]
            )
            total_MM += _inner(block_MRC)
            if not origin.num_redrawn:
                continue
            if projection == "down":
                kept_MU, squares_MU = kept_MF, block_MRC.square().sum(dim=1)
                block_MRC *= kept_MU[:, None, :]
            else:
                kept_MU, squares_MU = kept_MF[:, start:stop], block_MRC.square().sum(dim=2)
                block_MRC *= kept_MU[:, :, None]
            kept_MM += _inner(block_MRC)
            norm_MM += ((squares_MU * kept_MU) @ kept_MU.T).double()
    if not origin.num_redrawn:
        kept_MM, norm_MM = total_MM, total_MM.diagonal()[:, None].expand(M, M)
    rest_MM = total_MM.diagonal()[:, None] - norm_MM
    rest_MM[rest_MM <= 1e-6 * total_MM.diagonal()[:, None]] = 0  # nothing but rounding
    whole_MM = total_MM.diagonal()[:, None].expand(M, M)
    parts = ((total_MM, whole_MM), (kept_MM, norm_MM), (total_MM - kept_MM, rest_MM))
    return {
        name: (inner_MM / (of_MM * of_MM.T).sqrt()).clamp(-1, 1)
        for name, (inner_MM, of_MM) in zip(PARTS, parts, strict=True)
    }


def _places(origin: Origin, layer: int, expert: int) -> Tensor | None:
    """Dense unit -> its position in an expert; None where they are the same (as in the dense model)."""
    if expert == origin.recipe.num_experts:
        return None
    order_F = permutation(origin.recipe, layer, expert, origin.num_units)
    return None if order_F is None else order_F.argsort()


def _read(
    reader: CheckpointReader, info: TensorInfo, start: int, stop: int, place_F: Tensor | None, projection: str
) -> Tensor:
    """Rows [start, stop) of a matrix whose units are in the dense order."""
    C = info.shape[1]
    if place_F is None or projection == "down":
        block_RC = read_block(reader, info, start * C, (stop - start) * C, torch.float32).view(-1, C)
        return block_RC if place_F is None else block_RC[:, place_F]
    return torch.stack([read_block(reader, info, row * C, C, torch.float32) for row in place_F[start:stop].tolist()])


def _inner(block_MRC: Tensor) -> Tensor:
    flat = block_MRC.flatten(1)
    return (flat @ flat.T).double()


def _row(cosines: dict[str, Tensor], num_experts: int, with_dense: bool) -> dict[str, Any]:
    E = num_experts
    others_EE = ~torch.eye(E, dtype=torch.bool)
    between = {part: cosine_MM[:E, :E][others_EE].view(E, E - 1) for part, cosine_MM in cosines.items()}
    dense = {part: cosine_MM[:E, E:] for part, cosine_MM in cosines.items()}
    return {"between_experts": _summary(between), "with_dense": _summary(dense) if with_dense else None}


def _summary(values: dict[str, Tensor]) -> dict[str, Any]:
    """Of similarities (E, n) by part."""
    experts = zip(*(values[part].nanmean(dim=1).tolist() for part in PARTS), strict=True)
    every = values["all"][~values["all"].isnan()]
    return (
        {part: finite(values[part].nanmean().item()) for part in PARTS}
        | {"min": every.min().item() if len(every) else None, "max": every.max().item() if len(every) else None}
        | {"experts": [dict(zip(PARTS, map(finite, three), strict=True)) for three in experts]}
    )


def finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None
