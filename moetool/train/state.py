"""The folder of a run: who may write it, its step folders, and what a resumed run starts from.

A step folder is a stock checkpoint with `training_state/` beside it: the fp32 master weights where
the checkpoint's own dtype is another, the optimizer's moments (safetensors, by parameter name), and
state.json. It appears under its name only when every byte of it is on disk. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moetool.checkpoint.reader import INDEX, read_json
from moetool.checkpoint.writer import PARTIAL, foreign_files, sync_folder, write_file
from moetool.errors import CheckpointError

METRICS, SUMMARY, STEPS = "metrics.jsonl", "summary.json", "checkpoints"
STATE = "training_state"
_FORMAT = 1
ADVICE = "delete that step folder to go on from the one before it"


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
        raise CheckpointError(f"the model that is read, {model}, is a part of the run in {out}; choose another OUT")
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
    foreign = [] if resume else sorted(set(foreign_files(out)) - {METRICS, SUMMARY, STEPS})
    if foreign:
        raise CheckpointError(f"{out} also holds {', '.join(foreign[:3])}; move that away or choose another OUT")


def claim(out: Path) -> None:
    """Mark a folder as an unfinished run of this process: no complete model until `release`."""
    writer = {"process": os.getpid(), "host": socket.gethostname()}
    write_file(out / PARTIAL, json.dumps({"command": "cpt", "writer": writer}, indent=2).encode())


def release(out: Path) -> None:
    """Take the mark away: the run is finished."""
    (out / PARTIAL).unlink(missing_ok=True)
    sync_folder(out)


def clear(out: Path) -> None:
    """Delete an earlier run (`--no-resume`) from a folder that `claim` has marked: what makes it loadable first."""
    for name in ("config.json", INDEX):
        (out / name).unlink(missing_ok=True)
    sync_folder(out)
    sweep(out)
    for step in saved_steps(out):
        _delete(step_folder(out, step))
    if (out / STEPS).exists():
        shutil.rmtree(out / STEPS)
    for path in out.iterdir():
        if path.name != PARTIAL:
            path.unlink()


def step_folder(out: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return out / STEPS / f"step-{step:06d}"


@dataclass(frozen=True)
class Found:
    """What a run's folder holds: the newest step (0: none), whose run it is, the summary if finished."""

    step: int
    identity: dict[str, Any] | None
    summary: dict[str, Any] | None


def find(out: Path) -> Found:
    """Look for what can be gone on with.

    Raises:
        CheckpointError: the summary or the newest step's state is damaged.
    """
    if (out / SUMMARY).exists() and (out / "config.json").exists() and not (out / PARTIAL).exists():
        summary = read_json(out / SUMMARY)
        identity = summary.pop("identity", {})
        return Found(int(summary.get("steps", 0)), identity, summary)
    steps = saved_steps(out)
    if not steps:
        return Found(0, None, None)
    return Found(steps[-1], read_identity(step_folder(out, steps[-1])), None)


def saved_steps(out: Path) -> list[int]:
    """The steps that have a complete folder, ascending."""
    folders = (out / STEPS).glob("step-*/training_state/state.json")
    return sorted(int(match[1]) for f in folders if (match := re.fullmatch(r"step-(\d{6,})", f.parent.parent.name)))


def save_step(out: Path, step: int, fill: Callable[[Path], None], keep: int) -> Path:
    """Make a step folder appear complete or not at all, then delete the oldest beyond `keep`.

    Args:
        out: the run's folder.
        step: of the model.
        fill: writes the content into the folder that it is given.
        keep: how many step folders stay.
    """
    folder = step_folder(out, step)
    folder.parent.mkdir(exist_ok=True)
    sweep(out)
    temporary = folder.with_name(f".{folder.name}.unfinished")
    try:
        fill(temporary)
        _sync_tree(temporary)
        if folder.exists():
            _delete(folder)
        os.rename(temporary, folder)
    except SafetensorError as error:  # safetensors' name for a full disk; no OSError
        shutil.rmtree(temporary, ignore_errors=True)
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder} cannot be written ({reason}); free some space, then run the same command again"
        ) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    for old in saved_steps(out)[:-keep]:
        _delete(step_folder(out, old))
    return folder


def sweep(out: Path) -> None:
    """Delete what a killed run left half-written or half-deleted."""
    for leftover in (out / STEPS).glob(".step-*"):
        shutil.rmtree(leftover)


def _delete(folder: Path) -> None:
    # Renamed first: a folder that bears a step's name is never half a checkpoint.
    doomed = folder.with_name(f".{folder.name}.deleted")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def save_training_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    identity: Mapping[str, Any],
    master: bool,
) -> None:
    """Write `training_state/` into a step folder.

    Args:
        folder: the step folder.
        model: not wrapped; its parameters are the fp32 master weights.
        optimizer: over the same parameters.
        step: updates made.
        identity: of the run, see TrainConfig.identity.
        master: whether to store the master weights; needless where the checkpoint itself is fp32.
    """
    (folder / STATE).mkdir()
    parameters = dict(model.named_parameters())
    moments = {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    save_file(moments, folder / STATE / "optimizer.safetensors")
    if master:
        weights = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
        save_file(weights, folder / STATE / "master.safetensors")
    document = {"format": _FORMAT, "step": step, "master": master, "identity": identity, "torch": torch.__version__}
    (folder / STATE / "state.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_identity(folder: Path) -> dict[str, Any]:
    """The identity of the run that wrote a step folder.

    Raises:
        CheckpointError: state.json is damaged or of another format.
    """
    try:
        document = read_json(folder / STATE / "state.json")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {ADVICE}") from None
    if document.get("format") != _FORMAT or not isinstance(document.get("identity"), dict):
        raise CheckpointError(
            f"{folder / STATE}: made by another version of moetool; begin again with --no-resume or another OUT"
        )
    return dict(document["identity"])


@torch.no_grad()
def load_training_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the master weights and moments of a step folder into a model and its optimizer.

    Raises:
        CheckpointError: they do not fit the model.
    """
    parameters = dict(model.named_parameters())
    try:
        moments = load_file(folder / STATE / "optimizer.safetensors")
        weights: dict[str, Tensor] = {}
        master = folder / STATE / "master.safetensors"
        # Without them a rounded model would be trained on; the first step folders did not say that they have them.
        if read_json(folder / STATE / "state.json").get("master", master.exists()):
            weights = load_file(master)
            if absent := sorted(parameters.keys() - weights.keys()):
                raise ValueError(f"master.safetensors holds no {absent[0]}")
        for name, weight in weights.items():
            parameters[name].copy_(weight)
        for key, value in moments.items():
            name, _, moment = key.rpartition("/")
            parameter = parameters[name]
            optimizer.state[parameter][moment] = value.to(parameter.device)
    except Exception as error:  # safetensors' own errors, absent files, shapes: all mean the same to the user
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder / STATE} cannot be resumed from ({type(error).__name__}: {reason}); {ADVICE}"
        ) from None
