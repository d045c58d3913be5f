"""Jobs on forked processes: what they give, how they fail, and that none outlives the process that started them."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moetool.errors import CheckpointError
from moetool.surgery.workers import BYTES_PER_WORKER, run_jobs

LARGE = 100 * BYTES_PER_WORKER


def children(process: int | str = "self") -> list[str]:
    return Path(f"/proc/{process}/task/{process if process != 'self' else os.getpid()}/children").read_text().split()


def memory_of_all() -> int:
    """How much memory this process shares by name, in which semaphores would be as well."""
    return Path("/proc/self/maps").read_text().count("/dev/shm")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before, shared, threads = children(), memory_of_all(), torch.get_num_threads()
    yield
    assert children() == before
    assert memory_of_all() == shared
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("workers", "size"), [(1, 0), (1, LARGE), (2, LARGE), (5, LARGE), (10**6, 3 * BYTES_PER_WORKER)]
)
def test_every_job_is_done_once(workers: int, size: int) -> None:
    found: dict[int, tuple[int, int, int]] = {}

    def work(job: int) -> tuple[int, int, int]:
        time.sleep(0.001)
        return job * job, os.getpid(), torch.get_num_threads()

    run_jobs(work, range(50), workers, size, found.__setitem__)
    assert {job: square for job, (square, _, _) in found.items()} == {n: n * n for n in range(50)}
    processes = {process for _, process, _ in found.values()}
    assert processes == {os.getpid()} if not size else os.getpid() not in processes
    assert len(processes) == min(workers, max(1, size // BYTES_PER_WORKER))
    assert {threads for _, _, threads in found.values()} == {1}


def test_workers_search_nothing_for_garbage_that_was_there_and_leave_it_at_that() -> None:
    frozen = gc.get_freeze_count()
    assert frozen > 10_000  # modules (tests/conftest.py), as a command's Console freezes them
    searched: dict[int, int] = {}
    run_jobs(lambda _: gc.get_freeze_count(), [0], 2, LARGE, searched.__setitem__)
    assert searched[0] > frozen
    assert gc.get_freeze_count() == frozen


def test_the_next_job_is_taken_here_when_a_worker_is_free() -> None:
    taken: list[tuple[int, int]] = []  # job, results before it
    results: list[int] = []

    def jobs() -> Iterator[int]:
        for job in range(6):
            taken.append((job, len(results)))
            yield job

    run_jobs(lambda job: job, jobs(), 2, LARGE, lambda job, result: results.append(result))
    assert sorted(results) == [0, 1, 2, 3, 4, 5]
    assert [job for job, _ in taken] == [0, 1, 2, 3, 4, 5]
    assert all(job - before <= 2 for job, before in taken)


class Odd(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("odd")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (CheckpointError("tensor a holds NaN"), CheckpointError, "tensor a holds NaN"),
        (MemoryError("no block"), MemoryError, "no block"),
        (OSError(errno.ENOSPC, "No space", "/out/model.safetensors"), OSError, "/out/model.safetensors"),
        (Odd(1, 2), RuntimeError, "Odd: odd"),
        (SystemExit(3), SystemExit, "3"),
    ],
)
def test_the_first_error_ends_all_and_says_where_it_was(error: BaseException, kind: type, text: str) -> None:
    def work(job: int) -> None:
        if job == 3:
            raise error
        time.sleep(0 if job < 3 else 60)

    began = time.monotonic()
    with pytest.raises(kind, match=text) as raised:
        run_jobs(work, range(20), 4, LARGE, lambda job, result: None)
    assert time.monotonic() - began < 30
    assert getattr(raised.value, "filename", None) == getattr(error, "filename", None)
    assert "in work" in str(raised.value.__cause__)


def test_an_error_of_this_process_ends_the_workers() -> None:
    def collect(job: int, result: None) -> None:
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        run_jobs(lambda job: time.sleep(60 * job), range(4), 4, LARGE, collect)


@pytest.mark.parametrize(("signum", "kind"), [(signal.SIGKILL, MemoryError), (signal.SIGUSR1, RuntimeError)])
def test_a_worker_that_is_killed_is_told(signum: int, kind: type) -> None:
    def work(job: int) -> None:
        if job == 2:
            os.kill(os.getpid(), signum)
        time.sleep(0 if job < 2 else 60)

    with pytest.raises(kind, match="worker"):
        run_jobs(work, range(8), 3, LARGE, lambda job, result: None)


SLEEPERS = f"""
import signal, sys, time
from moetool.surgery.workers import run_jobs
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("ready", flush=True)
run_jobs(lambda job: time.sleep(600), range(3), 3, {LARGE}, lambda job, result: None)
"""


@pytest.mark.parametrize(
    ("signum", "group"),
    [(signal.SIGKILL, False), (signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGTERM, True)],
)
def test_no_worker_outlives_its_parent(signum: int, group: bool) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", SLEEPERS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        assert parent.stdout
        assert parent.stdout.readline() == b"ready\n"
        while len(workers := children(parent.pid)) < 3:
            time.sleep(0.01)
        time.sleep(0.2)
        (os.killpg if group else os.kill)(parent.pid, signum)
        parent.communicate(timeout=60)
        assert parent.returncode == {9: -9, 2: -2, 15: 143}[signum]
        until = time.monotonic() + 10
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        parent.kill()
