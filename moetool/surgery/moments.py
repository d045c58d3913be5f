"""Whether drawn numbers have the planned moments, within chance and rounding."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch

FAR = 16  # standard deviations this many times the dtype's resolution are hardly touched by rounding
FALSE_ALARMS = 1e-3  # chance that the statistics of a right checkpoint fail, over all its slices


def bound(num_slices: int) -> float:
    """How many standard errors a slice's statistics may lie off: 5, and more where there are many slices."""
    return max(5.0, NormalDist().inv_cdf(1 - FALSE_ALARMS / (2 * num_slices) / 2))


def resolution(dtype: torch.dtype, rms: float) -> float:
    """Root mean square of the largest errors that rounding can make in numbers of this root mean square."""
    info = torch.finfo(dtype)
    return math.hypot(rms, info.smallest_normal) * info.eps / 2


def standard_errors(found: tuple[float, float, int], planned: tuple[float, float], grid: float) -> float:
    """The distance of the mean or the standard deviation of normal numbers from the planned one.

    The mean's standard error is sigma / sqrt(n). The variance of a few numbers is not normal: the
    cube root of a chi-square over its degrees of freedom is (Wilson and Hilferty 1931). Rounding adds
    variance where numbers lie far apart on the dtype's grid; where they do not, it may move both
    moments by about the grid's width, and these are not counted as errors.

    Args:
        found: mean, standard deviation, and how many numbers.
        planned: mean and standard deviation.
        grid: see `resolution`.
    """
    (mean, std, n), (planned_mean, planned_std) = found, planned
    near = planned_std < FAR * grid
    slack = 3 * grid if near else math.hypot(planned_std, grid) - planned_std
    off_mean = max(0.0, abs(mean - planned_mean) - (slack if near else 0.0))
    off_std = math.copysign(max(0.0, abs(std - planned_std) - slack), std - planned_std)
    if planned_std == 0:
        return math.inf if off_mean or off_std else 0.0
    sigma = off_mean * math.sqrt(n) / planned_std
    if n > 1:
        spread = 2 / (9 * (n - 1))
        root = (1 + off_std / planned_std) ** (2 / 3)
        sigma = max(sigma, abs(root - 1 + (spread if off_std else 0)) / math.sqrt(spread))
    return sigma


class Sums:
    """Mean and standard deviation of blocks as they come, in float64."""

    def __init__(self) -> None:
        self.n, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, block: torch.Tensor) -> None:
        wide = block.double()
        self.n += wide.numel()
        self._sum += float(wide.sum())
        self._squares += float(wide.square_().sum())

    @property
    def rms(self) -> float:
        return math.sqrt(self._squares / max(1, self.n))

    @property
    def mean(self) -> float:
        return self._sum / self.n

    @property
    def std(self) -> float:
        return math.sqrt(max(self._squares / self.n - self.mean**2, 0.0) * self.n / max(1, self.n - 1))
