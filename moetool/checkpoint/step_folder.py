"""The folders of a training run as sources: its step folders, and the fp32 weights in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moetool.checkpoint.reader import CheckpointReader, TensorInfo, read_header
from moetool.errors import CheckpointError
from moetool.outside import read_json

STEPS, STATE = "checkpoints", "training_state"


def step_folders(run: Path) -> list[Path]:
    """The step folders of a run, ascending; none where a folder is not a run's."""
    found = {
        int(match[1]): path for path in run.glob(f"{STEPS}/*") if (match := re.fullmatch(r"step-(\d+)", path.name))
    }
    return [found[step] for step in sorted(found)]


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
        self.masters = read_masters(folder, files)
        self.shards = [*self.shards, *files]


def read_masters(folder: Path, files: Sequence[str]) -> dict[str, TensorInfo]:
    """The tensors of some files of a step folder, by name.

    Raises:
        CheckpointError: a file is damaged.
    """
    return {name: replace(info, shard=file) for file in files for name, info in read_header(folder / file)[0].items()}
