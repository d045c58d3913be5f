"""Jobs on forked processes, because threads of one process would wait for Python's lock."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import NoReturn, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")

BYTES_PER_WORKER = 16_000_000  # what takes about twice as long as to start a process and to end it
STOPPING = {signal.SIGINT, signal.SIGTERM}
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def run_jobs(
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int,
    size: int,
    collect: Callable[[Job, Result], None],
) -> None:
    """Do jobs in worker processes, and collect their results in this one, as they come.

    A worker is a fork of this process, so `work` may use anything that is there, but only its result comes back.
    Where there is little to do, it is done here.

    Args:
        work: one job, on one thread of torch.
        jobs: small, to be pickled; the next is taken, in this process, when a worker is free.
        workers: processes at most.
        size: bytes to be read or written in all jobs.
        collect: receives a job and its result.

    Raises:
        Exception: the first error of a job, or of this process; workers and what they do end with it.
        MemoryError: there was no memory for a worker, or the system has killed one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # workers inherit it
    try:
        if size < BYTES_PER_WORKER:
            for job in jobs:
                collect(job, work(job))
        else:
            _run_forked(work, jobs, min(workers, size // BYTES_PER_WORKER), collect)
    finally:
        torch.set_num_threads(threads)


def _run_forked(
    work: Callable[[Job], Result], jobs: Iterable[Job], workers: int, collect: Callable[[Job, Result], None]
) -> None:
    pending = iter(jobs)
    children: dict[Connection, int] = {}  # pipe to a worker -> its process
    busy: dict[Connection, Job] = {}

    @contextmanager
    def awake(worker: Connection) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            raise _why_ended(children.pop(worker)) from None

    def give(worker: Connection) -> None:
        for job in pending:
            busy[worker] = job
            with awake(worker):
                worker.send_bytes(pickle.dumps(job))
            return

    # Ctrl-C and SIGTERM are held back while workers start and end, so that none is left behind.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        _fork(work, workers, children)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for worker in children:
            give(worker)
        while busy:
            answered = wait([*busy])
            for worker in [worker for worker in busy if worker in answered]:
                with awake(worker):
                    answer = worker.recv_bytes()
                result, error, where = pickle.loads(answer)
                if error is not None:
                    raise error from _WorkerTraceback(where)
                job = busy.pop(worker)
                give(worker)  # before the result is dealt with, which takes time as well
                collect(job, result)
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        for worker, child in children.items():
            worker.close()
            os.kill(child, signal.SIGKILL)
        for child in children.values():
            with suppress(ChildProcessError):  # where nobody waits for children (SIGCHLD is ignored)
                os.waitpid(child, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _fork(work: Callable[[Job], Result], workers: int, children: dict[Connection, int]) -> None:
    libc, parent = ctypes.CDLL(None), os.getpid()
    try:
        for _ in range(workers):
            ours, theirs = Pipe()
            with warnings.catch_warnings():
                # Progress bars have a thread, which may hold their locks; a worker shows nothing.
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                try:
                    # The garbage collector writes to all objects that it visits. Frozen, it visits none of those that
                    # are there, and their pages stay shared.
                    gc.freeze()
                    for sibling in (ours, *children):
                        sibling.close()
                    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                    # Kept rather than given back: to get the pages of a block anew takes longer than to fill them.
                    libc.mallopt(M_MMAP_THRESHOLD, 2**25)
                    libc.mallopt(M_TRIM_THRESHOLD, 2**23)
                    if os.getppid() == parent:  # it may have died before it was watched
                        _serve(work, theirs)
                finally:
                    os._exit(0)
            theirs.close()
            children[ours] = child
    except OSError as error:
        raise MemoryError(f"worker {len(children) + 1} of {workers}: {os.strerror(error.errno or 0).lower()}") from None


def _serve(work: Callable[[Job], Result], pipe: Connection) -> NoReturn:
    """A worker's life; STOPPING signals stay held back, because it is its parent that ends it."""
    while True:
        job = pickle.loads(pipe.recv_bytes())
        try:
            answer = pickle.dumps((work(job), None, ""))
        except BaseException as error:
            answer = _as_answer(error)
        pipe.send_bytes(answer)


def _as_answer(error: BaseException) -> bytes:
    where = traceback.format_exc()
    try:
        answer = pickle.dumps((None, error, where))
        pickle.loads(answer)
    except Exception:  # not every class of errors can be pickled
        answer = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), where))
    return answer


class _WorkerTraceback(Exception):
    """Shown above a bug's own traceback."""

    def __str__(self) -> str:
        return f"in a worker:\n{self.args[0]}"


def _why_ended(child: int) -> Exception:
    """The error of a worker that ended without an answer."""
    code = -signal.SIGKILL
    with suppress(ChildProcessError):
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGKILL:
        return MemoryError("the system has killed a worker process")
    return RuntimeError(f"a worker process ended with code {code}")
