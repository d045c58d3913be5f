"""Scores of experts: pure functions of a layer's sums, higher is kept.

X_j are the tokens routed to expert j, f_j its output, g_j the weight of that output. Shape: E experts.
"""

from __future__ import annotations

from torch import Tensor

from moetool.calibration.sums import ExpertSums


def frequency(sums: ExpertSums) -> Tensor:
    """The share of tokens that go to j: |X_j| / T."""
    return sums.routes_E / sums.tokens.clamp(min=1)


def ean(sums: ExpertSums) -> Tensor:
    """Expert activation norm: the sum of |f_j| over X_j."""
    return sums.norm_E


def weighted_ean(sums: ExpertSums) -> Tensor:
    """The sum of g_j |f_j| over X_j."""
    return sums.weighted_E


def reap(sums: ExpertSums) -> Tensor:
    """The mean of g_j |f_j| over X_j (Lasby et al. 2025, arXiv 2510.13999, eq. 9)."""
    return sums.weighted_E / sums.routes_E.clamp(min=1)


def man(sums: ExpertSums) -> Tensor:
    """Mean activation norm: of |f_j| over X_j (arXiv 2606.15716)."""
    return sums.norm_E / sums.routes_E.clamp(min=1)


def msan(sums: ExpertSums) -> Tensor:
    """Mean squared activation norm: of |f_j|^2 over X_j (arXiv 2606.15716)."""
    return sums.square_E / sums.routes_E.clamp(min=1)
