"""Metrics with one value per layer, read from a finished report, for `--fail-if`.

Each function maps a report to {where: [(layer, value)]}: where is the domain, or the pair of them, or
empty for what is not measured on text. A value that is not known is None; so is the whole answer where
the report does not have the metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Report = Mapping[str, Any]
Values: TypeAlias = "dict[str, list[tuple[int, float | None]]]"


def coactivation_distance(report: Report) -> Values | None:
    """How far pairs of experts are from those of chance."""
    return _by_domain(report["coactivation"], "distance")


def domain_divergence(report: Report) -> Values | None:
    """Jensen-Shannon divergence of the loads of two domains."""
    pairs, layers = report["domain_divergence"], _layers(report)
    return pairs and {" and ".join(pair["domains"]): list(zip(layers, pair["layers"], strict=True)) for pair in pairs}


def vocabulary_specialization(report: Report) -> Values | None:
    """Share of an input token's occurrences that its favourite expert takes."""
    return _specialization(report, "input")


def next_token_specialization(report: Report) -> Values | None:
    """The same of the token after it."""
    return _specialization(report, "next")


def saturation(report: Report) -> Values | None:
    """Share of choices that both checkpoints make."""
    return _compared(report, "saturation")


def mri_change(report: Report) -> Values | None:
    """Change of mri from the first checkpoint to the second."""
    return _compared(report, "mri_change")


def load_divergence(report: Report) -> Values | None:
    """Jensen-Shannon divergence of the two checkpoints' loads."""
    return _compared(report, "load_divergence")


def continual_specialization(report: Report) -> Values | None:
    """Share of an input token's occurrences that the first checkpoint's favourite takes in the second."""
    found = report["comparison"] and report["comparison"]["vocabulary_specialization"]
    return found and _rows(found["layers"], lambda row: row["input"]["by_occurrence"])


def router_drift(report: Report) -> Values | None:
    """Relative change of the router's weights."""
    return report["comparison"] and _rows(report["comparison"]["drift"], lambda row: row["router"])


def expert_drift(report: Report) -> Values | None:
    """Relative change of the weights of the expert that moved most."""
    return report["comparison"] and _rows(report["comparison"]["drift"], lambda row: _largest(row["experts"]))


def expert_similarity(report: Report) -> Values | None:
    """Cosine of the weights of two experts, mean over pairs."""
    return _upcycled(report, lambda row: row["between_experts"]["all"])


def dense_similarity(report: Report) -> Values | None:
    """Cosine of the weights of an expert and the dense FFN, mean over experts."""
    return _upcycled(report, lambda row: row["with_dense"] and row["with_dense"]["all"])


def kept_similarity(report: Report) -> Values | None:
    """The same, of the units that were kept."""
    return _upcycled(report, lambda row: row["with_dense"] and row["with_dense"]["kept"])


def unit_use(report: Report) -> Values | None:
    """Use of the changed units, mean over experts."""
    return report["upcycling"] and _by_domain(report["upcycling"]["unit_use"], "use")


def idle_units(report: Report) -> Values | None:
    """Share of the changed units that are nearly idle, mean over experts."""
    return report["upcycling"] and _by_domain(report["upcycling"]["unit_use"], "idle")


def of_load(report: Report, name: str) -> Values:
    """A metric of the load in each domain; of a list (the dead experts), its length."""
    return {
        domain: [
            (row["layer"], len(row[name]) if isinstance(row[name], list) else row[name]) for row in found["layers"]
        ]
        for domain, found in report["domains"].items()
    }


def _layers(report: Report) -> list[int]:
    return [row["layer"] for row in next(iter(report["domains"].values()))["layers"]]


def _rows(rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float | None]) -> Values:
    return {"": [(row["layer"], value(row)) for row in rows]}


def _by_domain(domains: Mapping[str, Any] | None, name: str) -> Values | None:
    if domains is None:
        return None
    return {domain: [(row["layer"], row[name]) for row in rows] for domain, rows in domains.items()}


def _specialization(report: Report, kind: str) -> Values | None:
    found = report["vocabulary_specialization"]
    return found and _rows(found["layers"], lambda row: row[kind]["by_occurrence"])


def _compared(report: Report, name: str) -> Values | None:
    found = report["comparison"]
    return found and _by_domain({domain: entry["layers"] for domain, entry in found["domains"].items()}, name)


def _upcycled(report: Report, value: Callable[[Mapping[str, Any]], float | None]) -> Values | None:
    found = report["upcycling"]
    return _rows(found["layers"], value) if found and found["layers"] else None


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
