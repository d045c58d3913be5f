"""Metrics of layers that are read from a report, each against a small report written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from moetool import registry
from moetool.routing.report_metrics import of_load

READ = [scope for scope in registry.METRICS if scope != "load"]


def similar(value: float | None) -> dict[str, Any]:
    return {"all": value, "kept": value and value + 0.1}


REPORT: dict[str, Any] = {
    "domains": {
        "a": {"layers": [{"layer": 1, "mri": 0.5, "dead_experts": [2, 3]}, {"layer": 3, "mri": 1, "dead_experts": []}]},
        "b": {"layers": [{"layer": 1, "mri": None, "dead_experts": []}, {"layer": 3, "mri": 1, "dead_experts": []}]},
    },
    "coactivation": {"a": [{"layer": 1, "distance": 0.1}, {"layer": 3, "distance": 0.2}]},
    "domain_divergence": [{"domains": ["a", "b"], "layers": [0.3, 0.4]}],
    "vocabulary_specialization": {
        "layers": [{"layer": 3, "input": {"by_occurrence": 0.6}, "next": {"by_occurrence": 0.7}}]
    },
    "comparison": {
        "domains": {"a": {"layers": [{"layer": 1, "saturation": 0.8, "mri_change": -0.1, "load_divergence": 0.01}]}},
        "vocabulary_specialization": {"layers": [{"layer": 3, "input": {"by_occurrence": 0.65}}]},
        "drift": [{"layer": 1, "router": 0.02, "experts": [0.1, 0.3]}, {"layer": 3, "router": None, "experts": [None]}],
    },
    "upcycling": {
        "layers": [
            {"layer": 1, "between_experts": similar(0.5), "with_dense": similar(0.7)},
            {"layer": 3, "between_experts": similar(None), "with_dense": None},
        ],
        "unit_use": {"a": [{"layer": 1, "use": 0.4, "idle": 0.9}, {"layer": 3, "use": None, "idle": None}]},
    },
}
EXPECTED: dict[str, Any] = {
    "coactivation_distance": {"a": [(1, 0.1), (3, 0.2)]},
    "domain_divergence": {"a and b": [(1, 0.3), (3, 0.4)]},
    "vocabulary_specialization": {"": [(3, 0.6)]},
    "next_token_specialization": {"": [(3, 0.7)]},
    "saturation": {"a": [(1, 0.8)]},
    "mri_change": {"a": [(1, -0.1)]},
    "load_divergence": {"a": [(1, 0.01)]},
    "continual_specialization": {"": [(3, 0.65)]},
    "router_drift": {"": [(1, 0.02), (3, None)]},
    "expert_drift": {"": [(1, 0.3), (3, None)]},
    "expert_similarity": {"": [(1, 0.5), (3, None)]},
    "dense_similarity": {"": [(1, 0.7), (3, None)]},
    "kept_similarity": {"": [(1, pytest.approx(0.8)), (3, None)]},
    "unit_use": {"a": [(1, 0.4), (3, None)]},
    "idle_units": {"a": [(1, 0.9), (3, None)]},
}


def test_every_metric_has_a_value_here() -> None:
    assert set(EXPECTED) == {name for scope in READ for name in registry.METRICS[scope]}


@pytest.mark.parametrize("scope", READ)
def test_metrics_of_a_full_report_and_of_an_empty_one(scope: str) -> None:
    empty = {**dict.fromkeys(REPORT), "domains": REPORT["domains"]}
    for name in registry.METRICS[scope]:
        assert registry.load("metric", name)(REPORT) == EXPECTED[name], name
        assert registry.load("metric", name)(empty) is None, name


def test_what_was_not_measured_within_a_report() -> None:
    report = {**REPORT, "comparison": {**REPORT["comparison"], "vocabulary_specialization": None}}
    assert registry.load("metric", "continual_specialization")(report) is None
    report = {**REPORT, "upcycling": {"layers": None, "unit_use": None}}
    assert all(registry.load("metric", name)(report) is None for name in registry.METRICS["upcycling"])


def test_a_list_counts_as_its_length() -> None:
    assert of_load(REPORT, "dead_experts") == {"a": [(1, 2), (3, 0)], "b": [(1, 0), (3, 0)]}
    assert of_load(REPORT, "mri")["b"] == [(1, None), (3, 1)]
