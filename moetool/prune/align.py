"""Which unit of one expert corresponds to which unit of another.

The units of an FFN can be in any order, so a mean of two experts is taken between units that correspond. Which those
are follows from the weights alone, and from nothing that differs between machines: a proof finds the same again.

Shapes: F intermediate units, D hidden.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

from moetool.arch.moe_source import MoESource
from moetool.errors import CheckpointError
from moetool.recipe import PROJECTIONS
from moetool.surgery.rows import read_rows

# (layer, expert, another) -> (F,): for each unit of the expert, the position of the other's unit that corresponds.
Order = Callable[[int, int, int], Tensor]

BITS = 14  # of a weight that is rounded: sums of products stay below 2^53, where float64 is exact
COLUMNS = 512  # of a matrix that are multiplied at once


def unit_orders(source: MoESource) -> Order:
    """The order of units of any expert beside another one, each found once.

    Two experts are in memory at a time, and a matrix of F x F in float64.

    Args:
        source: of the experts; its files are read.
    """

    @cache
    def order(layer: int, expert: int, other: int) -> Tensor:
        ours, others = ([_matrix(source, layer, e, name) for name in PROJECTIONS] for e in (expert, other))
        if [one.shape for one in ours] != [one.shape for one in others]:
            raise CheckpointError(
                f"{source.reader.folder}: experts {expert} and {other} of layer {layer} differ in their shapes"
            )
        return align(ours, others)

    return order


def _matrix(source: MoESource, layer: int, expert: int, projection: str) -> Tensor:
    info = source.expert(layer, expert, projection)
    return read_rows(source.reader, info, 0, info.shape[0])


def align(ours: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """The order of another expert's units in which its weights lie nearest to ours (least sum of squares).

    That is the assignment with the largest sum of inner products of units, over gate, up and down (Li et al. 2024,
    MC-SMoE, arXiv 2310.01334). Weights are rounded to integers of BITS bits, so the products are exact in any order of
    summation, and so is what the assignment adds up.

    Args:
        ours: gate (F, D), up (F, D) and down (D, F) of an expert.
        others: of the other one.

    Returns:
        (F,) int64: for each of our units, the position of the other's.
    """
    from scipy.optimize import linear_sum_assignment

    largest = max(float(matrix.abs().max()) for matrix in (*ours, *others))
    scale = 2.0 ** min(1000, BITS - math.frexp(largest)[1])  # a power of 2: only the rounding loses anything
    units = ours[0].shape[0]
    cost_FF = torch.zeros(units, units, dtype=torch.float64)
    for projection, one, other in zip(PROJECTIONS, ours, others, strict=True):
        pair = (one.T, other.T) if projection == "down" else (one, other)
        for start in range(0, pair[0].shape[1], COLUMNS):
            left_FC, right_FC = (m[:, start : start + COLUMNS].double().mul_(scale).round_() for m in pair)
            cost_FF.addmm_(left_FC, right_FC.T, alpha=-1)
    return torch.from_numpy(linear_sum_assignment(cost_FF.numpy())[1]).long()


def order_digest(orders: Iterable[Tensor]) -> str:
    """A checksum of orders of units: 16 hexadecimal digits of SHA-256."""
    digest = hashlib.sha256()
    for order_F in orders:
        digest.update(order_F.numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]
