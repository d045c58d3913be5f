"""The fills of a rewritten checkpoint: each pairs one kind of content with its destinations."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moetool.checkpoint.header import TensorInfo

# Tensors are read, drawn and written in blocks of whole rows of about this many elements. It is part
# of the format: each block of drawn values has its own random stream. Larger ones are slower (they
# leave the processor's cache) and keep hundreds of megabytes in the allocator.
BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Piece:
    """A matrix of a source: a tensor, or rows of one, such as one expert's rows of a fused tensor.

    Attributes:
        source: the checkpoint's number among the sources.
        info: its rows; they lie one after another in the file, so a part of a tensor is a tensor that starts later.
    """

    source: int
    info: TensorInfo


@dataclass(frozen=True)
class Place:
    """A destination: a matrix in the result.

    Attributes:
        tensor: of the result.
        start: the element of the tensor at which the matrix begins.
        expert: the expert that it belongs to, where it belongs to one.
        draw: the first of its random streams, where it is drawn; each block has one.
    """

    tensor: str
    start: int = 0
    expert: int = 0
    draw: int = 0


@dataclass(frozen=True)
class Fill:
    """One kind of content and its destinations.

    Attributes:
        kind: a key of the plan's `kinds`.
        sources: what it is made of; empty where nothing is read.
        places: its destinations. Those that read the same rows come one after another.
        dtype: of the result, as safetensors names it.
        shape: of the matrix in each place.
        layer: that it belongs to, where it belongs to one.
        projection: gate, up or down for an FFN matrix, else None.
        factor: that the source is multiplied with.
        value: a number that the kind needs: a constant, a standard deviation.
        zero_row: a row that stays zero where the others are drawn (the padding token's embedding).
        summed: whether the pass over the sources sums their units, because what is drawn depends on them.
    """

    kind: str
    sources: tuple[Piece, ...]
    places: tuple[Place, ...]
    dtype: str
    shape: tuple[int, ...]
    layer: int | None = None
    projection: str | None = None
    factor: float = 1.0
    value: float = 0.0
    zero_row: int | None = None
    summed: bool = False

    @property
    def axis(self) -> int:
        """The axis on which an FFN matrix has its units: columns of down, rows of gate and up."""
        return 1 if self.projection == "down" else 0

    @property
    def row_length(self) -> int:
        """Elements in a row; a vector counts as rows of one."""
        return math.prod(self.shape[1:])

    @property
    def num_elements(self) -> int:
        """Elements of one place."""
        return math.prod(self.shape)

    @cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """First and one-past-last row of each block; a block of the first source's rows is no larger."""
        return row_blocks(self.shape[0] if self.shape else 1, self._longest_row) if self.row_length else []

    @property
    def num_blocks(self) -> int:
        """How many there are, without making them."""
        rows = self.shape[0] if self.shape else 1
        return -(-rows // _rows_of_block(self._longest_row)) if self.row_length else 0

    @property
    def _longest_row(self) -> int:
        return max([self.row_length, *(math.prod(piece.info.shape[1:]) for piece in self.sources[:1])])


def row_blocks(rows: int, row_length: int) -> list[tuple[int, int]]:
    """First and one-past-last row of each block of BLOCK_ELEMENTS."""
    step = _rows_of_block(row_length)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _rows_of_block(row_length: int) -> int:
    return max(1, BLOCK_ELEMENTS // max(1, row_length))


def peak_memory(fills: Sequence[Fill], workers: int) -> int:
    """Resident bytes that writing takes, about.

    The interpreter with torch; a few blocks per worker: what is read, its fp32 and fp64 forms while it
    is summed, what is drawn; sums of units, and a digest of each block: 1 % of the model, or less.

    Args:
        fills: all that is written.
        workers: that write at the same time.
    """
    blocks = sum(fill.num_blocks * len(fill.places) for fill in fills)
    summed = (piece.info.shape[fill.axis] for fill in fills if fill.summed for piece in fill.sources)
    return 270_000_000 + workers * 160 * BLOCK_ELEMENTS + 300 * blocks + 2 * 8 * sum(summed)


def as_matrix(info: TensorInfo) -> TensorInfo:
    """The same bytes as rows of the last dimension: a fused tensor's own rows would be as large as an expert."""
    if len(info.shape) < 3 or 0 in info.shape:
        return info
    return replace(info, shape=(math.prod(info.shape[:-1]), info.shape[-1]))


def natural(name: str) -> list[Any]:
    """A sort key that puts layer 2 before layer 10, and the tensors outside layers around them."""
    place = 0 if name.startswith("model.embed") else 1 if ".layers." in name else 2
    return [place, *(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))]
