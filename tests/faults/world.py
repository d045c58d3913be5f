"""What faults are done to: tiny models and texts, and `moetool` in processes of its own (tests/forked.py)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests import forked
from tests.forked import Done, Running


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
        if not (self.folder / "made").exists():
            made = forked.start(self.new(), self.folder, target="tests.faults.models:main").wait()
            assert made.code == 0, made.err
            (self.folder / "made").touch()

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
        return forked.start(self.new(), *arguments, before=before, **environment)

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
            "convert": ["convert", self.moe, out, "--max-shard-size", "200KB"],
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
            "convert": [["convert", moe, out, "--layout", "fused"], ["convert", large, out, "--dtype", "fp16"]],
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
