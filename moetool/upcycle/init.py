"""How an expert's block comes from the dense FFN's block: one pure function per method.

A method returns the block to write, in the dtype of what it is given, and leaves its argument as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetool.surgery.rows import replace, select


@dataclass(frozen=True)
class Slice:
    """A block of rows of one matrix, with the context that a method may use.

    Attributes:
        kept: the source's numbers, in the target's dtype.
        units: positions in it that are changed, ascending.
        axis: on which units lie: 0 for gate and up, 1 for down.
        moments: mean and standard deviation of what is drawn.
        generator: of this block's own.
        layer: that it belongs to; None outside layers.
        expert: that it belongs to.
        projection: gate, up or down; None outside an FFN.
    """

    kept: torch.Tensor
    units: torch.Tensor
    axis: int
    moments: tuple[float, float]
    generator: torch.Generator
    layer: int | None = None
    expert: int = 0
    projection: str | None = None


def copy(block: Slice) -> torch.Tensor:
    """Naive upcycling: the dense block itself."""
    return block.kept


def drop(block: Slice) -> torch.Tensor:
    """Drop-Upcycling (Nakamura et al., ICLR 2025, section 3): redraw the units from a normal distribution.

    Mean and standard deviation are those of the dropped slice, not of the whole matrix. Values are
    drawn in fp32 and rounded once.
    """
    if not len(block.units):
        return block.kept
    return replace(block.kept, block.axis, block.units, _draw(block, len(block.units)).to(block.kept.dtype))


def noise(block: Slice) -> torch.Tensor:
    """Noise upcycling (the baseline of Nakamura et al.): add normal noise to the units; rounded once."""
    if not len(block.units):
        return block.kept
    noisy = select(block.kept, block.axis, block.units).float() + _draw(block, len(block.units))
    return replace(block.kept, block.axis, block.units, noisy.to(block.kept.dtype))


def scratch(block: Slice) -> torch.Tensor:
    """Training from scratch: the units from the family's own initialisation, a normal distribution.

    All units of a block are drawn, whichever are used, so that a row that stays as it is moves no other.
    """
    size = block.kept.shape[block.axis]
    drawn = _draw(block, size).to(block.kept.dtype)
    if len(block.units) == size:
        return drawn
    return replace(block.kept, block.axis, block.units, select(drawn, block.axis, block.units))


def _draw(block: Slice, units: int) -> torch.Tensor:
    shape = list(block.kept.shape)
    shape[block.axis] = units
    return torch.empty(shape, dtype=torch.float32).normal_(*block.moments, generator=block.generator)


def slice_moments(sums: torch.Tensor, squares: torch.Tensor, units: torch.Tensor, width: int) -> tuple[float, float]:
    """Mean and (unbiased) standard deviation of the entries of some units.

    Args:
        sums: sum of the entries of each unit, float64 (F,).
        squares: sum of their squares, float64 (F,).
        units: indices into them.
        width: entries per unit in this matrix.
    """
    n = len(units) * width
    if n < 2:
        return (float(sums[units].sum()), 0.0)
    mean = float(sums[units].sum()) / n
    variance = (float(squares[units].sum()) - n * mean * mean) / (n - 1)
    return mean, max(variance, 0.0) ** 0.5
