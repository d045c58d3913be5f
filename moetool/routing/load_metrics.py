"""Metrics of each layer's load: pure functions of `RoutingStats`, one value per layer.

Shapes: E experts, L layers. K is top_k, N the number of tokens, N_i the tokens routed to expert i,
f_i = N_i / (N K) its load. A layer without routes counts as balanced.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from moetool.routing.levels import DEAD_LOAD
from moetool.routing.stats import RoutingStats

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


def load(stats: RoutingStats) -> Array:
    """Load f_i = N_i / (N K): each expert's share of its layer's routes.

    Returns:
        (L, E), rows sum to 1; balanced is 1 / E.
    """
    counts_LE = stats.counts_LE.astype(np.float64)
    totals_L1 = counts_LE.sum(axis=1, keepdims=True)
    load_LE: Array = np.full_like(counts_LE, 1 / stats.num_experts)
    np.divide(counts_LE, totals_L1, out=load_LE, where=totals_L1 > 0)
    return load_LE


def mean_probability(stats: RoutingStats) -> Array:
    """P_i: the mean over tokens of the router's probability of expert i.

    Returns:
        (L, E), rows sum to 1; balanced is 1 / E. All NaN where only counts are known.
    """
    sums_LE = stats.probability_LE
    totals_L1 = sums_LE.sum(axis=1, keepdims=True)
    mean_LE: Array = np.full_like(sums_LE, np.nan)
    np.divide(sums_LE, totals_L1, out=mean_LE, where=totals_L1 > 0)
    return mean_LE


def mri(stats: RoutingStats) -> list[float]:
    """Maximum routing imbalance: max_i N_i / N, the largest share of tokens that one expert receives.

    From K / E (balanced) to 1. Equation 1 of arXiv 2503.05029, over all counted tokens as one batch.
    """
    return _floats(load(stats).max(axis=1) * stats.top_k)


def mri_normalized(stats: RoutingStats) -> list[float]:
    """MRI x E / K, so that models with different E and K compare: from 1 (balanced) to E / K."""
    return _floats(load(stats).max(axis=1) * stats.num_experts)


def entropy(stats: RoutingStats) -> list[float]:
    """Entropy of the load over log(E): -sum_i f_i log f_i / log E, from 0 (one expert) to 1 (balanced)."""
    if stats.num_experts == 1:
        return [1.0] * len(stats.layers)
    load_LE = load(stats)
    terms_LE = load_LE * np.log(load_LE, out=np.zeros_like(load_LE), where=load_LE > 0)
    return _floats(np.clip(-terms_LE.sum(axis=1) / np.log(stats.num_experts), 0, 1))


def cv(stats: RoutingStats) -> list[float]:
    """Coefficient of variation of the load: population standard deviation / mean, from 0 to sqrt(E - 1).

    Shazeer et al. 2017 (arXiv 1701.06538), section 4, whose importance loss is its square.
    """
    return _floats(load(stats).std(axis=1) * stats.num_experts)


def max_violation(stats: RoutingStats) -> list[float]:
    """MaxVio: (largest load - mean load) / mean load, from 0 to E / K - 1.

    Equation 4 of arXiv 2408.15664 (loss-free balancing).
    """
    return _floats(load(stats).max(axis=1) * stats.num_experts - 1)


def dead_experts(stats: RoutingStats) -> list[list[int]]:
    """The experts whose load is below `DEAD_LOAD` of the balanced load 1 / E."""
    dead_LE = load(stats) < DEAD_LOAD / stats.num_experts
    return [[int(expert) for expert in np.flatnonzero(row)] for row in dead_LE]


def balance_loss(stats: RoutingStats) -> list[float]:
    """E x sum_i f_i P_i with f summing to 1: balanced is 1, the most is E.

    Equations 4 to 6 of Switch Transformers (arXiv 2101.03961), also Megatron's convention. NaN where
    only counts are known.
    """
    return _floats(stats.num_experts * (load(stats) * mean_probability(stats)).sum(axis=1))


def balance_loss_hf(stats: RoutingStats) -> list[float]:
    """The balance loss with f summing to K, as Hugging Face computes it: balanced is K."""
    return [value * stats.top_k for value in balance_loss(stats)]


def domain_divergence(one: RoutingStats, other: RoutingStats) -> list[float]:
    """Jensen-Shannon divergence, in bits, between the loads of two domains.

    H((f + g) / 2) - (H(f) + H(g)) / 2: 0 when both use the experts alike, 1 when they share none.
    """
    return divergence(load(one), load(other))


def divergence(f_LE: Array, g_LE: Array) -> list[float]:
    """Jensen-Shannon divergence, in bits, between two loads (L, E)."""

    def bits(p_LE: Array) -> Array:
        terms_LE: Array = p_LE * np.log2(p_LE, out=np.zeros_like(p_LE), where=p_LE > 0)
        total_L: Array = -terms_LE.sum(axis=1)
        return total_L

    return _floats(np.clip(bits((f_LE + g_LE) / 2) - (bits(f_LE) + bits(g_LE)) / 2, 0, 1))


def _floats(values: Array) -> list[float]:
    return [float(value) for value in values]
