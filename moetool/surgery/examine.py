"""One pass over the sources: their files hashed, their units summed, NaN and infinity refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from moetool.checkpoint.reader import CheckpointReader, sha256_file
from moetool.errors import CheckpointError
from moetool.progress import Progress, silent
from moetool.surgery.fill import Fill, Piece, row_blocks
from moetool.surgery.kinds import EntrySums
from moetool.surgery.rows import TORCH_DTYPES, is_finite, read_rows
from moetool.surgery.workers import run_jobs
from moetool.values import FLOAT_DTYPES

BLOCKS_PER_JOB = 16


@dataclass
class Examined:
    """The result of one pass over the sources.

    Attributes:
        sha256: of each shard, for each source.
        sums: of the units of each piece that a `summed` fill is made of.
    """

    sha256: list[dict[str, str]] = field(default_factory=list)
    sums: dict[Piece, EntrySums] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """A job: a file to be hashed or, with a piece of it, rows of that to be looked at."""

    source: int
    shard: str
    size: int
    piece: Piece | None = None
    blocks: tuple[tuple[int, int], ...] = ()


def examine(
    fills: Sequence[Fill], readers: Sequence[CheckpointReader], workers: int, progress: Progress = silent
) -> Examined:
    """Read the sources: hash their files, sum their units where fills ask for it, and look for NaN and infinity.

    A hash needs a file from its first byte to its last, so one process makes it while others look at the file's
    rows. Both read it at about the same time, so that the disk reads it once.

    Raises:
        CheckpointError: a weight is not finite, or would not be in the target's dtype; names the tensor.
    """
    found = Examined([{} for _ in readers], _empty_sums(fills))
    uses: dict[Piece, list[Fill]] = {}
    for fill in fills:
        for piece in fill.sources:
            uses.setdefault(piece, []).append(fill)
    parts = [
        part for n, reader in enumerate(readers) for shard in reader.shards for part in _parts(n, reader, shard, uses)
    ]
    done, total = 0, sum(part.size for part in parts)

    def work(part: _Part) -> str | np.ndarray | None:
        folder = readers[part.source].folder
        return _look(readers[part.source], part, uses[part.piece]) if part.piece else _hash(folder / part.shard)

    def collect(part: _Part, result: str | np.ndarray | None) -> None:
        nonlocal done
        if isinstance(result, str):
            found.sha256[part.source][part.shard] = result
        elif part.piece and result is not None:
            units = slice(part.blocks[0][0], part.blocks[-1][1]) if _axis(uses[part.piece]) == 0 else slice(None)
            for whole, sums in zip(found.sums[part.piece], torch.from_numpy(result), strict=True):
                whole[units] = sums
        done += part.size
        progress("reading the source", done, total)

    run_jobs(work, parts, workers, total, collect)
    return found


def hash_shards(readers: Sequence[CheckpointReader], workers: int, progress: Progress = silent) -> list[dict[str, str]]:
    """SHA-256 of each shard, for each source."""
    found: list[dict[str, str]] = [{} for _ in readers]
    files = [(n, shard) for n, reader in enumerate(readers) for shard in reader.shards]

    def path(file: tuple[int, str]) -> Path:
        return readers[file[0]].folder / file[1]

    def collect(file: tuple[int, str], sha256: str) -> None:
        found[file[0]][file[1]] = sha256
        progress("hashing the source", sum(map(len, found)), len(files))

    run_jobs(lambda file: sha256_file(path(file)), files, workers, sum(path(f).stat().st_size for f in files), collect)
    return found


def unit_sums(readers: Sequence[CheckpointReader], piece: Piece, fill: Fill) -> EntrySums:
    """The sums of the units of one piece of a `summed` fill, as `examine` makes them."""
    rows = piece.info.shape[0]
    part = _Part(piece.source, piece.info.shard, 0, piece, tuple(row_blocks(rows, piece.info.num_elements // rows)))
    found = _look(readers[piece.source], part, [fill])
    assert found is not None
    return EntrySums(*torch.from_numpy(found))


def _empty_sums(fills: Iterable[Fill]) -> dict[Piece, EntrySums]:
    """Zeros, in one piece: small tensors that outlive the blocks between them would keep the allocator from ever
    giving those back, and memory would grow with the number of layers."""
    sizes = {piece: piece.info.shape[fill.axis] for fill in fills if fill.summed for piece in fill.sources}
    parts = torch.zeros((2, sum(sizes.values())), dtype=torch.float64).split(list(sizes.values()), dim=1)
    return {piece: EntrySums(*part) for piece, part in zip(sizes, parts, strict=True)}


def _parts(source: int, reader: CheckpointReader, shard: str, uses: Mapping[Piece, list[Fill]]) -> Iterator[_Part]:
    """The jobs of one file, in its order."""
    yield _Part(source, shard, (reader.folder / shard).stat().st_size)
    pieces = [piece for piece in uses if (piece.source, piece.info.shard) == (source, shard) and piece.info.size]
    for piece in sorted(pieces, key=lambda piece: piece.info.start):
        rows = piece.info.shape[0] if piece.info.shape else 1
        blocks = row_blocks(rows, piece.info.num_elements // rows)
        # A sum over rows depends on their order: it is made in one job.
        step = len(blocks) if _axis(uses[piece]) == 1 else BLOCKS_PER_JOB
        for first in range(0, len(blocks), step):
            some = tuple(blocks[first : first + step])
            yield _Part(source, shard, piece.info.size // rows * (some[-1][1] - some[0][0]), piece, some)


def _axis(fills: Iterable[Fill]) -> int | None:
    """On which a piece's units are summed; None where they are not."""
    return next((fill.axis for fill in fills if fill.summed), None)


def _hash(path: Path) -> str:
    """SHA-256 of a file. The hub's cache names what it fetched by its SHA-256, and a snapshot links to it."""
    sha256, name = sha256_file(path), path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", name) and name != sha256:
        raise CheckpointError(
            f"{path} is not the file that was fetched: its SHA-256 differs from its name in the hub's cache, {name};"
            f" delete {path.resolve()} and run the same command again"
        )
    return sha256


def _look(reader: CheckpointReader, part: _Part, fills: Sequence[Fill]) -> np.ndarray | None:
    """Refuse numbers that are not finite, or that would not be in the dtype of what is made of them.

    Returns:
        As EntrySums, of the part's units: float64 (2, units); None where they are not summed.
    """
    assert part.piece
    info, axis = part.piece.info, _axis(fills)
    first, last = part.blocks[0][0], part.blocks[-1][1]
    num_units = 0 if axis is None else last - first if axis == 0 else info.shape[1]
    sums = torch.zeros((2, num_units), dtype=torch.float64)
    for start, stop in part.blocks:
        rows = read_rows(reader, info, start, stop)
        if not is_finite(rows):
            raise CheckpointError(
                f"{reader.folder / info.shard}: tensor {info.name} holds NaN or infinity;"
                " nothing was written; fix the source or fetch it again"
            )
        for fill in fills:
            largest = max(1.0, fill.factor)
            overflows = fill.dtype in FLOAT_DTYPES and fill.dtype != "F32" and (fill.dtype != info.dtype or largest > 1)
            if overflows and not is_finite((rows.float() * largest).to(TORCH_DTYPES[fill.dtype])):
                raise CheckpointError(
                    f"{reader.folder / info.shard}: tensor {info.name} holds values that"
                    f" {FLOAT_DTYPES[fill.dtype]} cannot represent; nothing was written; choose another --dtype"
                )
        if axis is not None:
            wide = rows.double()
            units = slice(start - first, stop - first) if axis == 0 else slice(None)
            sums[0, units] += wide.sum(1 - axis)
            sums[1, units] += wide.square_().sum(1 - axis)
    return None if axis is None else sums.numpy()
