"""The folder of a run: who may write it, its step folders, and what a resumed run starts from.

A step folder is a stock checkpoint with `training_state/` beside it: the fp32 master weights where
the checkpoint's own dtype is another, the optimizer's moments (safetensors, by parameter name), and
state.json with a digest of every other file. It appears under its name only when every byte of it is
on disk. Nothing is pickled. Tensors are whole, so a run may go on with another number of processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moetool.checkpoint.reader import INDEX, read_json
from moetool.checkpoint.writer import PARTIAL, foreign_files, sync_folder, write_file
from moetool.errors import CheckpointError, ConfigError
from moetool.train.processes import share, whole

METRICS, SUMMARY, STEPS, TRACKERS = "metrics.jsonl", "summary.json", "checkpoints", "trackers"
STATE = "training_state"
_FORMAT = 1
ADVICE = "delete that step folder to go on from the one before it"
FRESH = "give a step folder of a run with the same layers, or leave --keep-optimizer out"


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
    foreign = [] if resume else sorted(set(foreign_files(out)) - {METRICS, SUMMARY, STEPS, TRACKERS})
    if foreign:
        raise CheckpointError(f"{out} also holds {', '.join(foreign[:3])}; move that away or choose another OUT")


def check_start(model: Path, keep_optimizer: bool) -> None:
    """Refuse `--keep-optimizer` where there is none.

    Raises:
        ConfigError: the model is no step folder.
    """
    if keep_optimizer and not (model / STATE / "state.json").is_file():
        raise ConfigError(
            f"--keep-optimizer: {model} holds no optimizer state ({STATE}/); give a step folder of a run"
            " (OUT/checkpoints/step-NNNNNN), or leave the option out for a fresh optimizer"
        )


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
    for name in (STEPS, TRACKERS):
        if (out / name).exists():
            shutil.rmtree(out / name)
    for path in out.iterdir():
        if path.name != PARTIAL:
            path.unlink()


def step_folder(out: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return out / STEPS / f"step-{step:06d}"


@dataclass(frozen=True)
class Found:
    """What a run's folder holds.

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


def find(out: Path) -> Found:
    """Look for what can be gone on with: the newest step folder of which every byte is as it was written.

    Raises:
        CheckpointError: the summary is damaged, or every step folder is.
    """
    if (out / SUMMARY).exists() and (out / "config.json").exists() and not (out / PARTIAL).exists():
        summary = read_json(out / SUMMARY)
        identity = summary.pop("identity", {})
        return Found(int(summary.get("steps", 0)), identity, summary)
    damaged: list[str] = []
    for step in reversed(_steps(out, "*")):
        try:
            return Found(step, _intact(step_folder(out, step)), None, tuple(damaged))
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(f"{damaged[0]}, and no step folder before it is intact; begin again with --no-resume")
    return Found()


def _intact(folder: Path) -> dict[str, Any]:
    """The identity of the run that wrote a step folder, once all of its files are found unchanged.

    Raises:
        CheckpointError: names the first that is not.
    """
    identity = read_identity(folder)
    for name, digest in read_json(folder / STATE / "state.json").get("files", {}).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if _digest(path) != digest:
            raise CheckpointError(f"{path} is damaged (not the bytes that were written)")
    return identity


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def set_aside(out: Path, step: int) -> None:
    """Take their names from the damaged folders after `step`; the next save deletes them."""
    for damaged in _steps(out, "*"):
        if damaged > step:
            folder = step_folder(out, damaged)
            os.rename(folder, folder.with_name(f".{folder.name}.damaged"))


def saved_steps(out: Path) -> list[int]:
    """The steps that have a complete folder, ascending."""
    return _steps(out, "*/training_state/state.json")


def _steps(out: Path, pattern: str) -> list[int]:
    names = (path.relative_to(out / STEPS).parts[0] for path in (out / STEPS).glob(pattern))
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{6,})", name)))


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


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's moments as (`parameter/moment`, tensor on the CPU); all processes must walk through.

    Args:
        model: not wrapped.
        optimizer: over its parameters.
    """
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            yield f"{name}/{key}", whole(value)


def save_training_state(
    folder: Path,
    moments: Mapping[str, Tensor],
    master: Mapping[str, Tensor] | None,
    step: int,
    identity: Mapping[str, Any],
) -> None:
    """Write `training_state/` into a step folder whose other files are there.

    Args:
        folder: the step folder.
        moments: of the optimizer, see `moments`.
        master: fp32 weights by parameter; None where the checkpoint itself is fp32.
        step: updates made.
        identity: of the run, see TrainConfig.identity.
    """
    (folder / STATE).mkdir()
    save_file(dict(moments), folder / STATE / "optimizer.safetensors")
    if master is not None:
        save_file(dict(master), folder / STATE / "master.safetensors")
    files = {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    document = {"format": _FORMAT, "step": step, "master": master is not None, "identity": identity}
    document |= {"torch": torch.__version__, "files": files}
    (folder / STATE / "state.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_identity(folder: Path) -> dict[str, Any]:
    """The identity of the run that wrote a step folder.

    Raises:
        CheckpointError: state.json is absent, damaged or of another format.
    """
    document = read_json(folder / STATE / "state.json")
    if document.get("format") != _FORMAT or not isinstance(document.get("identity"), dict):
        raise CheckpointError(f"{folder / STATE} was made by another version of moetool")
    return dict(document["identity"])


@torch.no_grad()
def load_training_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, advice: str) -> None:
    """Put the master weights and moments of a step folder into a model and its optimizer.

    Args:
        folder: the step folder.
        model: not wrapped; its parameters may be sharded.
        optimizer: over its parameters.
        advice: what to do when they do not fit.

    Raises:
        CheckpointError: they are absent, damaged, or of a model with other parameters.
    """
    parameters = dict(model.named_parameters())
    try:
        stored = load_file(folder / STATE / "optimizer.safetensors")
        weights: dict[str, Tensor] = {}
        master = folder / STATE / "master.safetensors"
        # Without them a rounded model would be trained on; the first step folders did not say that they have them.
        if read_json(folder / STATE / "state.json").get("master", master.exists()):
            weights = load_file(master)
            if absent := sorted(parameters.keys() - weights.keys()):
                raise ValueError(f"master.safetensors holds no {absent[0]}")
        for name, weight in weights.items():
            _fitting(name, weight, parameters)
            parameters[name].copy_(share(weight, parameters[name]))
        with_moments = set()
        for key, value in stored.items():
            name, _, moment = key.rpartition("/")
            with_moments.add(name)
            parameter = _fitting(name, value, parameters)
            optimizer.state[parameter][moment] = share(value, parameter)
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        if absent := sorted(trained - with_moments):
            raise ValueError(f"optimizer.safetensors holds nothing for {absent[0]}")
    except Exception as error:  # safetensors' own errors, absent files, shapes: all mean the same to the user
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder / STATE} cannot be used ({type(error).__name__}: {reason}); {advice}") from None


def _fitting(name: str, value: Tensor, parameters: Mapping[str, nn.Parameter]) -> nn.Parameter:
    """The parameter of a name, which a tensor (or a single number) must fit."""
    if name not in parameters:
        raise ValueError(f"the model has no {name}")
    if value.ndim and value.shape != parameters[name].shape:
        raise ValueError(f"{name} has shape {list(value.shape)}, the model's {list(parameters[name].shape)}")
    return parameters[name]
