"""Task names, looked up in local YAML files and lm-eval's own tasks."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from moetool.errors import EvaluationError, MoetoolError, out_of_memory


def find(requested: Mapping[str, int | None], include_path: Path | None) -> tuple[TaskManager, dict[str, int | None]]:
    """The task index, and the requested names with patterns resolved.

    Raises:
        EvaluationError: no such folder or file, or an unknown name; suggests the nearest.
    """
    if include_path is not None and not include_path.is_dir():
        raise EvaluationError(f"--include-path {include_path} is not a folder; give the one with the tasks' YAML files")
    if absent := [name for name in requested if name.endswith(".yaml") and not Path(name).is_file()]:
        raise EvaluationError(f"no task file {absent[0]}; give the path of a task's YAML file")
    # The index of lm-eval's own 14000 tasks takes seconds: skipped if local tasks suffice.
    for include_defaults in (False, True):
        manager = TaskManager(include_path=include_path, include_defaults=include_defaults)
        matches = {name: [name] if name.endswith(".yaml") else manager.match_tasks([name]) for name in requested}
        if all(_is_known(manager.task_index, name) for name in requested):
            break
    if unknown := [name for name, found in matches.items() if not found]:
        raise EvaluationError(_unknown(unknown[0], manager, include_path))
    return manager, {match: requested[name] for name, found in matches.items() for match in found}


def _unknown(name: str, manager: TaskManager, include_path: Path | None) -> str:
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    hint = f", did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    broken = [f"{file.name} ({why})" for file, why in _unreadable(include_path)]
    also = f"; unreadable files in {include_path}: {', '.join(broken)}" if broken else ""
    where = "" if include_path else "; --include-path DIR adds local tasks"
    return f"unknown task '{name}'{hint}{also}{where}; `lm_eval ls tasks` lists lm-eval's own"


def _unreadable(folder: Path | None) -> Iterator[tuple[Path, str]]:
    for file in sorted(folder.glob("**/*.yaml")) if folder else ():
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # YAML of any kind
            yield file, one_line(error)


def _children(entry: Entry) -> list[Any]:
    """The members of a tag or group: names, or mappings that name a task or group and override settings."""
    listed = (entry.cfg or {}).get("task")
    return sorted(entry.tags) if entry.kind is Kind.TAG else listed if isinstance(listed, list) else []


def _name(child: Any) -> str:
    return str(child if isinstance(child, str) else child.get("task") or child.get("group"))


def members(index: Mapping[str, Entry], name: str) -> Iterator[str]:
    """The leaf tasks of a task, group or tag, as far as the index knows them."""
    entry = index.get(name)
    if entry is not None and entry.kind in (Kind.TAG, Kind.GROUP):
        for child in _children(entry):
            yield from members(index, _name(child))
    elif entry is not None:
        yield name


def _is_known(index: Mapping[str, Entry], name: str) -> bool:
    """Whether the index has a task and all members of a group; a pattern may match more elsewhere."""
    if name.endswith(".yaml"):
        try:
            return "group" not in load_yaml(name, resolve_func=False)
        except Exception as error:  # YAML of any kind
            raise EvaluationError(f"{name} cannot be read as a task: {one_line(error)}") from None
    entry = index.get(name)
    return entry is not None and all(_is_known(index, _name(child)) for child in _children(entry))


def one_line(error: BaseException) -> str:
    """The first informative line of an exception's message, with its type if it is not our own."""
    if isinstance(error, MoetoolError):
        return str(error)
    if out_of_memory(error):
        return "out of memory; use a smaller --batch-size, --dtype bfloat16, or --device-map auto"
    first = next((line.strip() for line in str(error).splitlines() if any(map(str.isalnum, line))), "")
    return f"{type(error).__name__}: {first}"[:300] if first else type(error).__name__
