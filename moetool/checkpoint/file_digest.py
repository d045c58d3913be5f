"""The digest of a file of tensors: over its parts' digests, because tensors are written in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import xxhash

from moetool.checkpoint.header import read_header
from moetool.errors import CheckpointError

PIECE = 1 << 24  # bytes that are read or written at a time


def digest(path: Path, go_on: Callable[[], None] = lambda: None) -> str:
    """XXH3-128 over the XXH3-128 of a file's header and of each tensor, in hexadecimal digits.

    Tensors are written in any order, and each is hashed on its way. A file that is not safetensors is one part.

    Args:
        path: of the file.
        go_on: called between pieces of 16 MiB; may raise.
    """
    bounds = [0, path.stat().st_size]
    if path.suffix == ".safetensors":
        with suppress(CheckpointError):  # of a damaged header: as one part it has another digest
            tensors, _ = read_header(path)
            bounds[1:1] = [info.start for info in sorted(tensors.values(), key=lambda info: (info.start, info.size))]
    parts: list[bytes] = []
    with path.open("rb", buffering=0) as file:
        for begin, end in pairwise(bounds):
            hashed, left = xxhash.xxh3_128(), end - begin
            while left and (piece := file.read(min(left, PIECE))):
                go_on()
                hashed.update(piece)
                left -= len(piece)
            parts.append(hashed.digest())
    return joined(parts)


def joined(parts: Iterable[bytes]) -> str:
    """The digest of a file from those of its parts."""
    return xxhash.xxh3_128(b"".join(parts)).hexdigest()
