"""The folders of a training run as sources: its step folders, the fp32 weights in them, and its snapshots."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moetool.checkpoint.file_digest import digest
from moetool.checkpoint.header import TensorInfo, read_header
from moetool.checkpoint.reader import CheckpointReader
from moetool.errors import CheckpointError
from moetool.outside import fits, read_json

STEPS, WEIGHTS, AVERAGE, STATE = "checkpoints", "weights", "average", "training_state"
METRICS, SUMMARY, PAGE = "metrics.jsonl", "summary.json", "run.html"  # of a run, beside them
STATE_FILE, STATE_FORMAT = f"{STATE}/state.json", 2
_KINDS = ("master", "optimizer")  # of files of tensors in a state
MASTER, OPTIMIZER = (f"{STATE}/{kind}.safetensors" for kind in _KINDS)  # their names, where there is one of each
_TENSORS = STATE + r"/(master|optimizer)(?:-\d{5}-of-\d{5})?\.safetensors"


def step_folders(run: Path, kind: str = STEPS) -> dict[int, Path]:
    """The folders of a run by step, ascending; none where a folder is not a run's.

    Args:
        run: its folder.
        kind: STEPS, which a run may go on from, or WEIGHTS, the snapshots of `--keep-weights`.
    """
    found = {
        int(match[1]): path for path in run.glob(f"{kind}/*") if (match := re.fullmatch(r"step-(\d{6,})", path.name))
    }
    return dict(sorted(found.items()))


class StepReader(CheckpointReader):
    """A checkpoint that may be a step folder.

    Attributes:
        masters: its fp32 weights by the names of the model's parameters; empty where the checkpoint has all there is.
    """

    def __init__(self, folder: Path, unpickle: bool = False) -> None:
        super().__init__(folder, unpickle)
        files = sorted(str(path.relative_to(folder)) for path in (folder / STATE).glob("master*.safetensors"))
        state = folder / STATE / "state.json"
        if not files and state.is_file() and read_json(state).get("master"):
            raise CheckpointError(f"{folder / STATE} has lost its fp32 weights (master*.safetensors); copy it again")
        self.masters = stored_tensors(folder, files)
        self.shards = [*self.shards, *files]


def stored_tensors(folder: Path, files: Sequence[str]) -> dict[str, TensorInfo]:
    """The tensors of some files of a step folder, by name.

    Raises:
        CheckpointError: a file is damaged.
    """
    return {name: replace(info, shard=file) for file in files for name, info in read_header(folder / file)[0].items()}


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a step folder: `identity` of the run, `step`, `master` (has it fp32 weights), digests of `files`.

    Raises:
        CheckpointError: it is absent, damaged or of another format.
    """
    document = read_json(folder / STATE_FILE)
    if document.get("format") != STATE_FORMAT or not isinstance(document.get("identity"), dict):
        raise CheckpointError(f"{folder / STATE} was made by another version of moetool")
    if not fits(document.get("files"), {"*": str}):
        raise CheckpointError(f"{folder / STATE_FILE} is damaged (files)")
    if type(document.get("master")) is not bool:
        raise CheckpointError(f"{folder / STATE_FILE} is damaged (master)")
    return document


def state_document(reader: TrainingReader, files: Collection[str], folder: Path) -> dict[str, bytes]:
    """state.json of another model in the place of the reader's, once the state's files are in a folder.

    Args:
        reader: of the step folder that the state comes from.
        files: that hold the state's tensors, by path.
        folder: where they are.
    """
    digests = {file: digest(folder / file) for file in files}
    document = {**(reader.state or {}), "master": MASTER in digests, "files": digests}
    return {STATE_FILE: json.dumps(document, indent=2).encode() + b"\n"}


def in_state(name: str) -> bool:
    """Whether a file, or a tensor that is named by its file, is part of a training state, not of the checkpoint."""
    return name.startswith(f"{STATE}/")


class TrainingReader(CheckpointReader):
    """A checkpoint that may be a step folder, with its training state.

    Attributes:
        state: state.json; None where there is none.
        eight_bit: whether its moments are blocks of 8 bits, which may span experts; they are then left out.
        stored: MASTER and OPTIMIZER -> the tensors of that kind by name; empty without a state.
    """

    def __init__(self, folder: Path, unpickle: bool = False) -> None:
        super().__init__(folder, unpickle)
        self.state = read_state(folder) if (folder / STATE_FILE).is_file() else None
        names = [re.fullmatch(_TENSORS, name) for name in sorted((self.state or {"files": ()})["files"])]
        kinds = {f"{STATE}/{kind}.safetensors": [n[0] for n in names if n and n[1] == kind] for kind in _KINDS}
        found = {kind: stored_tensors(folder, files) for kind, files in kinds.items() if files}
        self.eight_bit = any(name.endswith(".codes") for name in found.get(OPTIMIZER, ()))
        self.stored: dict[str, dict[str, TensorInfo]] = {} if self.eight_bit else found
        self.shards = [*self.shards, *(name for kind in self.stored for name in kinds[kind])]

    def check_state(self) -> None:
        """Refuse a training state that is not as it was written; reads all of it.

        Raises:
            CheckpointError: names the first file that is not.
        """
        for name in self.shards:
            if in_state(name) and digest(self.folder / name) != (self.state or {"files": {}})["files"][name]:
                raise CheckpointError(
                    f"{self.folder / name} is damaged (its bytes have changed since it was written); give another step"
                    " folder"
                )
