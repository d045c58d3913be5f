"""What faults are done to: tiny models, texts, and `moetool` in processes of its own that start at once.

A process is forked from one that has imported everything, so that a kill falls into the work and not into
imports, which take seconds. What it runs is `moetool`'s own `main`, on its own arguments and streams.
"""

from __future__ import annotations

import hashlib
import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from random import Random
from typing import Any

TIMEOUT = 240.0
PRELOAD = [
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
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
]
_CONTEXT = multiprocessing.get_context("forkserver")


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
    """A `moetool` under way."""

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


def _main(arguments: list[str], folder: str, environment: dict[str, str], before: str) -> None:
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
    os.environ.update(environment)
    sys.argv = ["moetool", *arguments]
    if before:
        module, _, rest = before.partition(":")
        function, _, argument = rest.partition(":")
        getattr(importlib.import_module(module), function)(argument)
    from moetool.cli import main

    main()


@dataclass
class World:
    """Models and texts, made once, and a place for what commands write.

    Attributes:
        folder: of everything.
        known: what a fault has computed once, such as the result of an undisturbed run.
    """

    folder: Path
    known: dict[str, Any] = field(default_factory=dict)
    _number: int = 0

    def __post_init__(self) -> None:
        """Make models and texts in a process of its own: a fork of one with threads may hang."""
        self.folder.mkdir(parents=True, exist_ok=True)
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "MOETOOL_CACHE": str(self.folder / "cache"),
            "HF_HOME": str(self.folder / "hf"),
            "HF_DATASETS_CACHE": str(self.folder / "hf" / "datasets"),
        }
        _CONTEXT.set_forkserver_preload(PRELOAD)
        if not (self.folder / "made").exists():
            subprocess.run([sys.executable, "-m", "tests.faults.models", str(self.folder)], check=True)
            (self.folder / "made").touch()
        self.good("--version")  # the first waits for the imports

    @property
    def dense(self) -> Path:
        """A Llama in one file."""
        return self.folder / "dense"

    @property
    def shards(self) -> Path:
        """The same in several files, with an index."""
        return self.folder / "shards"

    @property
    def moe(self) -> Path:
        """A finished upcycling of it, in several files."""
        return self.folder / "moe"

    @property
    def text(self) -> Path:
        """JSONL."""
        return self.folder / "text.jsonl"

    def new(self) -> Path:
        """A path that nothing has."""
        self._number += 1
        return self.folder / f"try-{os.getpid()}-{self._number}"

    def start(self, *arguments: object, before: str = "", **environment: str) -> Running:
        """Start `moetool` with these arguments; it first calls `before`, a function as module:name:argument."""
        streams = self.new()
        streams.mkdir()
        words = [str(argument) for argument in arguments]
        process = _CONTEXT.Process(target=_main, args=(words, str(streams), environment, before))
        process.start()
        return Running(process, streams)

    def run(self, *arguments: object, before: str = "", **environment: str) -> Done:
        """Run it to its end."""
        return self.start(*arguments, before=before, **environment).wait()

    def good(self, *arguments: object, **environment: str) -> Done:
        """Run it; it must succeed."""
        done = self.run(*arguments, **environment)
        assert done.code == 0, done.err
        return done

    def commands(self, out: Path) -> dict[str, list[object]]:
        """A small job of each command that writes a folder."""
        data = f"text={self.text}"
        return {
            "upcycle": ["upcycle", self.dense, out, "--max-shard-size", "200KB"],
            "cpt": ["cpt", self.moe, out, "--train", f"new={self.text}", *STEPS],
            "tokenize": ["tokenize", self.text, "--out", out, "--tokenizer", self.dense],
            "analyze-routing": ["analyze-routing", self.moe, "--data", data, "--out", out, "--max-tokens", 2000],
            "eval": ["eval", self.moe, "--text", data, "--out", out, "--limit", 40, "--batch-size", 8],
            "quickstart": ["quickstart", out],
        }

    def rewriting(self, command: str, out: Path) -> list[list[object]]:
        """Jobs of a command that rewrites checkpoints, which take long enough to be disturbed."""
        large, moe = self.folder / "large", self.folder / "large-moe"
        data: list[object] = ["--data", f"text={self.text}", "--max-tokens", 500, "--seq-len", 16]
        jobs: dict[str, list[list[object]]] = {
            "upcycle": [["upcycle", large, out, *recipe] for recipe in RECIPES],
            "average": [["average", out, large, self.folder / "large-2"]],
            "grow": [["grow", moe, out, "--num-experts", 8, "--start", start] for start in ("double-k", "twins")],
            "prune": [["prune", moe, out, "--keep-experts", 3, *data]],
            "densify": [["densify", moe, out, "--keep-experts", 2, *data]],
        }
        return [[*job, "--verify", "none", "--quiet"] for job in jobs[command]]


RECIPES: list[list[object]] = [
    [],
    ["--target", "granitemoe", "--drop-index", "per-matrix"],
    ["--target", "glm4_moe", "--granularity", 4, "--num-experts", 12, "--top-k", 3],
    ["--target", "qwen2_moe", "--method", "scratch"],
]


STEPS: list[object] = ["--seq-len", 16, "--global-batch-size", 4, "--micro-batch-size", 2, "--max-steps", 24]
STEPS += ["--save-every", 5, "--eval-every", 12, "--val-fraction", 0.1, "--lr", 1e-3]


def wait_until(true: Callable[[], bool], running: Running, timeout: float = 60) -> bool:
    """Wait until something is so; whether it became so before the process ended."""
    until = time.monotonic() + timeout
    while not true():
        if not running.alive or time.monotonic() > until:
            return true()
        time.sleep(0.001)
    return True


def content(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def mounted(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A small disk (tmpfs), for root alone."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def remount(folder: Path, option: str) -> None:
    """Another size of such a disk, or `ro`."""
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may."""
    try:
        with mounted(folder / "mount", 64):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


Once = Callable[[World, Random], str]


@dataclass(frozen=True)
class Fault:
    """A row of the table: `once` does it once, at the chance of a generator, and says what happened.

    Attributes:
        name: of the fault.
        where: the command, or what else it is done to.
        once: raises AssertionError if something that must hold does not.
        tries: how often for docs/reliability.md.
        slow: one try takes long.
        mounts: it needs a disk of its own.
    """

    name: str
    where: str
    once: Once
    tries: int = 10
    slow: bool = False
    mounts: bool = False
