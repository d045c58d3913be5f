"""A folder that appears only when it is complete."""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from moetool.checkpoint.folder import naming


@contextmanager
def unfinished_beside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, removed unless it is renamed; leftovers of killed runs are removed too.

    A live run holds a lock (flock) on its own temporary folder, which the system drops when the process ends.
    If the file system has no such locks, nothing is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for old in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        with suppress(OSError), _opened(old) as descriptor:
            if time.time() - old.stat().st_mtime > 60 and _lock(descriptor):  # newer ones may not be locked yet
                shutil.rmtree(old)
    made = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.partial"
    made.mkdir()
    try:
        with _opened(made) as descriptor:
            _lock(descriptor)
            yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def durable(path: Path) -> Iterator[IO[bytes]]:
    """A new file that is on disk, not only in the system's memory, when the block ends."""
    with naming(path), path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
