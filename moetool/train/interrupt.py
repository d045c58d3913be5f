"""Ctrl-C and SIGTERM during training: noted, so that the step is finished and a checkpoint written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Noted:
    """The first signal that came; 0: none."""

    signum: int = 0


@contextmanager
def noting(tell: Callable[[], None]) -> Iterator[Noted]:
    """Note the first SIGINT or SIGTERM instead of acting on it; a second one acts at once.

    One that is ignored stays so: a shell script ignores Ctrl-C for the commands that it puts in the background.

    Args:
        tell: called when the first comes.

    Yields:
        What came. The caller hands it on with `signal.raise_signal` once the block is left.
    """
    noted = Noted()
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield noted
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    before = {signum: handler for signum, handler in before.items() if handler is not signal.SIG_IGN}

    def note(signum: int, frame: FrameType | None) -> None:
        if noted.signum:
            signal.signal(signum, before[signal.Signals(signum)])
            signal.raise_signal(signum)
        noted.signum = signum
        tell()

    for signum in before:
        signal.signal(signum, note)
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
