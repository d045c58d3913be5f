"""Kinds of content: how a block of a fill is made, and which part of it is drawn.

`KINDS` has those that every operation shares. An operation adds its own to them in its plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from moetool.checkpoint.reader import BlockFile
from moetool.surgery.fill import Fill, Piece, Place
from moetool.surgery.moments import Sums
from moetool.surgery.rows import TORCH_DTYPES, read_rows


class EntrySums(NamedTuple):
    """Sum of the entries of each unit of a piece, and of their squares: float64 (units,)."""

    sums: torch.Tensor
    squares: torch.Tensor


class Cache:
    """The last block under each key: destinations that share rows come one after another."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[object, torch.Tensor]] = {}

    def get(self, key: str, of: object, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The block under a key, made unless the last one was `of` the same."""
        if key not in self._last or self._last[key][0] != of:
            self._last.pop(key, None)  # before the next one is made: memory holds one
            self._last[key] = (of, make())
        return self._last[key][1]


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of one destination, and the inputs to make them.

    Attributes:
        fill: that they belong to.
        place: the destination.
        index: of the block in the fill.
        start: the first row.
        stop: one past the last row.
        readers: the sources.
        sums: of the pieces of fills that are `summed`; empty in a proof.
        cache: of all destinations of this block of the fill.
    """

    fill: Fill
    place: Place
    index: int
    start: int
    stop: int
    readers: Sequence[BlockFile]
    sums: Mapping[Piece, EntrySums] = field(default_factory=dict)
    cache: Cache = field(default_factory=Cache)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the result."""
        return TORCH_DTYPES[self.fill.dtype]

    def rows(self, piece: Piece, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a source."""
        reader = self.readers[piece.source]
        return self.cache.get("rows", (piece, start, stop), lambda: read_rows(reader, piece.info, start, stop))


@dataclass(frozen=True)
class Drawn:
    """The units of one matrix that are drawn, as its proof needs to know them.

    Attributes:
        units: positions on the fill's axis, ascending.
        moments: (units before, matrix before if `whole`) -> mean and standard deviation of what is drawn.
        added: whether it is added to what was there; else it replaces that.
        whole: whether the moments follow from the whole matrix, too.
    """

    units: torch.Tensor
    moments: Callable[[Sums, Sums], tuple[float, float]]
    added: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Kind:
    """How one kind of content is made.

    Attributes:
        kept: a block before anything in it is drawn, in the target's dtype. The proof makes it again and
            compares bit for bit, except for the units that `drawn` names.
        draw: what is written, given the kept block; None where that is written as it is.
        drawn: which units of a place are drawn; None where none are.
    """

    kept: Callable[[Block], torch.Tensor]
    draw: Callable[[Block, torch.Tensor], torch.Tensor] | None = None
    drawn: Callable[[Fill, Place], Drawn | None] | None = None

    def make(self, block: Block) -> torch.Tensor:
        """The block as it is written."""
        kept = self.kept(block)
        return self.draw(block, kept) if self.draw else kept


def carried(block: Block) -> torch.Tensor:
    """A tensor of the source; of several sources, the mean in fp32, rounded once."""
    first, *others = (block.rows(piece, block.start, block.stop) for piece in block.fill.sources)
    if not others:
        return first.to(block.dtype)
    total = first.float().clone()
    for other in others:
        total += other.float()
    return (total / len(block.fill.sources)).to(block.dtype)


def constant(block: Block) -> torch.Tensor:
    """The fill's value everywhere."""
    return torch.full((block.stop - block.start, block.fill.row_length), block.fill.value, dtype=block.dtype)


KINDS: Mapping[str, Kind] = {"carried": Kind(carried), "constant": Kind(constant)}
