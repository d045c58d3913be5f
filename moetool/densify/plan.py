"""A dense model as a plan: checks everything, writes nothing.

Shapes: k experts that are kept, I units of one, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch

from moetool.arch.dense import LM_HEAD
from moetool.arch.moe_source import MoESource
from moetool.arch.spec import dense_ffn
from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.reader import CheckpointReader
from moetool.checkpoint.shard import TensorLayout
from moetool.densify.twin import dense_config_of, twin
from moetool.errors import CheckpointError, ConfigError
from moetool.lineage import read_experts, recorded_experts
from moetool.outside import fits
from moetool.surgery.experts import carried_whole, open_moe, own_tensors
from moetool.surgery.fill import Fill, Piece, Place, natural
from moetool.surgery.kinds import KINDS, Block, Kind
from moetool.surgery.plan import Operation, Plan, lay_out


@dataclass(frozen=True)
class LayerParts:
    """The experts that form the FFN of a layer, and their weights.

    Attributes:
        experts: that are kept, ascending.
        weights: of each, what its output is multiplied with.
        shared: the same of the shared expert; None where there is none.
    """

    experts: Sequence[int]
    weights: Sequence[float]
    shared: float | None


def plan_dense(
    readers: Sequence[CheckpointReader], recipe: Mapping[str, Any], parts: Mapping[int, LayerParts], max_shard_size: int
) -> Plan:
    """Lay out a dense model whose FFNs are the experts of a Mixture of Experts side by side.

    sum_j c_j f_j(x) with constant c_j is one FFN: rows of gate and up one below the other, columns of down side by
    side, those of expert j times c_j.

    Args:
        readers: the checkpoint.
        recipe: of the command, as JSON.
        parts: layer -> what its FFN is made of.
        max_shard_size: bytes of tensor data per file.

    Raises:
        ConfigError: the family has no dense twin, or layers differ in their width.
        CheckpointError: the source is damaged, or `parts` are not of it.
    """
    (reader,) = readers
    source = open_moe(reader, "densified")
    family = check_source(source)
    if tuple(parts) != source.layers or len({len(one.experts) for one in parts.values()}) != 1:
        raise CheckpointError(f"the experts to keep are not those of the layers of {reader.folder}")
    if any((part.shared is None) != (source.shared(layer, "gate") is None) for layer, part in parts.items()):
        raise CheckpointError(f"the weights of shared experts are not those of {reader.folder}")
    fills: list[Fill] = []
    layouts: dict[str, TensorLayout] = {}
    ffn = {*own_tensors(source), *_shared_names(source)}
    tied = reader.config.get("tie_word_embeddings")
    for name, info in source.tensors.items():
        if name not in ffn and not (tied and name == LM_HEAD):
            fill, layouts[name] = carried_whole(name, info)
            fills.append(fill)
    units = 0
    scales: dict[str, tuple[float, ...]] = {}
    for layer, part in parts.items():
        for projection, name in dense_ffn(layer).items():
            infos = [source.expert(layer, expert, projection) for expert in part.experts]
            shared = source.shared(layer, projection) if part.shared is not None else None
            infos += [shared] if shared else []
            fill, layout = _joined_fill(name, infos, layer, projection)
            scales[name] = (*part.weights, *([part.shared] if part.shared is not None else []))
            fills.append(fill)
            layouts[name] = layout
            units = layout.shape[1 if projection == "down" else 0]
    fills.sort(key=lambda fill: natural(fill.places[0].tensor))
    kinds = {**KINDS, "stacked": Kind(_stacked), "side by side": Kind(partial(_side_by_side, scales))}
    made = {
        "experts": recorded_experts(source.layers, [part.experts for part in parts.values()]),
        "weights": [list(part.weights) for part in parts.values()],
        "shared": [part.shared for part in parts.values()],
    }
    tensors = [layouts[name] for name in sorted(layouts, key=natural)]
    return lay_out(
        "densify", {**recipe, **made}, readers, dense_config_of(reader.config, family, units), fills, tensors,
        max_shard_size, kinds, [str(reader.config.get("model_type"))], continues=1,
    )  # fmt: skip


def check_source(source: MoESource) -> str:
    """The dense family that a Mixture of Experts can become.

    Raises:
        ConfigError: there is none, or some of its layers are dense already.
    """
    family = twin(source.reader.config, source.spec)
    layers = source.reader.config.get("num_hidden_layers")
    if source.layers != tuple(range(layers if type(layers) is int else 0)):
        raise ConfigError(
            f"{source.reader.folder} has experts in layers {source.layers[0]} to {source.layers[-1]} of {layers} only;"
            " a dense model has one width in all layers, so it cannot be densified"
        )
    return family


def _shared_names(source: MoESource) -> list[str]:
    shared = source.spec.shared
    names = [*(shared.tensors.values() if shared else ()), *([shared.gate] if shared and shared.gate else [])]
    return [name.format(layer=layer) for name in names for layer in source.layers]


def _joined_fill(name: str, infos: Sequence[TensorInfo], layer: int, projection: str) -> tuple[Fill, TensorLayout]:
    axis = 1 if projection == "down" else 0
    dtypes = {info.dtype for info in infos}
    if len(dtypes) != 1:
        raise ConfigError(f"layer {layer}: experts have weights in {' and '.join(sorted(dtypes))}; convert them first")
    sizes, other = [info.shape[axis] for info in infos], infos[0].shape[1 - axis]
    shape = (other, sum(sizes)) if axis else (sum(sizes), other)
    kind = "side by side" if axis else "stacked"
    fill = Fill(kind, tuple(Piece(0, info) for info in infos), (Place(name),), infos[0].dtype, shape, layer, projection)
    return fill, TensorLayout(name, infos[0].dtype, shape)


def _stacked(block: Block) -> torch.Tensor:
    """Rows of the sources, one below the other."""
    rows, first = [], 0
    for piece in block.fill.sources:
        start, stop = (min(max(row - first, 0), piece.info.shape[0]) for row in (block.start, block.stop))
        if start < stop:
            rows.append(block.rows(piece, start, stop))
        first += piece.info.shape[0]
    return torch.cat(rows)


def _side_by_side(scales: Mapping[str, Sequence[float]], block: Block) -> torch.Tensor:
    """Rows of the sources, side by side, each times its scale in fp64, rounded once to fp32 and then to the dtype."""
    parts = [
        block.rows(piece, block.start, block.stop).double().mul_(scale).to(block.dtype)
        for piece, scale in zip(block.fill.sources, scales[block.place.tensor], strict=True)
    ]
    return torch.cat(parts, dim=1)


def replan(readers: Sequence[CheckpointReader], entry: Mapping[str, Any], max_shard_size: int) -> Plan:
    """The plan that a lineage entry records.

    Raises:
        CheckpointError: the entry is damaged, or see `plan_dense`.
        ConfigError: see `plan_dense`.
    """
    found = entry.get("recipe", {})
    kept = read_experts(found.get("experts"), open_moe(readers[0], "densified").num_experts)
    weights, shared = found.get("weights"), found.get("shared")
    sound = fits(weights, [[float]]) and fits(shared, [(float, type(None))])
    numbers = [*chain.from_iterable(weights), *(one for one in shared if one is not None)] if sound else []
    if not sound or {len(weights), len(shared)} != {len(kept)} or not all(map(math.isfinite, numbers)):
        raise CheckpointError(f"moetool.json: the weights of an entry cannot be read ({str(weights)[:100]})")
    parts = {
        layer: LayerParts(experts, one, other)
        for (layer, experts), one, other in zip(kept.items(), weights, shared, strict=True)
    }
    if any(len(part.experts) != len(part.weights) for part in parts.values()):
        raise CheckpointError("moetool.json: an entry has not one weight for each expert")
    recipe = {key: value for key, value in found.items() if key not in ("experts", "weights", "shared")}
    return plan_dense(readers, recipe, parts, max_shard_size)


OPERATION = Operation("densified", replan, one_source=True)
