"""Scores that `moetool eval --out` has left, of checkpoints of the runs that are watched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moetool.errors import CheckpointError, MoetoolError
from moetool.outside import finite, fits, printable, read_json
from moetool.watch.run import WatchedRun

_SCORE = {"value": (float, type(None)), "stderr": (float, type(None)), "higher_is_better": (bool, type(None))}
_RESULTS = {"models": {"*": str}, "results": {"*": {"*": {"*": _SCORE}}}}
_FILE = "results.json"
_NEAR = f"eval*/{_FILE}"  # in a run's folder and beside it
_MOST = 20  # of them in a folder


def read_scores(
    folders: Sequence[Path], runs: Sequence[WatchedRun], strict: bool = True
) -> tuple[list[dict[str, Any]], list[str]]:
    """Scores of checkpoints of the runs, over their steps.

    Of folders that nobody named, `eval*` in a run and beside it, a result counts only if it has the same owner as the
    run and names the run's own path. What is there and not of `moetool eval` is passed over.

    Args:
        folders: of `moetool eval --out`, named by the user.
        runs: whose checkpoints count; others are left out.
        strict: whether a folder of these that cannot be read is an error, or a problem to show.

    Returns:
        For each task and metric: `task`, `metric`, `higher_is_better`, and `runs`: name -> `x`, `y`, `stderr`. And
        what could not be read, in words.

    Raises:
        CheckpointError: a folder has no results.json of `moetool eval`.
    """
    problems: list[str] = []
    found: list[tuple[dict[str, Any], bool]] = []
    named = [folder / _FILE for folder in folders]
    seen = {path.resolve() for path in named}
    for path in [*(one for one in _near(runs) if one not in seen), *named]:
        by_user = path in named
        try:
            document = finite(read_json(path).get("moetool"))
            if fits(document, _RESULTS):
                found.append((document, by_user))
            elif by_user:
                raise CheckpointError(f"{path} is not of moetool eval; give its --out DIR")
        except MoetoolError as error:
            if by_user and strict:
                raise
            problems.append(printable(str(error)))
    return _over_steps(_points(found, runs)), problems


def _near(runs: Sequence[WatchedRun]) -> list[Path]:
    """Results in the runs' folders and beside them, the newest last."""
    found: dict[Path, float] = {}
    for run in runs:
        for place in (run.path.resolve(), run.path.resolve().parent):
            for path in sorted(place.glob(_NEAR))[:_MOST]:
                try:
                    status = path.stat()
                    if status.st_uid == run.path.stat().st_uid:
                        found[path.resolve()] = status.st_mtime
                except OSError:  # gone meanwhile
                    continue
    return sorted(found, key=found.__getitem__)


def _points(found: Iterable[tuple[dict[str, Any], bool]], runs: Sequence[WatchedRun]) -> dict[Any, dict[str, Any]]:
    """(task, metric) -> an entry whose `runs` are: name -> step -> (value, stderr)."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for document, by_user in found:
        for model, tasks in document["results"].items():
            place = _place(document["models"].get(model, ""), runs, by_user)
            if place is None:
                continue
            name, step = place
            for task, metrics in tasks.items():
                for metric, score in metrics.items():
                    entry = entries.setdefault(
                        (task, metric),
                        {"task": task, "metric": metric.removesuffix(",none"),
                         "higher_is_better": score["higher_is_better"], "runs": {}},
                    )  # fmt: skip
                    if score["value"] is not None:
                        entry["runs"].setdefault(name, {})[step] = score["value"], score["stderr"]
    return entries


def _over_steps(entries: dict[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    for entry in entries.values():
        for name, points in entry["runs"].items():
            steps = sorted(points)
            entry["runs"][name] = {
                "x": steps, "y": [points[s][0] for s in steps], "stderr": [points[s][1] for s in steps]
            }  # fmt: skip
    return list(entries.values())


def _place(model: str, runs: Sequence[WatchedRun], by_user: bool) -> tuple[str, int] | None:
    """The run and the step that a checkpoint is of.

    Args:
        model: its path, as `moetool eval` was given it.
        runs: to choose from.
        by_user: whether the user named these results: the end of a path is then enough, because the run may have been
            evaluated on another machine.
    """
    path = Path(model)
    match = re.fullmatch(r"step-([0-9]{6,15})", path.name)
    root = path.parent.parent if match else path
    if "\0" in model or not root.name:
        return None
    same = [run for run in runs if _is_at(run.path.resolve(), root)]
    if by_user and not same:
        same = [run for run in runs if run.path.resolve().name == root.name]
    if len(same) != 1:
        return None
    step = int(match[1]) if match else (same[0].rows.steps[-1] if same[0].rows.steps else None)
    return None if step is None else (same[0].name, step)


def _is_at(run: Path, path: Path) -> bool:
    """Whether a path is a run's: of a relative one, which counts from a place that is not known, as far as it says."""
    if path.is_absolute():
        return path.resolve() == run
    parts = tuple(part for part in path.parts if part != "..")
    return bool(parts) and run.parts[-len(parts) :] == parts
