"""What a run's folder tells besides its rows: state, options, command, lineage."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from moetool.arch.moe_source import experts_and_top_k
from moetool.checkpoint.folder import PARTIAL, holders
from moetool.checkpoint.step_folder import STEPS, SUMMARY, WEIGHTS, step_folders
from moetool.errors import MoetoolError
from moetool.lineage import LINEAGE
from moetool.outside import fits, parse_json, read_bytes
from moetool.train.config import TrainConfig

OPTIONS, CONFIG = "moetool.yaml", "config.json"
_OPTIONS_LIMIT = 1_000_000  # bytes


def read_facts(folder: Path) -> dict[str, Any]:
    """What a run's folder tells besides its rows. What is absent or damaged is left out.

    Returns:
        `state` (running, stopped, finished, starting or gone), `options` (resolved where that is known),
        `train` (domains), `shape` (experts and top-k; None without a checkpoint that says them), `sources` (name ->
        tokens, epochs at `sources_step`), `command` and `lineage`.
    """
    partial, summary = _json(folder / PARTIAL), _json(folder / SUMMARY)
    checkpoints = _checkpoints(folder)
    entries = _lineage(checkpoints)
    last = entries[-1] if entries and entries[-1].get("command") == "cpt" else {}
    typed, command = _typed(folder)
    finished = bool(summary) and (folder / CONFIG).exists() and not partial
    told = partial if isinstance(partial.get("options"), dict) else last
    resolved = told.get("options")
    options: dict[str, Any] = resolved if isinstance(resolved, dict) else typed
    sources, at = partial.get("sources"), None
    if not partial:
        sources = summary.get("ledger", last.get("ledger"))
        at = summary.get("steps", last.get("steps"))
    if not folder.is_dir():
        state = "gone"
    elif partial:
        state = "running" if _alive(folder, partial) else "stopped"
    else:
        state = "finished" if finished else "starting"
    train = options.get("train")
    return {
        "state": state,
        "options": options,
        "train": [str(name).partition("=")[0] for name in train] if isinstance(train, (dict, list)) else [],
        "shape": next(filter(None, (experts_and_top_k(_json(place / CONFIG)) for place in checkpoints)), None),
        "sources": sources,
        "sources_step": at if isinstance(at, int) else None,
        "command": command,
        "lineage": [_entry(entry) for entry in entries],
    }


def _alive(folder: Path, partial: Mapping[str, Any]) -> bool:
    """Whether its process may live: of one on another machine, only the rows tell."""
    writer: Any = partial.get("writer")
    if not fits(writer, {"process": int, "host": str}) or writer["host"] != socket.gethostname():
        return True
    return bool(holders(folder)) or Path(f"/proc/{writer['process']}").exists()


def _checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoint, if there is one, and the newest step folder or snapshot."""
    steps = {step: path for kind in (WEIGHTS, STEPS) for step, path in step_folders(folder, kind).items()}
    return [folder, *(steps[step] for step in sorted(steps, reverse=True)[:1])]


def _lineage(checkpoints: Sequence[Path]) -> list[dict[str, Any]]:
    for place in checkpoints:
        entries = _json(place / LINEAGE).get("lineage")
        if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
            return entries
    return []


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a lineage entry that the page shows."""
    source, values = entry.get("source"), entry.get("recipe") or entry.get("options")
    values = values if isinstance(values, dict) else {}
    return {
        "command": str(entry.get("command", "?")),
        "moetool": str(entry.get("moetool", "?")),
        "source": str(source.get("path", source.get("name", ""))) if isinstance(source, dict) else "",
        "values": {
            str(name): value
            for name, value in values.items()
            if isinstance(value, (str, int, float)) and value not in ("", None)
        },
    }


def _json(path: Path) -> dict[str, Any]:
    with suppress(MoetoolError):
        document = parse_json(read_bytes(path), str(path))
        return document if isinstance(document, dict) else {}
    return {}


def _typed(folder: Path) -> tuple[dict[str, Any], str]:
    """The options in moetool.yaml under the names of their fields, and the command line that they stand for."""
    import yaml

    class Plain(yaml.BaseLoader):
        """Ten lines of aliases of aliases stand for a billion values; moetool writes none."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias")
            return super().compose_node(parent, index)

    try:
        text = read_bytes(folder / OPTIONS, _OPTIONS_LIMIT).decode("utf-8")
        document = yaml.load(text, Loader=Plain)
    except (MoetoolError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return {}, ""
    if not isinstance(document, dict):
        return {}, ""
    words = ["moetool", "cpt", *(str(document[name]) for name in ("model", "out") if name in document)]
    for name, value in document.items():
        if name in ("model", "out") or _is_default(str(name), value):
            continue
        for one in value if isinstance(value, list) else [value]:
            if one in ("true", "false"):
                words.append(f"--{name}" if one == "true" else f"--no-{name}")
            else:
                words += [f"--{name}", str(one)]
    named = {str(name).replace("-", "_"): value for name, value in document.items()}
    return named, shlex.join(words)


def _is_default(name: str, value: Any) -> bool:
    defaults = {field.name.replace("_", "-"): field.default for field in fields(TrainConfig)}
    default = defaults.get(name)
    return str(default).lower() == str(value).lower()
