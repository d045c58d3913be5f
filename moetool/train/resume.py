"""`training_state/` of a step folder, from which a run continues, and whether it is intact.

Fp32 master weights where the checkpoint's own dtype is another, the optimizer's moments, both safetensors
by parameter name, and state.json with a digest of every other file of the step folder. Nothing is
pickled. Tensors are whole, each in one file, so a run may go on with other processes and another sharding: each reads
what it needs of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moetool.checkpoint.file_digest import digest
from moetool.checkpoint.step_folder import STATE, STATE_FILE, STATE_FORMAT, read_state
from moetool.errors import CheckpointError, in_one_line
from moetool.train.assignment import FILES
from moetool.train.optimizer import parts, state_from
from moetool.train.ranks import ALONE, Ranks
from moetool.train.tensor_file import Stored, stored

# What to do when it does not fit: where a run goes on, and where it begins with another run's.
ADVICE = "delete that step folder to continue from the one before it"
FRESH = (
    "give a step folder of a run with the same layers and --moments that trained all that is trained now (--train-only,"
    " --freeze-router), or leave --keep-optimizer out"
)


def intact(folder: Path, ranks: Ranks = ALONE, within: str = "") -> dict[str, Any]:
    """The identity of the run that wrote a step folder, once all of its files are found unchanged.

    Args:
        folder: the step folder.
        ranks: the processes that share the files out; all must call, and all find the same.
        within: the part of it that counts; nothing: all.

    Raises:
        CheckpointError: names the first that is not.
    """
    identity, files = ranks.together(lambda: (read_identity(folder), _files(folder)) if ranks.is_main else ({}, {}))[0]
    names = [name for name in files if name.startswith(within)]
    verdicts: dict[str, str] = {}
    for found in ranks.gather({name: _damage(folder / name, files[name]) for name in names[ranks.rank :: ranks.size]}):
        verdicts |= found
    for name in names:
        if verdicts[name]:
            raise CheckpointError(f"{folder / name} {verdicts[name]}")
    return identity


def _files(folder: Path) -> dict[str, str]:
    """Digests of a step folder's files, by path."""
    return dict(read_state(folder)["files"])


def _damage(path: Path, recorded: str) -> str:
    try:
        if digest(path) == recorded:
            return ""
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({os.strerror(error.errno or 0).lower()})"
    return "is damaged (its bytes have changed since it was written)"


def moments(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's moments as (`parameter/moment`, tensor); all processes must walk through.

    Args:
        parameters: that it updates, by name.
        optimizer: over them.
    """
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            for part, tensor in parts(value):
                yield f"{name}/{key}{part}", tensor


def save(folder: Path, digests: Mapping[str, str], master: bool, step: int, identity: Mapping[str, Any]) -> None:
    """Write `state.json` into a step folder whose other files are there.

    Args:
        folder: the step folder.
        digests: of the files that hold tensors, by path.
        master: whether it holds fp32 weights beside the checkpoint's.
        step: updates made.
        identity: of the run, see TrainConfig.identity.
    """
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: digests.get(name) or digest(path) for name, path in paths.items()}
    document = {"format": STATE_FORMAT, "step": step, "master": master, "identity": identity}
    document |= {"torch": torch.__version__, "files": files}
    (folder / STATE).mkdir(exist_ok=True)
    (folder / STATE_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_identity(folder: Path) -> dict[str, Any]:
    """The identity of the run that wrote a step folder.

    Raises:
        CheckpointError: state.json is absent, damaged or of another format.
    """
    return dict(read_state(folder)["identity"])


@torch.no_grad()
def load_weights(folder: Path, model: nn.Module, advice: str) -> None:
    """Put the master weights of a step folder into a model, where it has some.

    Args:
        folder: the step folder.
        model: not wrapped, with all of its parameters.
        advice: what to do when they do not fit.

    Raises:
        CheckpointError: they are absent, damaged, or of a model with other parameters.
    """
    with _told(folder, advice), _stored(folder, "master") as weights:
        # Without them a rounded model would be trained on.
        if read_state(folder)["master"]:
            parameters = dict(model.named_parameters())
            if absent := sorted(parameters.keys() - weights.keys()):
                raise ValueError(f"the fp32 weights lack {absent[0]}")
            for name, weight in weights.items():
                parameter = _fitting(name, weight.shape, parameters)
                parameter.copy_(weight.read(parameter))


@torch.no_grad()
def load_moments(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, advice: str
) -> None:
    """Put the moments of a step folder into an optimizer.

    Args:
        folder: the step folder.
        parameters: that it updates, by name; they may be sharded.
        optimizer: over them.
        advice: what to do when they do not fit.

    Raises:
        CheckpointError: they are absent, damaged, or of a model with other parameters.
    """
    with _told(folder, advice), _stored(folder, "optimizer") as moments:
        found: dict[nn.Parameter, dict[str, Stored]] = {}
        for key, value in moments.items():
            name, _, moment = key.rpartition("/")
            # Scales of a moment of 8 bits have a shape of their own.
            free = not value.shape or moment.partition(".")[2] in ("scale", "qmap")
            parameter = _fitting(name, None if free else value.shape, parameters)
            if parameter.requires_grad:  # a router may have been frozen since
                found.setdefault(parameter, {})[moment] = value
        trained = (name for name, parameter in parameters.items() if parameter.requires_grad)
        if absent := sorted(name for name in trained if parameters[name] not in found):
            raise ValueError(f"the optimizer's state holds nothing for {absent[0]}")
        for parameter, values in found.items():
            optimizer.state[parameter] = state_from(optimizer, parameter, values)


@torch.no_grad()
def load_balance(folder: Path, states: Mapping[str, Tensor], advice: str) -> None:
    """Restore the state of balance strategies.

    Args:
        folder: the step folder.
        states: by name; are written to.
        advice: what to do when they do not fit.

    Raises:
        CheckpointError: they are absent, damaged, or of another model.
    """
    if not states:
        return
    with _told(folder, advice), _stored(folder, "balance") as found:
        for name, state in states.items():
            if name not in found or (found[name].shape, found[name].dtype) != (tuple(state.shape), state.dtype):
                raise ValueError(f"it holds no {name} of this model")
            state.copy_(found[name].read(state))


@contextmanager
def _stored(folder: Path, kind: str) -> Iterator[dict[str, Stored]]:
    """The tensors of a kind of files (see `assignment.FILES`), by name."""
    start = FILES[kind].partition("{")[0]
    with stored(folder / name for name in sorted(_files(folder)) if name.startswith(start)) as tensors:
        yield tensors


@contextmanager
def _told(folder: Path, advice: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # safetensors' own errors, absent files, shapes: all mean the same to the user
        reason = in_one_line(error)
        raise CheckpointError(f"{folder / STATE} cannot be used ({type(error).__name__}: {reason}); {advice}") from None


def _fitting(name: str, shape: tuple[int, ...] | None, parameters: Mapping[str, nn.Parameter]) -> nn.Parameter:
    """The parameter of a name, which a tensor of that shape must fit; None: any shape does."""
    if name not in parameters:
        raise ValueError(f"the model has no {name}")
    wanted = parameters[name].shape
    if shape is not None and shape != tuple(wanted):
        raise ValueError(f"{name} has shape {list(shape)}, the model's {list(wanted)}")
    return parameters[name]
