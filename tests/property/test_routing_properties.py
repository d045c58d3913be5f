"""What holds for any routing: ranges, permuted experts, merged parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetool.routing import load_metrics
from moetool.routing.capture import Route
from moetool.routing.stats import RoutingStats


@st.composite
def batches(draw: Any) -> tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Experts, top-k, logits (T, E), choices (T, K) of a skewed router and a padding mask (T,)."""
    E = draw(st.integers(2, 12))
    K = draw(st.integers(1, E))
    T = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    skew = draw(st.sampled_from([0.0, 1.0, 5.0]))
    logits = torch.randn(T, E, generator=generator) + skew * torch.randn(E, generator=generator)
    mask = torch.rand(T, generator=generator) < 0.8
    mask[0] = True
    return E, K, logits, logits.topk(K, dim=-1).indices, mask


def count(E: int, K: int, logits: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor) -> RoutingStats:
    stats = RoutingStats([3], E, K)
    stats.update([Route(3, logits, torch.ones_like(indices) / K, indices)], mask)
    return stats


@given(batches())
@settings(max_examples=60, deadline=None)
def test_ranges(batch: Any) -> None:
    E, K, *_ = batch
    stats = count(*batch)
    assert stats.counts_LE.sum() == stats.num_tokens * K
    assert np.isclose(load_metrics.load(stats).sum(), 1)
    assert K / E - 1e-9 <= load_metrics.mri(stats)[0] <= 1 + 1e-9
    assert 1 - 1e-9 <= load_metrics.mri_normalized(stats)[0] <= E / K + 1e-9
    assert np.log(K) / np.log(E) - 1e-9 <= load_metrics.entropy(stats)[0] <= 1
    assert 0 <= load_metrics.cv(stats)[0] <= np.sqrt(E / K - 1) + 1e-6
    assert np.isclose(load_metrics.max_violation(stats)[0], load_metrics.mri_normalized(stats)[0] - 1)
    assert len(load_metrics.dead_experts(stats)[0]) <= E - K
    assert 0 <= load_metrics.balance_loss(stats)[0] <= E + 1e-6
    assert np.isclose(load_metrics.balance_loss_hf(stats)[0], K * load_metrics.balance_loss(stats)[0])


@given(batches(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_naming_experts_otherwise_changes_nothing(batch: Any, random: Any) -> None:
    E, K, logits, indices, mask = batch
    new_name = list(range(E))
    random.shuffle(new_name)
    order = torch.tensor(new_name)
    moved = count(E, K, logits[:, order.argsort()], order[indices], mask)
    stats = count(E, K, logits, indices, mask)
    for name in ("mri", "mri_normalized", "entropy", "cv", "max_violation", "balance_loss"):
        measure = getattr(load_metrics, name)
        assert np.isclose(measure(moved), measure(stats), atol=1e-6).all(), name
    assert load_metrics.dead_experts(moved)[0] == sorted(new_name[e] for e in load_metrics.dead_experts(stats)[0])


@given(batches(), st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_parts_add_up(batch: Any, cut: int) -> None:
    E, K, logits, indices, mask = batch
    whole = count(*batch)
    first = count(E, K, logits[:cut], indices[:cut], mask[:cut])
    second = count(E, K, logits[cut:], indices[cut:], mask[cut:])
    for total in (first + second, second + first):
        assert total.num_tokens == whole.num_tokens
        assert (total.counts_LE == whole.counts_LE).all()
        assert (total.coactivation_LEE == whole.coactivation_LEE).all()
        assert np.allclose(total.probability_LE, whole.probability_LE, atol=1e-5)
