"""The runs that a command line names, each under a name of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moetool.checkpoint.folder import PARTIAL
from moetool.checkpoint.step_folder import METRICS, SUMMARY
from moetool.errors import CheckpointError
from moetool.watch.run import WatchedRun


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
