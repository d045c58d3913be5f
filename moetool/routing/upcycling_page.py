"""The numbers of the page's section "Experts and the dense model", from report.json's `upcycling`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Measured = Mapping[str, Any]
OLDER = ", first model"
_PARTS = {"kept": "kept units", "all": "all weights", "redrawn": "redrawn units"}


def change(first: Measured, second: Measured | None, *keys: str, share: bool = False) -> str | None:
    """A mean over layers, `0.28`, or with a second model `0.28 → 0.48`; None where it is not known."""
    values = [measured["mean"] for measured in (first, second) if measured]
    for key in keys:
        values = [value[key] for value in values]
    if values[0] is None:
        return None
    shown = [_share(value) if share else f"{value:.2f}" for value in values if value is not None]
    return " → ".join(text.replace("-0.00", "0.00") for text in shown)


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def tiles(first: Measured, second: Measured | None) -> list[tuple[str, str]]:
    """(value, label) of what is known."""
    redrawn = bool(first["num_redrawn"])
    found = [
        (change(first, second, "with_dense", "all"), "similarity of experts and the dense model"),
        (change(first, second, "with_dense", "kept") if redrawn else None, "the same, in the units that were kept"),
        (change(first, second, "between_experts", "all"), "similarity of two experts"),
        (change(first, second, "use"), "use of redrawn units; 1 is as much as the kept ones"),
        (change(first, second, "idle", share=True), "of redrawn units are nearly idle"),
    ]
    return [(value, label) for value, label in found if value is not None]


def similarity_series(
    first: Measured, second: Measured | None, side: str
) -> tuple[dict[str, list[float | None]], list[str]]:
    """Lines of a chart by layer, and which of them are dashed.

    Args:
        first: of the first model.
        second: of the second; its lines come first of each pair.
        side: `between_experts` or `with_dense`.
    """
    parts = _PARTS if first["num_redrawn"] else {"all": _PARTS["all"]}
    lines = {
        name: [[row[side][part] for row in model["layers"]] for model in _models(first, second, "layers")]
        for part, name in parts.items()
    }
    return _pairs(lines)


def use_series(first: Measured, second: Measured | None) -> tuple[dict[str, list[float | None]], list[str]]:
    """The same of the use of redrawn units, a domain a line."""
    models = _models(first, second, "unit_use")
    lines = {name: [[row["use"] for row in model["unit_use"][name]] for model in models] for name in first["unit_use"]}
    return _pairs(lines)


def _models(first: Measured, second: Measured | None, key: str) -> list[Measured]:
    """The second model and the first, or the first alone."""
    return [second, first] if second and second[key] else [first]


def _pairs(lines: Mapping[str, list[list[float | None]]]) -> tuple[dict[str, list[float | None]], list[str]]:
    known = {name: pair for name, pair in lines.items() if any(value is not None for line in pair for value in line)}
    series = {name + (OLDER if i else ""): line for name, pair in known.items() for i, line in enumerate(pair)}
    return series, [name + OLDER for name, pair in known.items() if len(pair) > 1]
