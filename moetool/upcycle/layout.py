"""The fills of an upcycling: the sources of each tensor of the result."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moetool.arch.dense import ATTENTION, BIASES, EMBEDDING, FFN, LM_HEAD, NORM
from moetool.arch.spec import ArchSpec, dense_ffn, routed_factor, scales
from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.shard import TensorLayout
from moetool.recipe import PROJECTIONS, UpcycleRecipe, matrix_index
from moetool.surgery.fill import Fill, Piece, Place, natural

NO_SINK = -10000.0  # the logit of an attention sink: its share is 0 in every dtype
_FFN_NAME = re.compile(r"^model\.layers\.(\d+)\.(mlp\.\w+\.weight)$")


def fills_of(
    donors: Sequence[Mapping[str, TensorInfo]],
    spec: ArchSpec,
    recipe: UpcycleRecipe,
    dense: Mapping[str, Any],
    moe: frozenset[int],
) -> tuple[list[Fill], list[TensorLayout]]:
    """Fills, in the order in which they lie on disk, and the tensors that they fill.

    Args:
        donors: the checked tensors of each dense model, the same names in each.
        spec: the family to write.
        recipe: with `shared_experts` a number.
        dense: the filled dense config.
        moe: the layers that are MoE.
    """
    tensors: dict[str, TensorLayout] = {}
    fills: list[Fill] = []

    def add(fill: Fill, shape: tuple[int, ...] | None = None) -> None:
        fills.append(fill)
        for place in fill.places:
            tensors.setdefault(place.tensor, TensorLayout(place.tensor, fill.dtype, shape or fill.shape))

    hidden, units = dense["hidden_size"], dense["intermediate_size"] // recipe.granularity
    shares = recipe.trunk_shares
    for name in sorted(donors[0], key=natural):
        info = donors[0][name]
        sources = tuple(Piece(number, donor[name]) for number, donor in enumerate(donors))
        trunk = tuple(piece for piece in sources if shares[piece.source])
        dtype = info.dtype if recipe.dtype == "auto" else recipe.dtype
        match = _FFN_NAME.match(name)
        if not match or int(match[1]) not in moe:
            kind = "weighted" if recipe.donor_weights and len(trunk) > 1 else "carried"
            add(Fill(kind, trunk, (Place(name),), dtype, info.shape))
            bias = _missing_bias(name, donors[0], spec)
            if bias:
                add(Fill("constant", (), (Place(bias),), dtype, info.shape[:1]))
            sinks = name.removesuffix(next(iter(ATTENTION))) + str(spec.sinks)
            if spec.sinks and name.endswith(next(iter(ATTENTION))) and sinks not in donors[0]:
                add(Fill("constant", (), (Place(sinks),), dtype, (dense["num_attention_heads"],), value=NO_SINK))
            continue
        layer, projection = int(match[1]), PROJECTIONS[list(FFN).index(match[2])]
        if recipe.dtype == "auto":  # matrices that share a tensor have one dtype, which holds both
            dense_names = dense_ffn(layer)
            together = [p for p in PROJECTIONS if spec.experts[p] == spec.experts[projection]]
            dtypes = {donors[0][dense_names[p]].dtype for p in together}
            dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        if projection == "down":  # the first of the three in natural order: the router goes before the experts
            for fill in _beside_experts(spec, recipe, layer, hidden, dtype):
                add(fill)
        shape = (hidden, units) if projection == "down" else (units, hidden)
        places, whole = _expert_places(spec, recipe, layer, projection, shape)
        # Only down-projections carry a factor: the FFN is linear in down (and in up), not in gate, because SiLU
        # is not homogeneous.
        factors = (scales(recipe, spec)[1], routed_factor(recipe, spec)) if projection == "down" else (1.0, 1.0)
        summed = bool(recipe.num_redrawn(units, layer))
        add(Fill("expert", sources, places, dtype, shape, layer, projection, factors[1], summed=summed), whole)
        # Families that have one unless told otherwise write it at size zero as well.
        if spec.shared and (recipe.shared_experts or spec.shared.default):
            size = units * (recipe.shared_experts or 0)
            shape = (hidden, size) if projection == "down" else (size, hidden)
            together = [p for p in PROJECTIONS if spec.shared.tensors[p] == spec.shared.tensors[projection]]
            start = together.index(projection) * size * hidden
            place = Place(spec.shared.tensors[projection].format(layer=layer), start)
            fill = Fill("shared", trunk, (place,), dtype, shape, layer, projection, factors[0])
            add(fill, (len(together) * shape[0], shape[1]))
    fills = _from_scratch(fills, spec, dense) if recipe.method == "scratch" else _numbered(fills, recipe, units)
    return fills, list(tensors.values())


def with_head(tensors: Mapping[str, TensorInfo], spec: ArchSpec) -> Mapping[str, TensorInfo]:
    """With a head of their own, where the family never ties it to the embedding."""
    return tensors if spec.ties else {LM_HEAD: tensors[EMBEDDING], **tensors}


def _missing_bias(name: str, tensors: Mapping[str, TensorInfo], spec: ArchSpec) -> str | None:
    """The bias of a weight, where the family always has one and the source has none."""
    for projection, weight in zip(BIASES, ATTENTION, strict=True):
        if projection in spec.zero_biases and name.endswith(f".{weight}"):
            bias = name.removesuffix(weight) + BIASES[projection][0]
            return None if bias in tensors else bias
    return None


def _beside_experts(spec: ArchSpec, recipe: UpcycleRecipe, layer: int, hidden: int, dtype: str) -> list[Fill]:
    """The router, and what some families have beside it: a selection bias, the shared expert's gate."""
    experts = recipe.num_experts
    router = Place(spec.router.format(layer=layer))
    fills = [Fill("router", (), (router,), spec.router_dtype or dtype, (experts, hidden), layer)]
    if spec.selection_bias:
        shape = (1, experts) if spec.selection_bias_is_matrix else (experts,)
        place = Place(spec.selection_bias.format(layer=layer))
        fills.append(Fill("selection bias", (), (place,), "F32", shape, layer))
    if spec.shared and spec.shared.gate:
        fills.append(Fill("constant", (), (Place(spec.shared.gate.format(layer=layer)),), dtype, (1, hidden), layer))
    return fills


def _expert_places(
    spec: ArchSpec, recipe: UpcycleRecipe, layer: int, projection: str, shape: tuple[int, int]
) -> tuple[tuple[Place, ...], tuple[int, ...]]:
    """Where the experts' matrices go, and the shape of the tensor that they go to."""
    places = tuple(
        Place(*spec.expert_place(projection, layer, expert, shape[0] * shape[1]), expert)
        for expert in range(recipe.num_experts)
    )
    if not spec.fused:
        return places, shape
    together = sum(name == spec.experts[projection] for name in spec.experts.values())
    return places, (recipe.num_experts, together * shape[0], shape[1])


def _numbered(fills: Sequence[Fill], recipe: UpcycleRecipe, units: int) -> list[Fill]:
    """Give each matrix of each expert its own random streams, and put those side by side that read the same rows."""

    def origin(place: Place) -> tuple[int, int]:
        return recipe.donor(place.expert), recipe.first_unit(place.expert, units)

    def numbered(fill: Fill, place: Place) -> Place:
        assert fill.layer is not None
        assert fill.projection is not None
        return replace(place, draw=most * matrix_index(recipe, fill.layer, place.expert, fill.projection))

    # Streams per matrix: the blocks of the one that has most.
    most = max(fill.num_blocks for fill in fills if fill.kind == "expert")
    return [
        replace(fill, places=tuple(numbered(fill, place) for place in sorted(fill.places, key=origin)))
        if fill.kind == "expert"
        else fill
        for fill in fills
    ]


def _from_scratch(fills: Sequence[Fill], spec: ArchSpec, dense: Mapping[str, Any]) -> list[Fill]:
    """The same tensors as transformers initialises them: norms 1, biases 0, all else normal."""
    made, draw = [], 0
    for fill in fills:
        drawn = _begin(fill, spec, dense)
        if drawn.kind == "normal":  # each block of the result has its own random stream
            blocks = len(drawn.blocks)
            places = (replace(place, draw=draw + n * blocks) for n, place in enumerate(drawn.places))
            drawn = replace(drawn, places=tuple(places))
            draw += len(drawn.places) * blocks
        made.append(drawn)
    return made


def _begin(fill: Fill, spec: ArchSpec, dense: Mapping[str, Any]) -> Fill:
    name = fill.places[0].tensor
    if spec.selection_bias and name == spec.selection_bias.format(layer=fill.layer):
        return fill
    if name.endswith(".bias"):
        return replace(fill, kind="constant", sources=(), value=0.0)
    if name == NORM or name.endswith("norm.weight"):
        return replace(fill, kind="constant", sources=(), value=1.0)
    padding = dense["pad_token_id"]
    zero_row = padding if name == EMBEDDING and type(padding) is int and 0 <= padding < fill.shape[0] else None
    std = float(dense["initializer_range"] or 0.02)
    return replace(fill, kind="normal", sources=(), value=std, zero_row=zero_row)
