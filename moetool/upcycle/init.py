"""How an expert's block comes from the dense FFN's block: one pure function a method.

A method gets a block of rows of one matrix (already in the target's dtype), the intermediate units
in it that are redrawn, the axis on which units lie (0 for gate and up, 1 for down), the mean and
standard deviation of the entries that are replaced, and a generator. It returns the expert's block
and leaves its argument as it is.
"""

from __future__ import annotations

import torch


def copy(
    block: torch.Tensor, units: torch.Tensor, axis: int, moments: tuple[float, float], generator: torch.Generator
) -> torch.Tensor:
    """Naive upcycling: the dense block itself."""
    return block


def drop(
    block: torch.Tensor, units: torch.Tensor, axis: int, moments: tuple[float, float], generator: torch.Generator
) -> torch.Tensor:
    """Drop-Upcycling (Nakamura et al., ICLR 2025, section 3): redraw the units from a normal distribution.

    Mean and standard deviation are those of the dropped slice, not of the whole matrix. Values are
    drawn in fp32 and rounded once.
    """
    if not len(units):
        return block
    shape = list(block.shape)
    shape[axis] = len(units)
    values = torch.empty(shape, dtype=torch.float32).normal_(*moments, generator=generator)
    return block.index_copy(axis, units, values.to(block.dtype))


def slice_moments(sums: torch.Tensor, squares: torch.Tensor, units: torch.Tensor, width: int) -> tuple[float, float]:
    """Mean and (unbiased) standard deviation of the entries of some units.

    Args:
        sums: sum of the entries of each unit, float64 (F,).
        squares: sum of their squares, float64 (F,).
        units: indices into them.
        width: entries a unit has in this matrix.
    """
    n = len(units) * width
    if n < 2:
        return (float(sums[units].sum()), 0.0)
    mean = float(sums[units].sum()) / n
    variance = (float(squares[units].sum()) - n * mean * mean) / (n - 1)
    return mean, max(variance, 0.0) ** 0.5
