"""What a tensor of the result is made from: fills, and where in the tensors they go."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moetool.arch.dense import ATTENTION, BIASES, EMBEDDING, FFN, NORM
from moetool.arch.spec import ArchSpec, dense_ffn
from moetool.checkpoint.reader import TensorInfo
from moetool.checkpoint.writer import TensorLayout
from moetool.recipe import PROJECTIONS, UpcycleRecipe

# Tensors are read, drawn and written in blocks of whole rows of about this many elements. It is part
# of the format: each block of drawn values has its own random stream. Larger ones are slower (they
# leave the processor's cache) and keep hundreds of megabytes in the allocator.
BLOCK_ELEMENTS = 1 << 18
NO_SINK = -10000.0  # the logit of an attention sink: its share is 0 in every dtype


@dataclass(frozen=True)
class Place:
    """A matrix in the result: a tensor, and the element of it at which the matrix begins."""

    tensor: str
    start: int = 0


@dataclass(frozen=True)
class Fill:
    """One kind of content and the places that get it.

    Attributes:
        kind: `carried` (the source's tensor), `expert` and `shared` (a matrix of its FFN), `router`
            (drawn), `normal` (drawn with mean 0 and standard deviation `value`) or `constant`
            (`value` everywhere).
        sources: the tensor in each donor; empty where nothing is read.
        places: one an expert where `kind` is `expert`; else one.
        dtype: of the result, as safetensors names it.
        shape: of the matrix in each place.
        layer: of a router or an FFN matrix.
        projection: gate, up or down for an FFN matrix, else None.
        value: see `kind`.
        zero_row: a row of a `normal` matrix that is zero (the padding token's embedding).
    """

    kind: str
    sources: tuple[TensorInfo, ...]
    places: tuple[Place, ...]
    dtype: str
    shape: tuple[int, ...]
    layer: int | None = None
    projection: str | None = None
    value: float = 0.0
    zero_row: int | None = None

    @property
    def row_length(self) -> int:
        """Elements in a row; a vector counts as rows of one."""
        return math.prod(self.shape[1:])

    @property
    def num_elements(self) -> int:
        """Of one place."""
        return math.prod(self.shape)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """First and one-past-last row of each block; a block of the source's rows is no larger."""
        rows = self.shape[0] if self.shape else 1
        longest = max([self.row_length, *(math.prod(info.shape[1:]) for info in self.sources)])
        step = max(1, BLOCK_ELEMENTS // max(1, longest))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)] if self.row_length else []


def natural(name: str) -> list[Any]:
    """A sort key that puts layer 2 before layer 10, and the tensors outside layers around them."""
    place = 0 if name.startswith("model.embed") else 1 if ".layers." in name else 2
    return [place, *(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))]


_FFN_NAME = re.compile(r"^model\.layers\.(\d+)\.(mlp\.\w+\.weight)$")


def lay_out(
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
    for name in sorted(donors[0], key=natural):
        sources = tuple(donor[name] for donor in donors)
        info = sources[0]
        dtype = info.dtype if recipe.dtype == "auto" else recipe.dtype
        match = _FFN_NAME.match(name)
        if not match or int(match[1]) not in moe:
            add(Fill("carried", sources, (Place(name),), dtype, info.shape))
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
        add(Fill("expert", sources, places, dtype, shape, layer, projection), whole)
        # Families that have one unless told otherwise write it at size zero as well.
        if spec.shared and (recipe.shared_experts or spec.shared.default):
            size = units * (recipe.shared_experts or 0)
            shape = (hidden, size) if projection == "down" else (size, hidden)
            together = [p for p in PROJECTIONS if spec.shared.tensors[p] == spec.shared.tensors[projection]]
            start = together.index(projection) * size * hidden
            place = Place(spec.shared.tensors[projection].format(layer=layer), start)
            fill = Fill("shared", sources, (place,), dtype, shape, layer, projection)
            add(fill, (len(together) * shape[0], shape[1]))
    if recipe.method == "scratch":
        fills = [_from_scratch(fill, spec, dense) for fill in fills]
    return fills, list(tensors.values())


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
        fills.append(Fill("constant", (), (Place(spec.selection_bias.format(layer=layer)),), "F32", shape, layer))
    if spec.shared and spec.shared.gate:
        fills.append(Fill("constant", (), (Place(spec.shared.gate.format(layer=layer)),), dtype, (1, hidden), layer))
    return fills


def _expert_places(
    spec: ArchSpec, recipe: UpcycleRecipe, layer: int, projection: str, shape: tuple[int, int]
) -> tuple[tuple[Place, ...], tuple[int, ...]]:
    """Where the experts' matrices go, and the shape of the tensor that they go to."""
    places = tuple(
        Place(*spec.expert_place(projection, layer, expert, shape[0] * shape[1]))
        for expert in range(recipe.num_experts)
    )
    if not spec.fused:
        return places, shape
    together = sum(name == spec.experts[projection] for name in spec.experts.values())
    return places, (recipe.num_experts, together * shape[0], shape[1])


def _from_scratch(fill: Fill, spec: ArchSpec, dense: Mapping[str, Any]) -> Fill:
    """The same tensor as transformers initialises it: norms 1, biases 0, all else normal."""
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
