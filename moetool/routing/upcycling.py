"""The report's `upcycling`: the experts of a checkpoint that moetool upcycled, and the dense model they come from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moetool.errors import CheckpointError
from moetool.progress import Progress, silent
from moetool.routing.origin import Origin, find_dense
from moetool.routing.similarity import PARTS, similarity
from moetool.routing.unit_use import UnitUse


def build_upcycling(
    origin: Origin | None, folder: Path, use: UnitUse | None, progress: Progress = silent
) -> dict[str, Any] | None:
    """The comparison; a part that cannot be measured is None, and `notes` say why.

    Args:
        origin: of the checkpoint; None gives None.
        folder: of the checkpoint.
        use: after the pass over the texts; None if it was not asked for.
    """
    if origin is None:
        return None
    notes = [use.note] if use and use.note else []
    dense, layers = None, None
    try:
        if origin.drawn:
            notes.append("every tensor was drawn, so there is no dense FFN to compare the experts with")
        else:
            dense = find_dense(origin)
    except CheckpointError as error:
        notes.append(f"the experts were not compared with the dense model {error}")
    try:
        layers = similarity(folder, origin, dense, progress)
    except CheckpointError as error:
        notes.append(f"similarity is not known: {error}")
    unit_use = use.report() if use else None
    return {
        "recipe": origin.recipe.to_json(),
        "source": origin.sources[0],
        "donors": list(origin.sources[1:]),
        "num_units": origin.num_units,
        "num_redrawn": _alike(origin),
        "mean": _means(layers, unit_use),
        "layers": layers,
        "unit_use": unit_use,
        "notes": notes,
    }


def _alike(origin: Origin) -> int | dict[str, int]:
    """Units redrawn in an expert; by layer where layers differ."""
    numbers = origin.num_redrawn
    if len(set(numbers)) == 1:
        return numbers[0]
    return {str(layer): number for layer, number in zip(origin.layers, numbers, strict=True)}


def _means(layers: list[dict[str, Any]] | None, unit_use: dict[str, list[dict[str, Any]]] | None) -> dict[str, Any]:
    """Means over layers (and domains)."""
    rows = layers or []
    used = [row for domain in (unit_use or {}).values() for row in domain]
    return {
        side: {part: _mean(row[side][part] for row in rows if row[side]) for part in PARTS}
        for side in ("between_experts", "with_dense")
    } | {key: _mean(row[key] for row in used) for key in ("use", "idle")}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
