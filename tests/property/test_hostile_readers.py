"""Whatever a file from outside holds, its reader takes it or refuses it in one line, in bounded time and memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from moetool.errors import DataError
from tests.fuzz.mutate import mutate
from tests.fuzz.targets import Target, attempt, bounded, targets
from tests.hostile import in_child

KINDS = (
    "config", "header", "index", "lineage", "options", "counts", "jsonl", "json list", "csv", "zstd", "plain", "gzip",
    "parquet", "arrow", "manifest", "offsets", "tokens", "metrics", "summary", "state", "kept score", "tokenizer",
    "tokenizer config",
)  # fmt: skip
# What reads them could take pytest along.
NATIVE = ("zstd", "gzip", "parquet", "arrow", "tokenizer", "tokenizer config")
FAST, SLOW = 40, 4000
SLOWER = {"options": 8, "tokenizer config": 20}  # a whole command line or tokenizer each


@pytest.fixture(scope="module")
def every(llama: Path, mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    """All targets, on a disk in memory where there is one."""
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield targets(llama, mixtral, Path(folder))


def test_every_kind_is_searched(every: dict[str, Target]) -> None:
    assert tuple(every) == KINDS
    assert tuple(name for name, target in every.items() if target.child) == NATIVE


def search(target: Target, examples: int) -> None:
    """Hypothesis draws, and shrinks, every choice of the mutation."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(st.sampled_from(target.seeds), st.randoms(use_true_random=False))
    def read(seed: bytes, random: Random) -> None:
        with bounded():
            attempt(target, mutate(seed, random, target.as_json))

    read()


def search_in_child(target: Target, name: str, examples: int) -> None:
    random = Random(name)

    def read() -> int:
        for _ in range(examples):
            attempt(target, mutate(random.choice(target.seeds), random, target.as_json))
        return 0

    outcome = in_child(read, megabytes=1500, seconds=300 + examples // 4)  # one takes 0.05 s, longer on busy cores
    assert outcome.code == 0, f"exit {outcome.code}: {outcome.err[-2000:]}"


@pytest.mark.parametrize("name", [name for name in KINDS if name not in NATIVE])
def test_a_reader_takes_or_refuses(every: dict[str, Target], name: str) -> None:
    attempt(every[name], every[name].seeds[0])
    search(every[name], SLOWER.get(name, FAST))


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_reader_does_not_crash(every: dict[str, Target], name: str) -> None:
    assert attempt(every[name], every[name].seeds[0])
    search_in_child(every[name], name, SLOWER.get(name, 2 * FAST))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_reader_takes_or_refuses_thousands(every: dict[str, Target], name: str) -> None:
    if name in NATIVE:
        search_in_child(every[name], f"slow {name}", SLOW)
    else:
        search(every[name], SLOW // 10 if name in SLOWER else SLOW)


def test_offsets_whose_differences_overflow(every: dict[str, Target]) -> None:
    offsets = np.frombuffer(every["offsets"].seeds[0], "<i8").copy()
    offsets[1], offsets[2] = 2**62 + 2**61, -(2**62)  # the difference wraps around to a positive one
    with pytest.raises(DataError, match="does not match"):
        every["offsets"].read(offsets.tobytes())


def test_a_score_that_only_looks_like_a_standard_error(every: dict[str, Target]) -> None:
    seed = every["kept score"].seeds[0]
    assert b"bits_per_byte_stderr,none" in seed
    every["kept score"].read(seed.replace(b"bits_per_byte_stderr,none", b"bits_stderr_per_byte,none"))
