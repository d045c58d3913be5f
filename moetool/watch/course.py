"""The course that a run's options set: its steps, the phases of its schedule, and how far each source is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from moetool.outside import fits
from moetool.train.schedules import phases

_SOURCES = {"*": {"tokens": float, "epochs": float}}


def total_steps(options: Mapping[str, Any], step_tokens: float) -> int | None:
    """How many steps the run will have, from resolved options or those that were typed."""
    if steps := _whole(options.get("max_steps")):
        return steps
    tokens = _whole(options.get("max_tokens"))
    found = tokens // step_tokens if tokens and step_tokens else math.inf
    return int(found) if math.isfinite(found) else None


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, str)) and re.fullmatch(r"[0-9]{1,15}", str(value)) else None


def phases_of(options: Mapping[str, Any], total: int | None) -> list[dict[str, Any]]:
    """The phases of the schedule, each with the updates after `from`, up to `to`; none where they are not known."""
    needed = {"schedule": str, "warmup_steps": int, "cooldown_end": float, "constant_end": float}
    if not total or not fits(options, needed):
        return []
    return [{"name": n, "from": begin, "to": end} for n, begin, end in phases(options["schedule"], total, options)]


def sources_of(facts: Mapping[str, Any], told: Mapping[str, float], step: int, total: int | None) -> dict[str, Any]:
    """Where each source stands.

    Args:
        facts: see `read_facts`.
        told: tokens that each source has given, of the last row. Rows of an earlier version do not tell: each source
            is then taken to give the same share of every batch.
        step: of that row.
        total: steps of the run.
    """
    named = facts["sources"]
    if not fits(named, _SOURCES):
        return {}
    at = facts["sources_step"] or total
    replay, found = facts["options"].get("replay"), {}
    for name, entry in named.items():
        tokens = told.get(name, entry["tokens"] * step / at if at else 0)
        found[name] = {
            "tokens": round(tokens),
            "epochs": entry["epochs"] * tokens / entry["tokens"] if entry["tokens"] else None,
            "replay": name in replay if isinstance(replay, (dict, list)) else bool(entry.get("replay")),
        }
    return found
