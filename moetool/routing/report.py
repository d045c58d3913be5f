"""report.json: the one source of truth, from which the page, the plots and the table are drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from moetool import registry
from moetool.checkpoint.folder import write_files
from moetool.routing import load_metrics
from moetool.routing.coactivation import coactivation
from moetool.routing.stats import RoutingStats
from moetool.routing.verdict import verdict

SCHEMA_VERSION = 1


def domain_entry(stats: RoutingStats) -> dict[str, Any]:
    """One domain: the number of tokens and every metric of every layer's load.

    A metric that needs what was not counted (router probabilities, with counts of another engine) is
    null.
    """
    columns: dict[str, list[Any]] = {"load": load_metrics.load(stats).tolist()}
    columns |= {name: registry.load("metric", name)(stats) for name in registry.METRICS["load"]}
    columns["mean_probability"] = load_metrics.mean_probability(stats).tolist()
    rows = [
        {"layer": layer} | {name: _finite(values[row]) for name, values in columns.items()}
        for row, layer in enumerate(stats.layers)
    ]
    return {"num_tokens": stats.num_tokens, "layers": rows}


def build_report(
    model: str,
    stats: Mapping[str, RoutingStats],
    *,
    vocabulary_specialization: dict[str, Any] | None = None,
    comparison: dict[str, Any] | None = None,
    upcycling: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that was measured, as one JSON document (described in docs/analyze-routing.md).

    Args:
        model: how the user named the model.
        stats: domain -> sums, at least one.
        vocabulary_specialization: from `vocabulary.TokenCounts.report`.
        comparison: from `comparison.build_comparison`.
        upcycling: from `upcycling.build_upcycling`.
        text: from `shown_text.ShownText.report`; `text` is absent without it.
    """
    first = next(iter(stats.values()))
    together = {name: coactivation(sums) for name, sums in stats.items() if sums.has_pairs}
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "num_layers": len(first.layers),
        "num_experts": first.num_experts,
        "top_k": first.top_k,
        "domains": {name: domain_entry(sums) for name, sums in stats.items()},
        "vocabulary_specialization": vocabulary_specialization,
        "coactivation": together if together and first.top_k > 1 else None,
        "domain_divergence": _divergence(stats) if len(stats) > 1 else None,
        "comparison": comparison,
        "upcycling": upcycling,
    }
    return report | ({"text": text} if text else {}) | {"verdict": verdict(report)}


def _divergence(stats: Mapping[str, RoutingStats]) -> list[dict[str, Any]]:
    return [
        {"domains": [one, other], "layers": (jsd := load_metrics.domain_divergence(stats[one], stats[other])),
         "mean": sum(jsd) / len(jsd)}
        for one, other in combinations(stats, 2)
    ]  # fmt: skip


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return None if any(isinstance(v, float) and not math.isfinite(v) for v in value) else value
    return value


def write_report(report: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write report.json, report.html and plots/*.png: all of them, or none where the disk is full.

    Returns:
        `report`, `html` and `plots`: where they lie.
    """
    from moetool.routing.html import render
    from moetool.routing.plots import draw_plots, remove_stale

    text = json.dumps(report, ensure_ascii=False, allow_nan=False, indent=1)
    pages = {"report.json": text + "\n", "report.html": render(report)}
    # A token may be half a surrogate pair, which UTF-8 cannot hold.
    files = {name: page.encode("utf-8", "replace") for name, page in pages.items()}
    plots = draw_plots(report)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    write_files(folder, files | {f"plots/{name}": image for name, image in plots.items()})
    remove_stale(folder / "plots", plots)
    return {
        "report": str(folder / "report.json"),
        "html": str(folder / "report.html"),
        "plots": str(folder / "plots"),
    }
