"""Jobs on threads that end together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable

import torch


def in_threads(jobs: Iterable[Callable[[], None]], workers: int) -> None:
    """Run jobs, in order of start, on `workers` threads; the first error stops the rest and is raised."""
    jobs = list(jobs)
    pending = iter(jobs)
    lock, stop = threading.Lock(), threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        torch.set_num_threads(1)  # the threads here are the parallelism
        while not stop.is_set():
            try:
                with lock:
                    job = next(pending, None)
                if job is None:
                    return
                job()
            except BaseException as error:
                errors.append(error)
                stop.set()

    threads = [threading.Thread(target=work) for _ in range(min(workers, len(jobs)))]
    before = torch.get_num_threads()
    # Ctrl-C and SIGTERM are held back while threads start (one that is half started can neither be
    # joined nor left behind) and while they end; between the two they stop the work.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        for thread in threads:
            thread.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for thread in threads:
            thread.join()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        torch.set_num_threads(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    if errors:
        raise errors[0]
