"""The weights of merged experts: how they are planned, and how a block is computed.

Shapes: F intermediate units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from moetool.arch.moe_source import MoESource
from moetool.prune.align import Order, order_digest
from moetool.prune.group import Group
from moetool.surgery.fill import Fill, Piece
from moetool.surgery.kinds import Block
from moetool.surgery.rows import gather_rows, select


@dataclass(frozen=True)
class Blend:
    """The members of one merged expert, and their weights.

    Attributes:
        group: the experts and their weights.
        orders: (F,) of each expert but the first: for each unit of the first, the one that corresponds.
    """

    group: Group
    orders: Sequence[Tensor]


# (layer, expert of the result) -> what it is made of; experts that are only kept are not there.
Blends = Mapping[tuple[int, int], Blend]


def blends(groups: Mapping[int, Sequence[Group]], kept: Mapping[int, Sequence[int]], order: Order) -> Blends:
    """Merged experts by their place in the result.

    Args:
        groups: layer -> experts that become one.
        kept: layer -> experts, ascending.
        order: of the experts' units.

    Raises:
        CheckpointError: an expert is not there, or differs in its shape.
    """
    found = {}
    for layer, those in groups.items():
        for group in those:
            first, *others = group.experts
            orders = [order(layer, first, other) for other in others]
            found[layer, list(kept[layer]).index(first)] = Blend(group, orders)
    return found


def merged_fill(fill: Fill, merged: Blends, source: MoESource) -> Fill:
    """A fill of the result without merges, as it is with them."""
    if fill.layer is None or fill.projection is None or (fill.layer, fill.places[0].expert) not in merged:
        return fill
    _, *others = merged[fill.layer, fill.places[0].expert].group.experts
    pieces = (Piece(0, source.expert(fill.layer, other, fill.projection)) for other in others)
    return replace(fill, kind="merged", sources=(*fill.sources, *pieces))


def weighted_mean(merged: Blends, block: Block) -> Tensor:
    """Rows of a merged expert: c + sum_j w_j (e_j - c), c the first and e_j the others in the order of its units.

    In fp64, expert by expert, so that the bits are the same on any machine, and rounded once. Equal experts give
    themselves exactly.
    """
    assert block.fill.layer is not None
    blend = merged[block.fill.layer, block.place.expert]
    first, *others = block.fill.sources
    first_rows = block.rows(first, block.start, block.stop).double()
    total = first_rows.clone()
    for piece, weight, order_F in zip(others, blend.group.weights[1:], blend.orders, strict=True):
        if block.fill.axis == 0:
            rows = gather_rows(block.readers[piece.source], piece.info, order_F[block.start : block.stop])
        else:
            rows = select(block.rows(piece, block.start, block.stop), 1, order_F)
        total += (rows.double() - first_rows).mul_(weight)  # two roundings: a fused one is not in all processors
    return total.to(block.dtype)


def digests(groups: Mapping[int, Sequence[Group]], merged: Blends) -> dict[str, Any]:
    """For the lineage: a checksum of the orders of units of each merged expert."""
    of = {(layer, blend.group.experts[0]): order_digest(blend.orders) for (layer, _), blend in merged.items()}
    return {"unit_orders": [[of[layer, group.experts[0]] for group in those] for layer, those in groups.items()]}
