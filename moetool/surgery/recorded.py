"""A finished folder checked against its own moetool.json and the plan: config.json, digests, facts, foreign files."""

from __future__ import annotations

from pathlib import Path

import torch

from moetool.checkpoint.reader import sha256_file
from moetool.errors import CheckpointError
from moetool.lineage import LINEAGE, last_entry, read_lineage
from moetool.outside import read_json
from moetool.surgery.digests import Digests
from moetool.surgery.plan import Plan

MAX_SHOWN = 60  # characters of a value in a message


def check_config(plan: Plan, out: Path) -> None:
    """config.json is the one that the recipe writes.

    Raises:
        CheckpointError: names the first key that differs, and both values.
    """
    found, wanted = read_json(out / "config.json"), dict(plan.config)
    for key in sorted(found.keys() | wanted.keys()):
        if key not in found or key not in wanted or found[key] != wanted[key]:
            values = [str(config[key])[:MAX_SHOWN] if key in config else "absent" for config in (found, wanted)]
            raise CheckpointError(f"{out}/config.json: {key} is {values[0]}, but this recipe writes {values[1]}")


def check_files(plan: Plan, out: Path) -> int:
    """Every small file has the SHA-256 that moetool.json records, and no other file lies beside them.

    Other folders than those of chat templates, hidden files and README.md are ignored, because no
    program loads them with the model.

    Returns:
        How many files were compared; 0 for a folder of a version that recorded no digests.

    Raises:
        CheckpointError: names a file that is missing, has changed, or was not written by the plan's command.
    """
    recorded = (read_lineage(out) or {}).get("files", {})
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{out / LINEAGE}: files is {str(recorded)[:MAX_SHOWN]!r}, expected an object")
    if not recorded:
        return 0
    for name, digest in recorded.items():
        if not (out / name).is_file():
            raise CheckpointError(f"{out / name} is missing; {plan.command} wrote it, and moetool.json has its digest")
        if sha256_file(out / name) != digest:
            raise CheckpointError(
                f"{out / name} has changed since it was written (its SHA-256 in moetool.json differs)"
            )
    own = {*recorded, *(shard.name for shard in plan.shards), LINEAGE, "moetool.yaml", "README.md"}
    for path in sorted(out.iterdir()):
        loaded = path.is_file() or path.is_symlink() or path.name == "additional_chat_templates"
        if loaded and path.name not in own and not path.name.startswith("."):
            raise CheckpointError(f"{path} was not written by {plan.command}; move it away if a program could load it")
    return len(recorded)


def check_recorded(plan: Plan, out: Path) -> None:
    """Check that this machine would draw the values whose checksums moetool.json records.

    Raises:
        CheckpointError: it is not; says why, as far as moetool.json shows.
    """
    entry = last_entry(out)
    differing = [key for key, value in plan.recorded().items() if entry.get(key) != value]
    if not differing:
        return
    versions = str(entry.get("torch")).split("+")[0], torch.__version__.split("+")[0]
    why = (
        "so the recipe or the digests in it were edited"
        if versions[0] == versions[1]
        else f"which was written with torch {versions[0]}; this is {versions[1]}"
    )
    what = differing[0].replace("_", " ")
    raise CheckpointError(f"{out}: the {what} rebuilt from the recipe differ from those in moetool.json, {why}")


def check_shards(plan: Plan, out: Path, digests: Digests) -> None:
    """The shards have the digests that moetool.json records.

    Raises:
        CheckpointError: names the first that has changed.
    """
    recorded = (read_lineage(out) or {}).get("shards")
    recorded = recorded if isinstance(recorded, dict) else {}
    for shard in plan.shards:
        if recorded.get(shard.name) != digests.of(shard):
            raise CheckpointError(
                f"{out / shard.name} has changed since it was written (its digest in moetool.json differs)"
            )
