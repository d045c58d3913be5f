"""`--fail-if` of analyze-routing: conditions on the metrics of layers."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any

import typer

from moetool import registry
from moetool.errors import CheckFailed, ConfigError

_CHECKS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_WHY_UNKNOWN = {
    "load": "it cannot be computed from counts alone",
    "text": "it was not measured, because it needs a MODEL, and --vocabulary-layers, two domains or a top-k above 1",
    "comparison": "it was not measured, because it needs --vocabulary-layers, or weights that are not quantised",
    "upcycling": "it was not measured, because it needs a model upcycled by moetool, with something to measure",
}


@dataclass(frozen=True)
class Check:
    """One --fail-if: `mri>0.6`."""

    metric: str
    sign: str
    bound: float

    @property
    def scope(self) -> str:
        """The scope in which the metric is measured."""
        return next(scope for scope, names in registry.METRICS.items() if self.metric in names)


def parse_check(text: str) -> Check:
    """Parse a check as typed; raises BadParameter, with the nearest metric, if it is not one."""
    match = re.fullmatch(r"\s*([A-Za-z_][\w-]*)\s*(>=|<=|>|<)\s*([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*", text)
    if match is None:
        raise typer.BadParameter(f"--fail-if '{text}': write it as 'mri>0.6', with one of > >= < <=")
    try:
        metric = registry.check("metric", match[1].replace("-", "_"))
    except ConfigError as error:
        raise typer.BadParameter(f"--fail-if '{text}': {error}") from None
    return Check(metric, match[2], float(match[3]))


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
            failed.append(f"{check.metric}{check.sign}{check.bound:g} in {'; '.join(found)}")
    if failed:
        raise CheckFailed(f"--fail-if: {' | '.join(failed)}")


def check_asked_for(checks: list[Check], compare: bool, unit_use: bool) -> None:
    """Refuse, before anything runs, a check on a metric that the other options leave out."""
    for check in checks:
        if check.scope == "comparison" and not compare:
            raise typer.BadParameter(f"--fail-if {check.metric} needs --compare MODEL2")
        if check.metric in ("unit_use", "idle_units") and not unit_use:
            raise typer.BadParameter(f"--fail-if {check.metric} cannot be used with --no-unit-use")


def _values(check: Check, report: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Place -> known (layer, value) pairs; refuses a check that would pass because nothing was measured."""
    from moetool.routing.report_metrics import of_load

    metric, scope = check.metric, check.scope
    values = of_load(report, metric) if scope == "load" else registry.load("metric", metric)(report)
    known = {
        where: [(layer, value) for layer, value in rows if value is not None] for where, rows in (values or {}).items()
    }
    if not any(known.values()):
        notes = (report["upcycling"] or {}).get("notes") if scope == "upcycling" else None
        why = f" ({notes[0]})" if notes else ""
        raise ConfigError(f"--fail-if {metric}: {_WHY_UNKNOWN[scope]}{why}")
    return known
