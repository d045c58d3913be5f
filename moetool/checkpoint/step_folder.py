"""The folders of a training run as sources: its step folders, the fp32 weights in them, and its snapshots."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moetool.checkpoint.reader import CheckpointReader, TensorInfo, read_header
from moetool.errors import CheckpointError
from moetool.outside import read_json

STEPS, WEIGHTS, AVERAGE, STATE = "checkpoints", "weights", "average", "training_state"


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
        self.masters = read_masters(folder, files)
        self.shards = [*self.shards, *files]


def read_masters(folder: Path, files: Sequence[str]) -> dict[str, TensorInfo]:
    """The tensors of some files of a step folder, by name.

    Raises:
        CheckpointError: a file is damaged.
    """
    return {name: replace(info, shard=file) for file in files for name, info in read_header(folder / file)[0].items()}
