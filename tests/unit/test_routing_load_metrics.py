"""Every measure against numbers worked out by hand, and against the published routing of E = 8, K = 2."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moetool.registry import METRICS, load
from moetool.routing import load_metrics
from moetool.routing.capture import Route
from moetool.routing.stats import RoutingStats


def stats_of(counts_LE: list[list[int]], top_k: int, probability_LE: list[list[float]] | None = None) -> RoutingStats:
    """Stats with given counts; tokens follow from the first layer."""
    counts = torch.tensor(counts_LE)
    L, E = counts.shape
    return RoutingStats.from_arrays(
        range(L),
        top_k,
        {
            "num_tokens": torch.tensor(int(counts[0].sum()) // top_k),
            "counts": counts,
            "probability": torch.tensor(probability_LE or [[0.0] * E] * L),
            "coactivation": torch.zeros(L, E, E, dtype=torch.int64),
        },
    )


def test_hand_computed() -> None:
    # 10 tokens, top-2 of 4: twenty routes, loads .5, .3, .15, .05.
    stats = stats_of([[10, 6, 3, 1]], 2, [[4.0, 3.0, 2.0, 1.0]])
    assert load_metrics.load(stats).tolist() == [[0.5, 0.3, 0.15, 0.05]]
    assert load_metrics.mri(stats) == [1.0]
    assert load_metrics.mri_normalized(stats) == [2.0]
    nats = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.15 * math.log(0.15) + 0.05 * math.log(0.05))
    assert load_metrics.entropy(stats) == pytest.approx([nats / math.log(4)])
    # Deviations .25, .05, -.1, -.2 from the mean .25: variance (.0625 + .0025 + .01 + .04) / 4.
    assert load_metrics.cv(stats) == pytest.approx([math.sqrt(0.115 / 4) / 0.25])
    assert load_metrics.max_violation(stats) == [1.0]
    assert load_metrics.mean_probability(stats) == pytest.approx(np.array([[0.4, 0.3, 0.2, 0.1]]))
    # 4 (.5*.4 + .3*.3 + .15*.2 + .05*.1) = 4 * .325
    assert load_metrics.balance_loss(stats) == pytest.approx([1.3])
    assert load_metrics.balance_loss_hf(stats) == pytest.approx([2.6])


def test_balanced_and_collapsed() -> None:
    stats = stats_of([[5] * 8, [20, 20, 0, 0, 0, 0, 0, 0]], 2, [[2.5] * 8, [10, 10, 0, 0, 0, 0, 0, 0]])
    assert load_metrics.mri(stats) == [0.25, 1.0]
    assert load_metrics.mri_normalized(stats) == [1.0, 4.0]
    assert load_metrics.entropy(stats) == pytest.approx([1.0, math.log(2) / math.log(8)])
    assert load_metrics.cv(stats) == pytest.approx([0.0, math.sqrt(3)])
    assert load_metrics.max_violation(stats) == [0.0, 3.0]
    assert load_metrics.dead_experts(stats) == [[], [2, 3, 4, 5, 6, 7]]
    assert load_metrics.balance_loss(stats) == pytest.approx([1.0, 4.0])
    assert load_metrics.balance_loss_hf(stats) == pytest.approx([2.0, 8.0])


def test_dead_means_below_one_percent_of_the_routes_of_eight_experts() -> None:
    alive, dead = [10] + [141] * 6 + [144], [9] + [141] * 6 + [145]
    assert sum(alive) == sum(dead) == 1000
    assert load_metrics.dead_experts(stats_of([alive, dead], 2)) == [[], [0]]


def test_counts_alone_say_nothing_of_probabilities() -> None:
    stats = stats_of([[4, 4]], 1)
    assert math.isnan(load_metrics.balance_loss(stats)[0])
    assert np.isnan(load_metrics.mean_probability(stats)).all()


def test_one_expert_and_no_tokens_are_balanced() -> None:
    assert load_metrics.entropy(stats_of([[7]], 1)) == [1.0]
    empty = stats_of([[0, 0, 0, 0]], 2)
    assert load_metrics.mri(empty) == [0.5]
    assert load_metrics.dead_experts(empty) == [[]]


def test_every_registered_metric_gives_a_value_a_layer() -> None:
    stats = stats_of([[3, 1], [2, 2], [0, 4]], 1, [[2.0, 2.0]] * 3)
    for name in METRICS["load"]:
        assert len(load("metric", name)(stats)) == 3, name


def routes(indices: list[list[int]], num_experts: int, layer: int = 0) -> Route:
    indices_TK = torch.tensor(indices)
    logits_TE = torch.zeros(len(indices), num_experts).scatter(1, indices_TK, 1.0)
    return Route(layer, logits_TE, torch.ones_like(indices_TK) / indices_TK.shape[1], indices_TK)


def test_update_counts_pairs_and_leaves_padding_out() -> None:
    route = routes([[0, 1], [0, 2], [2, 1], [3, 3]], 4)
    stats = RoutingStats([0], 4, 2)
    stats.update([route], torch.tensor([True, True, True, False]))
    assert stats.num_tokens == 3
    assert stats.counts_LE.tolist() == [[2, 2, 2, 0]]
    assert stats.coactivation_LEE[0].tolist() == [[2, 1, 1, 0], [1, 2, 1, 0], [1, 1, 2, 0], [0, 0, 0, 0]]
    assert stats.probability_LE.sum() == pytest.approx(3)


def test_scorings_become_probabilities() -> None:
    logits_TE = torch.tensor([[0.0, math.log(3.0)]])
    weights, indices = torch.ones(1, 1), torch.tensor([[1]])

    def probabilities(scoring: str, logits: torch.Tensor = logits_TE) -> list[float]:
        return [round(p, 6) for p in Route(0, logits, weights, indices, scoring).probabilities_TE()[0].tolist()]

    assert probabilities("softmax") == [0.25, 0.75]
    assert probabilities("sigmoid") == [0.4, 0.6]  # 1/2 and 3/4, over 5/4
    assert probabilities("probability", torch.tensor([[0.25, 0.75]])) == [0.25, 0.75]
    a, b = math.sqrt(math.log(2)), math.sqrt(math.log(4))
    assert probabilities("sqrtsoftplus") == pytest.approx([a / (a + b), b / (a + b)], abs=1e-5)


def test_counts_are_exact_under_autocast() -> None:
    stats = RoutingStats([0], 4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats.update([routes([[0, 1]] * 1001, 4)])
    assert stats.counts_LE.tolist() == [[1001, 1001, 0, 0]]
    assert stats.probability_LE.sum() == pytest.approx(1001)
