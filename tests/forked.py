"""`moetool` in processes of its own that start at once, forked from one that has imported everything.

A kill then falls into the work and not into imports, which take seconds. What runs is moetool's own `main`, on its
own arguments, streams and environment. That a process starts from nothing is tested with `tiny.cli`.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

TIMEOUT = 240.0
MOETOOL = "moetool.__main__:main"
PRELOAD = [
    "moetool.cli",
    "moetool.surgery.apply",
    "moetool.upcycle.plan",
    "moetool.average.plan",
    "moetool.grow.plan",
    "moetool.prune.choose",
    "moetool.prune.plan",
    "moetool.densify.plan",
    "moetool.calibration.measure",
    "moetool.train.build",
    "moetool.train.open",
    "moetool.evaluate.results",
    "moetool.evaluate.score_plots",
    "moetool.routing.analysis",
    "moetool.routing.plots",
    "moetool.sample.run",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOAD)
# Of the process that is forked, which must have no threads.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Done:
    """How a process ended: exit code (below 0: the signal), its standard output and error."""

    code: int
    out: str
    err: str

    def line(self, code: int = 1) -> str:
        """Its one line of error; fails if it ended otherwise."""
        assert self.code == code, (self.code, self.err)
        lines = self.err.strip().splitlines()
        assert "Traceback" not in self.err, self.err
        assert len(lines) == 1, self.err
        return lines[0]


class Running:
    """A process under way."""

    def __init__(self, process: ForkServerProcess, folder: Path) -> None:
        self._process, self._folder = process, folder
        assert process.pid is not None
        self.pid: int = process.pid

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def send(self, signum: int) -> None:
        if self.alive:
            os.kill(self.pid, signum)

    def wait(self, timeout: float = TIMEOUT) -> Done:
        """Its end; one that hangs is a failure."""
        self._process.join(timeout)
        if self.alive:
            self._process.kill()
            self._process.join()
            raise AssertionError(f"still running after {timeout:.0f} s: {self._folder}")
        out, err = ((self._folder / name).read_text(errors="replace") for name in ("out", "err"))
        return Done(self._process.exitcode or 0, out, err)


def _main(target: str, arguments: list[str], folder: str, place: str, environment: dict[str, str], before: str) -> None:
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(os.open(os.devnull, os.O_RDONLY)),
        os.fdopen(1, "w"),
        os.fdopen(2, "w", 1),
    )
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["moetool", *arguments]
    if before:
        module, _, rest = before.partition(":")
        function, _, argument = rest.partition(":")
        getattr(importlib.import_module(module), function)(argument)
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)()


def start(folder: Path, *arguments: object, target: str = MOETOOL, before: str = "", **environment: str) -> Running:
    """Start a process.

    Args:
        folder: that is made, and gets its streams.
        arguments: of the command line.
        target: the function that it runs, as module:name.
        before: a function that is called first, as module:name:argument.
        environment: beside that of this process.
    """
    folder.mkdir()
    words, surroundings = [str(argument) for argument in arguments], {**os.environ, **environment}
    given = (target, words, str(folder), os.getcwd(), surroundings, before)
    process = _CONTEXT.Process(target=_main, args=given)
    process.start()
    return Running(process, folder)


def together(processes: int, folder: Path, target: str, *arguments: object, **environment: str) -> None:
    """Run a function in processes that know of each other as torchrun tells them; all must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started = []
    for rank in map(str, range(processes)):
        mine = environment | world | {"RANK": rank, "LOCAL_RANK": rank}
        started.append(start(folder / f"streams-{port}-{rank}", *arguments, target=target, **mine))
    for running in started:
        done = running.wait(840)
        assert done.code == 0, done.err[-4000:]


def rename_slowly(_: str) -> None:
    """Have each file be followed by a pause, so that a kill falls between two of them on any machine."""
    replace = os.replace

    def slowly(source: Any, target: Any) -> None:
        replace(source, target)
        time.sleep(0.02)

    os.replace = slowly  # type: ignore[assignment]


def wait_until(true: Callable[[], bool], running: Running, timeout: float = 60) -> bool:
    """Wait until something is so; whether it became so before the process ended."""
    until = time.monotonic() + timeout
    while not true():
        if not running.alive or time.monotonic() > until:
            return true()
        time.sleep(0.001)
    return True
