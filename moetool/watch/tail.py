"""A file that another process appends to, perhaps on another machine: its complete lines, each once."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

_MARK = 64  # bytes before the place read to, by which a replaced file is known
_PIECE = 1 << 22
_END = 1 << 16  # bytes of a sample that are read whole
_LONGEST = 1 << 26  # bytes of a line; a longer one, in a damaged file, is given in pieces, which are no rows
_SAMPLED = 1 << 20  # bytes of a line in a sample


class Found(NamedTuple):
    """The result of a look at the file.

    Attributes:
        anew: it is another file than before, or a shorter one: what was read earlier no longer counts.
        lines: complete lines that were not given before. To be read before the next look.
    """

    anew: bool
    lines: Iterator[bytes]


class Tail:
    """Reads a file from where it stopped the last time. Opened for each look, as a network file system needs.

    Attributes:
        changed: when the file was last written, in seconds since 1970; None where there is no file.
        size: of the file, in bytes.
        read: how many of its bytes have been given as lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changed: float | None = None
        self.size = self.read = 0
        self._id: tuple[int, int] | None = None
        self._mark = b""

    def look(self) -> Found:
        """The lines since the last look; a line without its end waits for the next one."""
        try:
            file = open_regular(self.path)
        except OSError:
            gone = self._id is not None
            self.changed, self.size, self.read, self._id, self._mark = None, 0, 0, None, b""
            return Found(gone, iter(()))
        status = os.fstat(file.fileno())
        self.changed, self.size = status.st_mtime, status.st_size
        anew = (status.st_dev, status.st_ino) != self._id or self.size < self.read or not self._continues(file)
        if anew:
            self._id, self.read, self._mark = (status.st_dev, status.st_ino), 0, b""
        return Found(anew, self._lines(file))

    def _continues(self, file: IO[bytes]) -> bool:
        file.seek(self.read - len(self._mark))
        return file.read(len(self._mark)) == self._mark

    def _lines(self, file: IO[bytes]) -> Iterator[bytes]:
        with file:
            file.seek(self.read)
            rest = b""
            while piece := file.read(_PIECE):
                whole, end, rest = (rest + piece).rpartition(b"\n")
                if end:
                    self.read += len(whole) + 1
                    self._mark = (whole + end)[-_MARK:]
                    yield from whole.split(b"\n")
                elif len(rest) > _LONGEST:
                    self.read, self._mark = self.read + len(rest), rest[-_MARK:]
                    yield rest
                    rest = b""

    def sample(self, count: int) -> Iterator[bytes]:
        """About so many complete lines, evenly spread, and the last ones; `look` gives them again.

        Takes as long for a large file as for a small one.
        """
        try:
            file = open_regular(self.path)
        except OSError:
            return
        with file:
            status = os.fstat(file.fileno())
            self.changed, size = status.st_mtime, status.st_size
            for i in range(count):
                file.seek(size * i // count)
                if i:
                    file.readline(_SAMPLED)  # the rest of a line
                line = file.readline(_SAMPLED)
                if line.endswith(b"\n"):
                    yield line
            file.seek(max(0, size - _END))
            yield from file.read().split(b"\n")[1:-1]


def open_regular(path: Path) -> IO[bytes]:
    """Open a file that is neither a pipe nor a device, which could block or have no end.

    Raises:
        OSError: it is one, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a file")
    return os.fdopen(descriptor, "rb")
