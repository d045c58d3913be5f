"""How an expert's block comes from the dense FFN's block: one pure function a method.

A method gets a block of rows of one matrix (already in the target's dtype), the intermediate units
in it that are changed, the axis on which units lie (0 for gate and up, 1 for down), the mean and
standard deviation of what is drawn, and a generator. It returns the expert's block and leaves its
argument as it is.
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
    drawn in fp32 and rounded once. `scratch` is the same for every entry of every tensor, with mean 0
    and the family's own initialisation range.
    """
    if not len(units):
        return block
    return block.index_copy(axis, units, _draw(block, len(units), axis, moments, generator).to(block.dtype))


def noise(
    block: torch.Tensor, units: torch.Tensor, axis: int, moments: tuple[float, float], generator: torch.Generator
) -> torch.Tensor:
    """Noise upcycling (the baseline of Nakamura et al.): add normal noise to the units; rounded once."""
    if not len(units):
        return block
    noisy = block.index_select(axis, units).float() + _draw(block, len(units), axis, moments, generator)
    return block.index_copy(axis, units, noisy.to(block.dtype))


def _draw(
    block: torch.Tensor, units: int, axis: int, moments: tuple[float, float], generator: torch.Generator
) -> torch.Tensor:
    shape = list(block.shape)
    shape[axis] = units
    return torch.empty(shape, dtype=torch.float32).normal_(*moments, generator=generator)


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
