"""Commands of moetool, one after the other, in processes that are started once, and know of each other.

Starting takes most of the time of a small run. FILE, the argument of each process, holds a list of command lines; what
each process printed and returned is written beside it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tests import forked

ROOT = Path(__file__).parents[1]


class Done(NamedTuple):
    """What a command did in one process."""

    code: int
    stdout: str
    stderr: str


def environment(**more: str) -> dict[str, str]:
    """Of processes on a CPU that talk through gloo."""
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def launcher(processes: int, *module: str) -> list[str]:
    """The command that starts processes of a module."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*torchrun, "-m", *module]


def launch(processes: int, folder: Path, *commands: list[object]) -> list[list[Done]]:
    """Run commands; returns for each what it did in every process."""
    file = folder / f"commands-{processes}.json"
    file.write_text(json.dumps([[str(word) for word in command] for command in commands]))
    forked.together(processes, folder, "tests.launched:main", file, ACCELERATE_USE_CPU="true")
    results = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(processes)]
    return [[Done(*one) for one in each] for each in zip(*results, strict=True)]


def main() -> None:
    """What each process does."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from torch import distributed

    from tests import tiny

    # A second process group over the same store would wait for ever: all commands get the first one's.
    join = distributed.init_process_group

    def joined(*args: Any, **options: Any) -> None:
        if not distributed.is_initialized():
            join(*args, **options)

    distributed.init_process_group = joined
    distributed.destroy_process_group = PartialState.destroy_process_group = lambda *_, **__: None
    file, results = sys.argv[1], []
    for command in json.loads(Path(file).read_text()):
        results.append(tiny.in_process(*command))
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
    Path(f"{file}.{os.environ['RANK']}").write_text(json.dumps(results))
