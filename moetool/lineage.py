"""moetool.json, the lineage of a checkpoint: an entry for each command that made it, the latest last."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetool.errors import CheckpointError
from moetool.outside import fits, read_json

LINEAGE = "moetool.json"
LINEAGE_FORMAT = 1


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """moetool.json of a checkpoint, None where there is none.

    Raises:
        CheckpointError: it is there but damaged.
    """
    path = folder / LINEAGE
    if not os.path.lexists(path):
        return None
    document = read_json(path)
    entries = document.get("lineage")
    if not isinstance(entries, list) or not all(_well_formed(entry) for entry in entries):
        raise CheckpointError(f"{path} has no lineage or a damaged one; delete it to use the checkpoint without it")
    return document


def lineage_entries(folder: Path) -> list[dict[str, Any]]:
    """The entries of a checkpoint's lineage; none where it has no moetool.json.

    Raises:
        CheckpointError: moetool.json is damaged.
    """
    document = read_lineage(folder)
    return document["lineage"] if document else []


def last_entry(folder: Path) -> dict[str, Any]:
    """The entry of the command that wrote a checkpoint; {} where there is none.

    Raises:
        CheckpointError: moetool.json is damaged.
    """
    return (lineage_entries(folder) or [{}])[-1]


def recorded_sources(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The dense models of an upcycling's entry: DENSE, then the other donors; {} where it is damaged."""
    donors = entry.get("donors", [])
    found = [entry.get("source"), *(donors if isinstance(donors, list) else [None])]
    return [source if isinstance(source, dict) else {} for source in found]


def recorded_experts(layers: Sequence[int], origins: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The experts in the recipe of a command that copies or removes experts, as JSON.

    Args:
        layers: those with experts.
        origins: for each of them, the expert before of each expert after.
    """
    return {"layers": list(layers), "from": [list(layer) for layer in origins]}


def read_experts(recorded: Any, num_experts: int) -> dict[int, list[int]]:
    """The inverse of `recorded_experts`: layer -> the expert before of each expert after.

    Args:
        recorded: of a lineage entry.
        num_experts: before.

    Raises:
        CheckpointError: it is damaged.
    """
    shape = {"layers": [int], "from": [[int]]}
    if fits(recorded, shape) and len(recorded["layers"]) == len(recorded["from"]):
        origins: dict[int, list[int]] = dict(zip(recorded["layers"], recorded["from"], strict=True))
        if all(0 <= expert < num_experts for one in origins.values() for expert in one):
            return origins
    raise CheckpointError(f"{LINEAGE}: the experts of an entry cannot be read ({str(recorded)[:100]})")


def _well_formed(entry: Any) -> bool:
    """An object whose parts, where they are there, are objects: what every reader of a lineage relies on."""
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(part, {}), dict) for part in ("recipe", "source", "redrawn_units"))
        and all(
            isinstance(own := source.get("lineage", []), list) and all(map(_well_formed, own))
            for source in recorded_sources(entry)
        )
    )


def extend_lineage(folder: Path, entry: dict[str, Any]) -> bytes:
    """moetool.json for a checkpoint made from the one in `folder`: its lineage and one entry more.

    What describes the old files (their hashes) is left behind.
    """
    lineage = [*lineage_entries(folder), entry]
    return json.dumps({"format": LINEAGE_FORMAT, "lineage": lineage}, indent=1).encode() + b"\n"
