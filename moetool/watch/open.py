"""The runs that a command line names, each under a name of its own, and the scores of their checkpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetool.checkpoint.folder import PARTIAL
from moetool.checkpoint.step_folder import METRICS, SUMMARY
from moetool.errors import CheckpointError
from moetool.outside import fits, read_json
from moetool.watch.run import WatchedRun

_SCORE = {"value": float, "stderr": (float, type(None)), "higher_is_better": (bool, type(None))}
_RESULTS = {"models": {"*": str}, "results": {"*": {"*": {"*": _SCORE}}}}


def open_runs(paths: Sequence[Path]) -> list[WatchedRun]:
    """The runs in some folders.

    Raises:
        CheckpointError: a folder is absent, or holds something else.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise CheckpointError(f"{path} is no folder; give the OUT of a moetool cpt run")
        ours = any((path / name).exists() for name in (METRICS, SUMMARY, PARTIAL))
        if not ours and next(path.iterdir(), None):
            raise CheckpointError(f"{path} holds no run of moetool cpt ({METRICS}); give the OUT of one")
        found.setdefault(path.resolve(), path)
    return [WatchedRun(path, name) for path, name in zip(found.values(), short_names([*found]), strict=True)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many parts as make it unlike the others.

    Args:
        folders: absolute, all different.
    """
    names = []
    for folder in folders:
        lengths = range(1, len(folder.parts) + 1)
        others = [other for other in folders if other != folder]
        unlike = (n for n in lengths if all(other.parts[-n:] != folder.parts[-n:] for other in others))
        names.append("/".join(folder.parts[-next(unlike, len(folder.parts)) :]).lstrip("/") or "/")
    return names


def read_scores(folders: Sequence[Path], runs: Sequence[WatchedRun]) -> list[dict[str, Any]]:
    """Scores that `moetool eval --out` has left, of checkpoints of the runs, over their steps.

    Args:
        folders: of `moetool eval --out`.
        runs: whose checkpoints count; others are left out.

    Returns:
        For each task and metric: `task`, `metric`, `higher_is_better`, and `runs`: name -> `x`, `y`, `stderr`.

    Raises:
        CheckpointError: a folder has no results.json of `moetool eval`.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for folder in folders:
        document = read_json(folder / "results.json").get("moetool")
        if not isinstance(document, dict) or not fits(document, _RESULTS):
            raise CheckpointError(f"{folder / 'results.json'} is not of moetool eval; give its --out DIR")
        for model, tasks in document["results"].items():
            place = _place(Path(document["models"].get(model, "")), runs)
            for task, metrics in tasks.items() if place else ():
                for metric, score in metrics.items():
                    entry = found.setdefault(
                        (task, metric),
                        {"task": task, "metric": metric.removesuffix(",none"),
                         "higher_is_better": score["higher_is_better"], "runs": {}},
                    )  # fmt: skip
                    name, step = place  # type: ignore[misc]
                    entry["runs"].setdefault(name, {})[step] = score["value"], score["stderr"]
    for entry in found.values():
        for name, points in entry["runs"].items():
            steps = sorted(points)
            entry["runs"][name] = {
                "x": steps, "y": [points[s][0] for s in steps], "stderr": [points[s][1] for s in steps]
            }  # fmt: skip
    return list(found.values())


def _place(model: Path, runs: Sequence[WatchedRun]) -> tuple[str, int] | None:
    """The run and the step that a checkpoint is of: by its path, or where that is another machine's by its end."""
    match = re.fullmatch(r"step-(\d{6,15})", model.name)
    root = model.parent.parent if match else model
    same = [run for run in runs if run.path.resolve() == root.resolve()]
    same = same or [run for run in runs if run.path.resolve().name == root.name]
    if len(same) != 1 or not root.name:
        return None
    step = int(match[1]) if match else (same[0].rows.steps[-1] if same[0].rows.steps else None)
    return None if step is None else (same[0].name, step)
