"""`training_state/` of a step folder: what a run goes on from, and whether it is as it was written.

Fp32 master weights where the checkpoint's own dtype is another, the optimizer's moments, both safetensors
by parameter name, and state.json with a digest of every other file of the step folder. Nothing is
pickled. Tensors are whole, so a run may go on with another number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moetool.errors import CheckpointError
from moetool.outside import fits, read_json
from moetool.train import tensor_file
from moetool.train.accelerator import share
from moetool.train.optimizer import parts, state_from

STATE = "training_state"
_FORMAT = 1
# What to do when it does not fit: where a run goes on, and where it begins with another run's.
ADVICE = "delete that step folder to continue from the one before it"
FRESH = "give a step folder of a run with the same layers, or leave --keep-optimizer out"


def intact(folder: Path, within: str = "") -> dict[str, Any]:
    """The identity of the run that wrote a step folder, once all of its files are found unchanged.

    Args:
        folder: the step folder.
        within: the part of it that counts; nothing: all.

    Raises:
        CheckpointError: names the first that is not.
    """
    identity = read_identity(folder)
    files = read_json(folder / STATE / "state.json").get("files", {})
    if not fits(files, {"*": str}):
        raise CheckpointError(f"{folder / STATE / 'state.json'} is damaged (files)")
    for name, digest in files.items():
        if not name.startswith(within):
            continue
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if tensor_file.digest(path) != digest:
            raise CheckpointError(f"{path} is damaged (its bytes have changed since it was written)")
    return identity


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


def save(
    folder: Path,
    moments: Mapping[str, Tensor],
    master: Mapping[str, Tensor] | None,
    step: int,
    identity: Mapping[str, Any],
    go_on: Callable[[], None] = lambda: None,
) -> None:
    """Write `training_state/` into a step folder whose other files are there.

    Args:
        folder: the step folder.
        moments: of the optimizer, see `moments`.
        master: fp32 weights by parameter; None where the checkpoint itself is fp32.
        step: updates made.
        identity: of the run, see TrainConfig.identity.
        go_on: called between pieces of work; may raise.
    """
    tensors = {"optimizer.safetensors": moments} | ({"master.safetensors": master} if master is not None else {})
    others = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    (folder / STATE).mkdir()
    with ThreadPoolExecutor() as pool:
        digests = {path: pool.submit(tensor_file.digest, path, go_on) for path in others}
        for name, named in sorted(tensors.items()):
            digests[folder / STATE / name] = pool.submit(tensor_file.write, folder / STATE / name, named, go_on)
    files = {str(path.relative_to(folder)): digest.result() for path, digest in digests.items()}
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
def load_weights(folder: Path, model: nn.Module, advice: str) -> None:
    """Put the master weights of a step folder into a model, where it has some.

    Args:
        folder: the step folder.
        model: not wrapped, with all of its parameters.
        advice: what to do when they do not fit.

    Raises:
        CheckpointError: they are absent, damaged, or of a model with other parameters.
    """
    parameters = dict(model.named_parameters())
    with _told(folder, advice):
        master = folder / STATE / "master.safetensors"
        # Without them a rounded model would be trained on; the first step folders did not say that they have them.
        if read_json(folder / STATE / "state.json").get("master", master.exists()):
            weights = load_file(master)
            if absent := sorted(parameters.keys() - weights.keys()):
                raise ValueError(f"master.safetensors holds no {absent[0]}")
            for name, weight in weights.items():
                _fitting(name, weight, parameters).copy_(weight)


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
    with _told(folder, advice):
        found: dict[nn.Parameter, dict[str, Tensor]] = {}
        for key, value in load_file(folder / STATE / "optimizer.safetensors").items():
            name, _, moment = key.rpartition("/")
            # Scales of a moment of 8 bits have a shape of their own.
            fitting = torch.zeros(()) if moment.partition(".")[2] in ("scale", "qmap") else value
            parameter = _fitting(name, fitting, parameters)
            if parameter.requires_grad:  # a router may have been frozen since
                found.setdefault(parameter, {})[moment] = value
        trained = (name for name, parameter in parameters.items() if parameter.requires_grad)
        if absent := sorted(name for name in trained if parameters[name] not in found):
            raise ValueError(f"optimizer.safetensors holds nothing for {absent[0]}")
        for parameter, values in found.items():
            optimizer.state[parameter] = state_from(optimizer, parameter, values, share)


@contextmanager
def _told(folder: Path, advice: str) -> Iterator[None]:
    try:
        yield
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
