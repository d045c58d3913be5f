"""A Mixture of Experts with some experts removed or copied, and everything else unchanged.

Shapes: E experts before, N after, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moetool.arch.moe_source import NUM_EXPERTS, TOP_K, MoESource, moe_source
from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.reader import CheckpointReader
from moetool.checkpoint.shard import TensorLayout
from moetool.errors import CheckpointError, ConfigError
from moetool.recipe import PROJECTIONS
from moetool.surgery.fill import Fill, Piece, Place, as_matrix, natural

_OF_EXPERTS = re.compile(r"\.experts\.")


def open_moe(reader: CheckpointReader, what: str) -> MoESource:
    """The experts of a checkpoint that a command is to change.

    Args:
        reader: of the checkpoint.
        what: the command does to it, such as `grown`.

    Raises:
        ConfigError: it is dense, quantised, multimodal, or of a family that moetool does not know.
        CheckpointError: its experts, routers or selection biases are not where its family has them.
    """
    folder, model_type = reader.folder, str(reader.config.get("model_type"))[:60]
    if reader.config.get("quantization_config"):
        raise ConfigError(f"{folder} is quantised; give the unquantised model that it was made from")
    if isinstance(reader.config.get("text_config"), dict):
        raise ConfigError(f"{folder} is multimodal; take the text model out first: moetool convert {folder} OUT")
    source = moe_source(reader)
    if source is None:
        raise ConfigError(f"a {model_type} cannot be {what}: it is dense, or of a family that moetool does not know")
    if not source.layers:
        raise CheckpointError(f"{folder} holds no experts under the names of a {model_type}; fetch it again")
    known = set(own_tensors(source))
    for name in source.tensors:
        if _OF_EXPERTS.search(name) and name not in known:
            raise CheckpointError(f"{folder}: tensor {name[:100]} belongs to experts, and a {model_type} has none such")
    for layer in source.layers:
        if len(source.router(layer).shape) != 2 or source.router(layer).shape[0] != source.num_experts:
            raise CheckpointError(
                f"{folder}: the router of layer {layer} has shape {list(source.router(layer).shape)}, but config.json"
                f" says {source.num_experts} experts"
            )
        bias = source.selection_bias(layer)
        if bias and bias.num_elements != source.num_experts:
            raise CheckpointError(
                f"{folder}: the selection bias of layer {layer} has {bias.num_elements} entries, but config.json says"
                f" {source.num_experts} experts"
            )
    return source


def own_tensors(source: MoESource) -> list[str]:
    """The names of all routers, selection biases and experts of a checkpoint."""
    spec, found = source.spec, []
    experts = range(1 if spec.fused else source.num_experts)
    for layer in source.layers:
        found += [name.format(layer=layer) for name in (spec.router, spec.selection_bias) if name]
        found += [name.format(layer=layer, expert=e) for name in spec.experts.values() for e in experts]
    return found


def config_with(config: Mapping[str, Any], source: MoESource, num_experts: int, top_k: int) -> dict[str, Any]:
    """config.json with other numbers of experts, under each name and in each form that it has them."""
    changed = dict(config)
    for key, value in config.items():
        ours = source.spec.keys.get(key, key)
        for keys, own, before, after in (
            (NUM_EXPERTS, source.spec.num_experts_key, source.num_experts, num_experts),
            (TOP_K, source.spec.top_k_key, source.top_k, top_k),
        ):
            if ours == own or (key in keys and value == before):
                changed[key] = [after] * len(value) if isinstance(value, list) else after
    return changed


def with_experts(
    source: MoESource, experts: Mapping[int, Sequence[int]], bias: Mapping[str, Sequence[Fill]] | None = None
) -> tuple[list[Fill], list[TensorLayout]]:
    """Fills of a checkpoint whose experts are some of a source's, in the source's layout.

    Args:
        source: of the experts.
        experts: layer -> for each expert of the result, the expert that it is a copy of.
        bias: tensor -> the fills of a selection bias that is not simply copied.
    """
    fills: list[Fill] = []
    layouts: dict[str, TensorLayout] = {}
    own = set(own_tensors(source))
    for name, info in source.tensors.items():
        if name not in own:
            fill, layouts[name] = carried_whole(name, info)
            fills.append(fill)
    for layer, chosen in experts.items():
        for made, layout in (
            *(_matrices(source, layer, chosen, projection) for projection in PROJECTIONS),
            _rows(source.router(layer), source.spec.router.format(layer=layer), chosen),
            *_biases(source, layer, chosen, bias or {}),
        ):
            fills += made
            layouts |= {one.name: one for one in layout}
    fills.sort(key=lambda fill: natural(fill.places[0].tensor))
    return fills, [layouts[name] for name in sorted(layouts, key=natural)]


def carried_whole(name: str, info: TensorInfo) -> tuple[Fill, TensorLayout]:
    """A tensor of the source as it is."""
    matrix = as_matrix(info)
    fill = Fill("carried", (Piece(0, matrix),), (Place(name),), info.dtype, matrix.shape)
    return fill, TensorLayout(name, info.dtype, info.shape)


def copies(chosen: Sequence[int]) -> dict[int, list[int]]:
    """Expert before -> the experts after that are copies of it."""
    found: dict[int, list[int]] = {}
    for after, before in enumerate(chosen):
        found.setdefault(before, []).append(after)
    return found


def _matrices(
    source: MoESource, layer: int, chosen: Sequence[int], projection: str
) -> tuple[list[Fill], list[TensorLayout]]:
    spec, fills, layouts = source.spec, [], []
    together = sum(name == spec.experts[projection] for name in spec.experts.values())
    for before, those in copies(chosen).items():
        info = source.expert(layer, before, projection)
        places = []
        for after in those:
            name, start = spec.expert_place(projection, layer, after, info.num_elements)
            rows, columns = info.shape
            shape = (len(chosen), together * rows, columns) if spec.fused else info.shape
            places.append(Place(name, start, after))
            layouts.append(TensorLayout(name, info.dtype, shape))
        fills.append(Fill("carried", (Piece(0, info),), tuple(places), info.dtype, info.shape, layer, projection))
    return fills, layouts


def _rows(info: TensorInfo, name: str, chosen: Sequence[int]) -> tuple[list[Fill], list[TensorLayout]]:
    """A tensor with a row for each expert."""
    return row_fills(info, name, copies(chosen)), [TensorLayout(name, info.dtype, (len(chosen), *info.shape[1:]))]


def row_fills(info: TensorInfo, name: str, rows: Mapping[int, Sequence[int]], **more: Any) -> list[Fill]:
    """Fills that copy rows of a tensor of E rows (or entries, of a vector or a matrix of one row).

    Args:
        info: the tensor before.
        name: the tensor after.
        rows: before -> after.
        more: of each `Fill`.
    """
    num_rows = info.num_elements if 1 in (len(info.shape), info.shape[0]) else info.shape[0]
    length, size = info.num_elements // num_rows, info.size // num_rows
    return [
        Fill(
            **{"kind": "carried", "dtype": info.dtype} | more,
            sources=(Piece(0, replace(info, shape=(1, length), start=info.start + before * size, size=size)),),
            places=tuple(Place(name, after * length, after) for after in those),
            shape=(1, length),
        )
        for before, those in rows.items()
    ]


def _biases(
    source: MoESource, layer: int, chosen: Sequence[int], others: Mapping[str, Sequence[Fill]]
) -> list[tuple[list[Fill], list[TensorLayout]]]:
    info = source.selection_bias(layer)
    if info is None:
        return []
    assert source.spec.selection_bias
    name = source.spec.selection_bias.format(layer=layer)
    fills = list(others.get(name) or row_fills(info, name, copies(chosen)))
    return [(fills, [TensorLayout(name, fills[0].dtype, (*info.shape[:-1], len(chosen)))])]
