"""moetool.json of a rewritten checkpoint, and whether a folder has the plan's already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moetool import __version__, registry
from moetool.checkpoint.folder import PARTIAL, unfinished
from moetool.checkpoint.reader import CheckpointReader
from moetool.errors import CheckpointError
from moetool.lineage import LINEAGE, LINEAGE_FORMAT, lineage_entries, read_lineage, recorded_sources
from moetool.outside import read_bytes
from moetool.surgery.examine import hash_shards
from moetool.surgery.plan import Plan


def lineage(
    plan: Plan,
    names: Sequence[str],
    sha256: Sequence[Mapping[str, str]],
    digests: Mapping[str, str],
    files: Mapping[str, bytes],
) -> bytes:
    """moetool.json: the plan's history, an entry from which the result can be proven again, and digests of its files.

    Args:
        plan: that was written.
        names: of the sources.
        sha256: of their shards.
        digests: of the result's shards.
        files: all others of the result.
    """
    sources = [
        {"name": name, "model_type": model_type, "sha256": dict(sorted(hashes.items()))}
        | ({"lineage": own} if own else {})
        for name, model_type, hashes, own in zip(names, plan.model_types, sha256, plan.lineages, strict=True)
    ]
    entry: dict[str, Any] = {
        "command": plan.command,
        "moetool": __version__,
        "torch": torch.__version__,
        "recipe": plan.recipe,
        "max_shard_size": plan.max_shard_size,
        "source": sources[0],
    }
    if len(sources) > 1:
        entry["donors"] = sources[1:]
    entry |= plan.recorded()
    # moetool.yaml has OUT and --workers in it, which make no difference to the checkpoint.
    hashes = {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files) if name != "moetool.yaml"}
    document = {
        "format": LINEAGE_FORMAT,
        "lineage": [*plan.history, entry],
        "shards": digests,
        "files": hashes,
    }
    return json.dumps(document, indent=1).encode() + b"\n"


def recorded(out: Path) -> str:
    """What a folder records of the command that wrote it, or has begun to, as text; nothing where it is new."""
    documents = [out / name for name in (PARTIAL, LINEAGE) if (out / name).is_file()]
    return "".join(read_bytes(path).decode("utf-8", "replace") for path in documents)


def provable_entry(folder: Path) -> dict[str, Any]:
    """The entry of the operation that wrote a finished checkpoint.

    Raises:
        CheckpointError: no operation did, or another command has changed the checkpoint since.
    """
    if (folder / PARTIAL).exists():
        raise CheckpointError(unfinished(folder))
    entries = lineage_entries(folder)
    commands = [str(entry.get("command")) for entry in entries]
    proven = [number for number, command in enumerate(commands) if command in registry.names("operation")]
    if not proven:
        raise CheckpointError(
            f"{folder} has no moetool.json that says how it was upcycled or converted; only folders with one can be"
            " verified"
        )
    last = proven[-1]
    if commands[last + 1 :]:
        done = registry.load("operation", commands[last]).done
        raise CheckpointError(
            f"{folder} was changed after it was {done} ({', '.join(commands[last + 1 :])}); verify the {done}"
            " checkpoint that it came from"
        )
    entry = entries[last]
    if not all(isinstance(source.get("name"), str) for source in recorded_sources(entry)):
        raise CheckpointError(
            f"{folder}/moetool.json does not name what was {registry.load('operation', commands[last]).done}"
            "; it was edited"
        )
    if type(entry.get("max_shard_size")) is not int:
        found = entry.get("max_shard_size")
        raise CheckpointError(f"{folder}/moetool.json: max_shard_size is {found!r}, expected a number")
    return entry


def is_finished(plan: Plan, readers: Sequence[CheckpointReader], out: Path, workers: int) -> bool:
    """Whether OUT is finished, with the same recipe, sources and files (the proof then compares the weights)."""
    if not (out / "config.json").is_file() or (out / PARTIAL).exists():
        return False
    document = read_lineage(out) or {}
    *history, entry = document.get("lineage") or [{}]
    if (history, entry.get("command"), entry.get("recipe")) != (plan.history, plan.command, plan.recipe):
        return False
    if entry.get("measured", {}) != plan.measured:
        return False
    shards = document.get("shards")
    if not isinstance(shards, dict) or set(shards) != {shard.name for shard in plan.shards}:
        return False
    recorded = [source.get("sha256") for source in recorded_sources(entry)]
    return recorded == hash_shards(readers, workers)
