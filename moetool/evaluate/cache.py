"""Saved results, one file per pair of checkpoint and task, so that a run can continue.

A key covers everything that determines a score except the batch size, so a run that ran out of memory can continue with
a smaller batch. A changed checkpoint has another key.
"""

from __future__ import annotations

import hashlib
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moetool.checkpoint.folder import write_file
from moetool.checkpoint.reader import CheckpointReader, content_fingerprint
from moetool.errors import CheckpointError
from moetool.lineage import LINEAGE, read_lineage
from moetool.outside import fits, parse_json, read_bytes

FOLDER = ".cache"

# The files that determine a score besides the weights.
_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")


def checkpoint_identity(folder: Path) -> str:
    """A digest that changes when a checkpoint's weights, configuration or tokenizer do.

    Shards are identified by a sample of every tensor, and by the hashes in moetool.json if it lists all of them and is
    not older than any, otherwise by size, modification time and header.

    Raises:
        CheckpointError: the folder is not a complete checkpoint.
    """
    reader = CheckpointReader(folder)
    digest = hashlib.sha256()
    small = sorted({file for pattern in _SMALL_FILES for file in folder.glob(pattern)})
    for file in small:
        if file.name != LINEAGE:
            digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    hashes = _shard_hashes(folder, reader.shards)
    if hashes is None:
        digest.update(reader.fingerprint().encode())
    else:
        digest.update(json.dumps(hashes, sort_keys=True).encode())
    digest.update(content_fingerprint(folder).encode())  # times are wrong after a clock jump
    return digest.hexdigest()


def _shard_hashes(folder: Path, shards: list[str]) -> dict[str, Any] | None:
    hashes = (read_lineage(folder) or {}).get("shards")
    if not isinstance(hashes, dict) or not all(isinstance(hashes.get(shard), str) for shard in shards):
        return None
    written = (folder / LINEAGE).stat().st_mtime_ns
    if any((folder / shard).stat().st_mtime_ns > written for shard in shards):
        return None  # a shard was written after its hash
    return {shard: [hashes[shard], (folder / shard).stat().st_size] for shard in shards}


def key(identity: str, task_digest: str, settings: dict[str, Any]) -> str:
    """The file name of a pair's saved result."""
    libraries = {name: version(name) for name in ("lm_eval", "transformers")}
    return hashlib.sha256(json.dumps([identity, task_digest, settings, libraries], sort_keys=True).encode()).hexdigest()


def read(out: Path | None, name: str, task: str) -> dict[str, Any] | None:
    """A task's saved result; None if there is none, it is damaged, or it has another form than `evaluate` writes.

    Those of earlier versions have no digest, and are read without.
    """
    if out is None:
        return None
    try:
        entry = parse_json(read_bytes(out / FOLDER / f"{name}.json", 2**31), name)
    except CheckpointError:
        return None
    saved = entry.pop("sha256", None) if isinstance(entry, dict) else None
    return entry if saved in (None, _sha256(entry)) and _is_entry(entry, task) else None


def _sha256(entry: Any) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


_NUMBER = (float, bool)
_SAMPLE = {"doc_id": int, "filter": str, "metrics": [str]}
_ENTRY = {"samples": [_SAMPLE], "model_info": {}, "tokenizer_info": {}, "date": str}


def _is_entry(entry: Any, task: str) -> bool:
    """Whether a saved result has everything that results and their files are made from."""
    of_task = {part: {task: object} for part in ("configs", "versions", "n-shot", "n-samples")}
    results = of_task | {"results": {task: {"sample_len": int}}, "higher_is_better": {task: {}}}
    routing = {"layers": [{"mri": float}]}
    if not fits(entry, _ENTRY | {"results": results, "routing": (type(None), routing)}):
        return False
    for key, value in entry["results"]["results"][task].items():
        if key not in ("name", "alias") and not fits(value, (str, *_NUMBER) if is_stderr(key) else _NUMBER):
            return False
    kinds: dict[tuple[str, str], Any] = {}
    for sample in entry["samples"]:
        for metric in sample["metrics"]:
            kind = _kind(sample.get(metric))
            if kind is None or kinds.setdefault((sample["filter"], metric), kind) != kind:
                return False
    return bool(_DATE.fullmatch(entry["date"]))


def is_stderr(key: str) -> bool:
    """Whether a key METRIC,FILTER of lm-eval is a standard error, whose value may be "N/A"."""
    return key.partition(",")[0].endswith("_stderr")


def _kind(value: Any) -> Any:
    """The structure of a document's metric value, equal for all documents; None if no metric has such a value."""
    if isinstance(value, list):
        kinds = tuple(map(_kind, value))
        return None if None in kinds or not kinds else kinds
    return "number" if fits(value, _NUMBER) else "text" if isinstance(value, str) else None


_DATE = re.compile(r"[0-9T.-]{1,40}")  # part of a file name


def write(out: Path | None, name: str, entry: dict[str, Any]) -> None:
    """Save a result; a kill leaves all of it or nothing."""
    if out is not None:
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        saved = json.loads(_as_json(entry))
        write_json(out / FOLDER / f"{name}.json", saved | {"sha256": _sha256(saved)})


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file atomically."""
    indent = 1 if path.name == "results.json" else None
    write_file(path, _as_json(document, indent))


def _as_json(document: Any, indent: int | None = None) -> bytes:
    return json.dumps(document, indent=indent, ensure_ascii=False, default=str).encode("utf-8", "replace")
