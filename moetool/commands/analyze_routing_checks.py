"""`--fail-if` of analyze-routing: conditions on the measures of layers."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any

import typer

from moetool import registry
from moetool.errors import CheckFailed, ConfigError

# Kinds of the registry.
MEASURES = ("metric", "text measure", "comparison measure", "upcycling measure")
_CHECKS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_WHY_UNKNOWN = {
    "metric": "it is not known from counts alone",
    "text measure": "it was not measured: it needs a MODEL, and --vocabulary-layers, two domains or a top-k above 1",
    "comparison measure": "it was not measured: it needs --vocabulary-layers, or weights that are not quantised",
    "upcycling measure": "it is known of models that moetool upcycled, where there is something to measure",
}


@dataclass(frozen=True)
class Check:
    """One --fail-if: `mri>0.6`."""

    kind: str
    measure: str
    sign: str
    bound: float


def parse_check(text: str) -> Check:
    """A check as it was typed; raises BadParameter, with the nearest measure, where it is none."""
    match = re.fullmatch(r"\s*([A-Za-z_][\w-]*)\s*(>=|<=|>|<)\s*([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*", text)
    if match is None:
        raise typer.BadParameter(f"--fail-if '{text}': write it as 'mri>0.6', with one of > >= < <=")
    kinds = {name: kind for kind in MEASURES for name in registry.names(kind)}
    measure = match[1].replace("-", "_")
    if measure not in kinds:
        near = registry.suggest(measure, kinds)
        raise typer.BadParameter(
            f"--fail-if '{text}': unknown measure '{measure}'{near}; choose from {', '.join(kinds)}"
        )
    return Check(kinds[measure], measure, match[2], float(match[3]))


def apply(checks: list[Check], report: dict[str, Any]) -> None:
    """Raise CheckFailed with the domains, layers and values of every check that holds."""
    failed = []
    for check in checks:
        found = []
        for where, rows in _values(check, report).items():
            layers = [
                f"layer {layer} ({value:.4g})" for layer, value in rows if _CHECKS[check.sign](value, check.bound)
            ]
            if layers:
                found.append(f"{where}: {', '.join(layers)}" if where else ", ".join(layers))
        if found:
            failed.append(f"{check.measure}{check.sign}{check.bound:g} in {'; '.join(found)}")
    if failed:
        raise CheckFailed(f"--fail-if: {' | '.join(failed)}")


def check_asked_for(checks: list[Check], compare: bool, unit_use: bool) -> None:
    """Refuse a check of what the other options leave out, before anything runs."""
    for check in checks:
        if check.kind == "comparison measure" and not compare:
            raise typer.BadParameter(f"--fail-if {check.measure} needs --compare MODEL2")
        if check.measure in ("unit_use", "idle_units") and not unit_use:
            raise typer.BadParameter(f"--fail-if {check.measure} excludes --no-unit-use")


def _values(check: Check, report: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Where -> (layer, value) of what is known; refuses a check that would pass because nothing was measured."""
    from moetool.routing.measures import of_metric

    metric = check.kind == "metric"
    values = of_metric(report, check.measure) if metric else registry.load(check.kind, check.measure)(report)
    known = {
        where: [(layer, value) for layer, value in rows if value is not None] for where, rows in (values or {}).items()
    }
    if not any(known.values()):
        notes = (report["upcycling"] or {}).get("notes") if check.kind == "upcycling measure" else None
        why = f" ({notes[0]})" if notes else ""
        raise ConfigError(f"--fail-if {check.measure}: {_WHY_UNKNOWN[check.kind]}{why}")
    return known
