"""The folder of a run: who may write it, its step folders, and where a resumed run starts.

A step folder is a stock checkpoint with `training_state/` beside it (resume.py); a snapshot is one without. Both appear
under their names only when every byte of them is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetool.checkpoint.folder import PARTIAL, naming, remove, sync_folder, write_file
from moetool.checkpoint.reader import INDEX
from moetool.checkpoint.step_folder import (
    AVERAGE,
    METRICS,
    PAGE,
    STATE,
    STATE_FILE,
    STEPS,
    SUMMARY,
    WEIGHTS,
    step_folders,
)
from moetool.checkpoint.writer import foreign_files
from moetool.errors import CheckpointError, ConfigError
from moetool.lineage import LINEAGE
from moetool.outside import fits, read_json
from moetool.train import resume
from moetool.train.ranks import ALONE, Ranks

TRACKERS = "trackers"


_NUMBERS = {"*": float}
# What is told of a finished run.
_SUMMARY = {
    "steps": int,
    "tokens": int,
    "val": {"*": {"before": float, "after": float}},
    "mri": {"*": {"before": [float], "after": [float]}},
    "adaptation": _NUMBERS,
    "forgetting": _NUMBERS,
    "ledger": {"*": {"tokens": int, "epochs": float}},
    "tokens_per_second": (float, type(None)),
    "identity": {},
}
_SOMETIMES = {"average": {"steps": [int], "val": _NUMBERS}, "teacher": {"before": float, "after": float}}


def check_folder(model: Path, out: Path, resume: bool = True) -> None:
    """Refuse a folder that is the model's own or that holds something other than a run of `cpt`.

    Args:
        model: the checkpoint to start from.
        out: the run's folder.
        resume: False if the run in it is going to be deleted: it must then hold nothing else.

    Raises:
        CheckpointError: says what is there.
    """
    source, target = model.resolve(), out.resolve()
    if source == target or source in target.parents:
        raise CheckpointError(
            f"{out} is {'' if source == target else 'inside '}the model that is read; choose another OUT"
        )
    if target in source.parents:
        raise CheckpointError(f"the model that is read, {model}, is part of the run in {out}; choose another OUT")
    if not out.exists():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file; choose another OUT")
    names = [entry.name for entry in out.iterdir()]
    ours = SUMMARY in names or (PARTIAL in names and read_json(out / PARTIAL).get("command") == "cpt")
    if names and not ours:
        raise CheckpointError(
            f"{out} holds {', '.join(sorted(names)[:3])} and no run of moetool cpt; choose another OUT"
        )
    foreign = (
        [] if resume else sorted(set(foreign_files(out)) - {METRICS, SUMMARY, PAGE, STEPS, WEIGHTS, AVERAGE, TRACKERS})
    )
    if foreign:
        raise CheckpointError(f"{out} also holds {', '.join(foreign[:3])}; move that away or choose another OUT")


def check_start(model: Path, keep_optimizer: bool, ranks: Ranks) -> None:
    """Refuse `--keep-optimizer` if the optimizer state is missing or damaged; all processes must call.

    Raises:
        ConfigError: the model is no step folder.
        CheckpointError: its training state is damaged.
    """
    if not keep_optimizer:
        return
    if not (model / STATE_FILE).is_file():
        raise ConfigError(
            f"--keep-optimizer: {model} holds no optimizer state ({STATE}/); give a step folder of a run"
            " (OUT/checkpoints/step-NNNNNN), or leave the option out for a fresh optimizer"
        )
    try:
        resume.intact(model, ranks, STATE)
    except CheckpointError as error:
        raise CheckpointError(f"--keep-optimizer: {error}; give another step folder, or leave the option out") from None


def claim(out: Path, told: Mapping[str, Any] | None = None) -> None:
    """Mark a folder as an unfinished run of this process: no complete model until `release`.

    Args:
        out: the run's folder.
        told: what else whoever looks at the run may know of it before its first checkpoint.
    """
    writer = {"process": os.getpid(), "host": socket.gethostname()}
    write_file(out / PARTIAL, json.dumps({"command": "cpt", "writer": writer, **(told or {})}, indent=2).encode())


def release(out: Path) -> None:
    """Take the mark away: the run is finished."""
    (out / PARTIAL).unlink(missing_ok=True)
    sync_folder(out)


def withdraw(out: Path) -> None:
    """Delete the result of a finished run that continues in a folder that `claim` has marked; step folders stay."""
    for path in (out / "config.json", out / INDEX, out / SUMMARY, out / LINEAGE, *out.glob("*.safetensors")):
        path.unlink(missing_ok=True)
    sync_folder(out)


def clear(out: Path) -> None:
    """Delete an earlier run (`--no-resume`) from a folder that `claim` has marked: what makes it loadable first."""
    for name in ("config.json", INDEX):
        (out / name).unlink(missing_ok=True)
    sync_folder(out)
    for kind in (STEPS, WEIGHTS):
        _sweep(out / kind)
        for folder in step_folders(out, kind).values():
            _delete(folder)
    _discard(out / AVERAGE)
    for name in (STEPS, WEIGHTS, TRACKERS):
        if (out / name).exists():
            remove(out / name)
    for path in out.iterdir():
        if path.name != PARTIAL:
            path.unlink()


def step_folder(out: Path, step: int, kind: str = STEPS) -> Path:
    """The path of a step's checkpoint, or of its snapshot (WEIGHTS)."""
    return out / kind / f"step-{step:06d}"


@dataclass(frozen=True)
class Found:
    """The state of a run's folder.

    Attributes:
        step: the newest that is intact; 0: none.
        identity: whose run it is; None if there is nothing to go on with.
        summary: of a finished run.
        damaged: why newer step folders cannot be gone on from, a sentence each.
    """

    step: int = 0
    identity: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    damaged: tuple[str, ...] = ()


def find(out: Path, ranks: Ranks = ALONE, max_steps: int = 0) -> Found:
    """Find the newest intact step folder, from which a run can continue.

    Args:
        out: the run's folder.
        ranks: the processes that share the reading; all must call, and all find the same.
        max_steps: length that is asked for; a finished run of fewer steps is one to go on with.

    Raises:
        CheckpointError: the summary is damaged, every step folder is, or a finished run has none to go on from.
    """
    finished, steps = ranks.together(lambda: (_finished(out), [*step_folders(out)]) if ranks.is_main else (None, []))[0]
    if finished and finished.step >= max_steps:
        return finished
    if finished and not steps:
        raise CheckpointError(
            f"{out} is finished after {finished.step} steps and cannot continue to {max_steps}, because {out / STEPS}"
            f" no longer holds a step folder. Start a run in another OUT from {out}, with a new warm-up"
        )
    damaged: list[str] = []
    for step in reversed(steps):
        try:
            return Found(step, resume.intact(step_folder(out, step), ranks), None, tuple(damaged))
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(f"{damaged[0]}, and no step folder before it is intact; start again with --no-resume")
    return Found()


def _finished(out: Path) -> Found | None:
    if not ((out / SUMMARY).exists() and (out / "config.json").exists()) or (out / PARTIAL).exists():
        return None
    summary = read_json(out / SUMMARY)
    whole = fits(summary, _SUMMARY | {name: shape for name, shape in _SOMETIMES.items() if name in summary})
    told = [summary[name].keys() for name in ("mri",) if whole and summary[name]]
    told += [summary["average"]["val"].keys()] if whole and "average" in summary else []
    if not whole or not all(summary["val"].keys() <= names for names in told):
        raise CheckpointError(f"{out / SUMMARY} is damaged; start again with --no-resume, or choose another OUT")
    identity = summary.pop("identity")
    return Found(summary["steps"], identity, summary)


def go_back(out: Path, step: int) -> None:
    """Delete everything after `step`, from which the run continues.

    Step folders after it are damaged: they lose their names, and the next save deletes them. Snapshots after it are
    deleted: the run makes them again, and might make others. So is an average.
    """
    _discard(out / AVERAGE)
    for later, folder in step_folders(out).items():
        if later > step:
            os.rename(folder, folder.with_name(f".{folder.name}.damaged"))
    _sweep(out / WEIGHTS)
    for later, folder in step_folders(out, WEIGHTS).items():
        if later > step:
            _delete(folder)


def saved_steps(out: Path) -> list[int]:
    """The steps that have a complete folder, ascending."""
    return [step for step, folder in step_folders(out).items() if (folder / STATE_FILE).exists()]


def save_step(folder: Path, fill: Callable[[Path], None], keep: int | None, ranks: Ranks = ALONE) -> Path:
    """Make a step folder or a snapshot appear complete or not at all, then delete the oldest folders beyond `keep`.

    Args:
        folder: see `step_folder`.
        fill: writes a process's part of the content into the folder that it is given.
        keep: how many step folders stay; None: all.
        ranks: the processes that write it; all must call, and where one fails, all do.
    """
    temporary = folder.with_name(f".{folder.name}.unfinished")

    def begin() -> None:
        folder.parent.mkdir(exist_ok=True)
        _sweep(folder.parent)
        temporary.mkdir()

    def end() -> None:
        _sync_tree(temporary)
        if folder.exists():
            _delete(folder)
        os.rename(temporary, folder)
        sync_folder(folder.parent)
        for old in saved_steps(folder.parent.parent)[:-keep] if keep else []:
            _delete(step_folder(folder.parent.parent, old))

    try:
        with naming(folder):
            ranks.together(lambda: begin() if ranks.is_main else None)
            ranks.together(lambda: fill(temporary))
            ranks.together(lambda: end() if ranks.is_main else None)
    except BaseException:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _sweep(folders: Path) -> None:
    """Delete what a killed run left half-written or half-deleted."""
    for leftover in folders.glob(".step-*"):
        remove(leftover)


def _discard(average: Path) -> None:
    if average.exists():
        (average / "config.json").unlink(missing_ok=True)  # first: it makes the folder loadable
        remove(average)


def _delete(folder: Path) -> None:
    # Renamed first: a folder that bears a step's name is never half a checkpoint.
    doomed = folder.with_name(f".{folder.name}.deleted")
    os.rename(folder, doomed)
    remove(doomed)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))
