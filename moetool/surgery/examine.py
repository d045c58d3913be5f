"""One pass over the sources: their files hashed, their units summed, NaN and infinity refused."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from moetool.checkpoint.reader import CheckpointReader, TensorInfo
from moetool.errors import CheckpointError
from moetool.progress import Progress, silent
from moetool.surgery.fill import Fill, Piece, row_blocks
from moetool.surgery.kinds import UnitSums
from moetool.surgery.rows import TORCH_DTYPES, raw_bytes, read_rows
from moetool.surgery.threads import in_threads
from moetool.values import FLOAT_DTYPES

MAX_WAITING = 8  # stretches of a file that wait to be hashed


@dataclass
class Examined:
    """What one pass over the sources gives.

    Attributes:
        sha256: of each shard, for each source.
        sums: of the units of each piece that a `summed` fill is made of.
    """

    sha256: list[dict[str, str]] = field(default_factory=list)
    sums: dict[Piece, UnitSums] = field(default_factory=dict)


class _Hash:
    """SHA-256 of a file whose pieces one thread reads, in order, and any thread hashes."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._waiting: deque[memoryview] = deque()
        self._busy = threading.Lock()

    def feed(self, piece: memoryview) -> None:
        """Add the next piece."""
        self._waiting.append(piece)
        if len(self._waiting) > MAX_WAITING:
            self.work(wait=True)

    def work(self, wait: bool) -> None:
        """Hash what waits, unless another thread is at it and `wait` is false."""
        if self._busy.acquire(blocking=wait):
            try:
                while self._waiting:
                    self._sha256.update(self._waiting.popleft())
            finally:
                self._busy.release()

    def hexdigest(self) -> str:
        """Of all that was fed."""
        self.work(wait=True)
        return self._sha256.hexdigest()


def examine(
    fills: Sequence[Fill], readers: Sequence[CheckpointReader], workers: int, progress: Progress = silent
) -> Examined:
    """Read the sources once: hash their files, sum their units where fills ask for it, and look for NaN and infinity.

    A shard is read by one thread from its first byte to its last, because a hash and a sum of rows
    depend on the order; where threads are left, others hash what those have read.

    Raises:
        CheckpointError: a weight is not finite, or would not be in the target's dtype; names the tensor.
    """
    found = Examined([{} for _ in readers], _empty_sums(fills))
    uses: dict[Piece, list[Fill]] = {}
    for fill in fills:
        for piece in fill.sources:
            uses.setdefault(piece, []).append(fill)
    hashes = {(n, shard): _Hash() for n, reader in enumerate(readers) for shard in reader.shards}
    sizes = {(n, shard): (readers[n].folder / shard).stat().st_size for n, shard in hashes}
    done, total, left, lock = 0, sum(sizes.values()), len(hashes), threading.Lock()

    def read_shard(source: int, shard: str) -> None:
        nonlocal done, left
        reader, sha256 = readers[source], hashes[source, shard]
        pieces = [piece for piece in uses if (piece.source, piece.info.shard) == (source, shard)]
        try:
            for info, looked_at in _stretches(shard, sizes[source, shard], pieces):
                rows = info.shape[0] if info.shape else 1
                for start, stop in row_blocks(rows, info.num_elements // rows):
                    block = read_rows(reader, info, start, stop)
                    sha256.feed(raw_bytes(block))
                    for piece in looked_at:
                        _look(reader.folder, piece, uses[piece], block)
                        if piece in found.sums:
                            _add(found.sums[piece], block, uses[piece], start)
                    with lock:
                        done += block.nbytes
                        progress("reading the source", done, total)
            found.sha256[source][shard] = sha256.hexdigest()
            _check_name(reader.folder / shard, found.sha256[source][shard])
        finally:
            with lock:
                left -= 1

    def help_hashing() -> None:
        while left:
            for sha256 in hashes.values():
                sha256.work(wait=False)
            time.sleep(0.001)

    helpers = min(len(hashes), max(0, workers - len(hashes)))
    in_threads([*(partial(read_shard, *key) for key in hashes), *[help_hashing] * helpers], workers)
    return found


def _empty_sums(fills: Iterable[Fill]) -> dict[Piece, UnitSums]:
    """Zeros, in one piece: small tensors that outlive the blocks between them would keep the allocator from ever
    giving those back, and memory would grow with the number of layers."""
    sizes = {piece: piece.info.shape[fill.axis] for fill in fills if fill.summed for piece in fill.sources}
    parts = torch.zeros((2, sum(sizes.values())), dtype=torch.float64).split(list(sizes.values()), dim=1)
    return {piece: UnitSums(*part) for piece, part in zip(sizes, parts, strict=True)}


def _stretches(shard: str, size: int, pieces: Iterable[Piece]) -> Iterator[tuple[TensorInfo, list[Piece]]]:
    """A file from its first byte to its last: pieces that are used, and bytes between them that are not.

    Args:
        shard: its name.
        size: its bytes.
        pieces: which are used. Two may have the same bytes (tied weights), but they do not overlap otherwise.
    """
    position = 0
    by_start: dict[int, list[Piece]] = {}
    for piece in pieces:
        if piece.info.size:
            by_start.setdefault(piece.info.start, []).append(piece)
    for start, same in sorted(by_start.items()):
        assert start >= position, f"{same[0].info.name} overlaps another piece of {shard}"
        yield from _unused(shard, position, start)
        yield same[0].info, same
        position = start + same[0].info.size
    yield from _unused(shard, position, size)


def _unused(shard: str, start: int, stop: int) -> Iterator[tuple[TensorInfo, list[Piece]]]:
    if stop > start:
        yield TensorInfo("", "U8", (stop - start,), shard, start, stop - start), []


def _check_name(path: Path, sha256: str) -> None:
    """The hub's cache names what it fetched by its SHA-256, and a snapshot links to it."""
    name = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", name) and name != sha256:
        raise CheckpointError(
            f"{path} is not what was fetched: its SHA-256 is not {name}, by which the hub's cache names it; delete"
            f" {path.resolve()} and run the same command again"
        )


def _look(folder: Path, piece: Piece, fills: Iterable[Fill], rows: torch.Tensor) -> None:
    """Refuse numbers that are not finite, or that would not be in the dtype of what is made of them."""
    info, block = piece.info, rows.float()
    # A sum is finite unless an entry is not (or the sum overflows: then look at each entry).
    if not torch.isfinite(block.sum()) and not torch.isfinite(block).all():
        raise CheckpointError(
            f"{folder / info.shard}: tensor {info.name} holds NaN or infinity;"
            " nothing was written: mend or fetch the source again"
        )
    for fill in fills:
        largest = max(1.0, fill.factor)
        overflows = fill.dtype in FLOAT_DTYPES and fill.dtype != "F32" and (fill.dtype != info.dtype or largest > 1)
        if overflows and not torch.isfinite((block * largest).to(TORCH_DTYPES[fill.dtype])).all():
            raise CheckpointError(
                f"{folder / info.shard}: tensor {info.name} holds values that"
                f" {FLOAT_DTYPES[fill.dtype]} cannot; nothing was written: choose another --dtype"
            )


def _add(units: UnitSums, rows: torch.Tensor, fills: Iterable[Fill], start: int) -> None:
    """Add some rows of a piece, the first of which is row `start`, to the sums of its units."""
    axis = next(fill.axis for fill in fills if fill.summed)
    wide = rows.double()
    part = slice(None) if axis == 1 else slice(start, start + len(wide))
    units.sums[part] += wide.sum(1 - axis)
    units.squares[part] += wide.square_().sum(1 - axis)
