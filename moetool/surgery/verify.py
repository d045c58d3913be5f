"""Verification: re-open the written files and check them against the plan and the sources."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.reader import BlockFile, CheckpointReader
from moetool.checkpoint.shard import check_written
from moetool.checkpoint.step_folder import in_state
from moetool.errors import CheckpointError
from moetool.progress import Progress, silent
from moetool.recipe import PROJECTIONS
from moetool.surgery.digests import BlockDigest, Digests, block_digest
from moetool.surgery.examine import hash_shards
from moetool.surgery.fill import Fill, Place
from moetool.surgery.kinds import Block, Drawn, Kind
from moetool.surgery.moments import FALSE_ALARMS, FAR, Sums, bound, resolution, standard_errors
from moetool.surgery.plan import Plan
from moetool.surgery.recorded import check_config, check_files, check_recorded, check_shards
from moetool.surgery.rows import is_finite, raw_bytes, read_rows, select
from moetool.surgery.workers import run_jobs

SAMPLE_ROWS = 16  # rows of each tensor that a quick check compares
SAMPLE_BYTES = 200_000  # of a full check take as long as one sample


@dataclass
class Proof:
    """The checks that passed.

    Attributes:
        level: quick or full.
        tensors: tensors whose entries were compared.
        copied: entries found equal to what the sources give, bit for bit (rounded once where a factor or
            the dtype asks for it).
        files: files beside the weights whose SHA-256 was compared; 0 where moetool.json records none.
        redrawn_units: (layer, expert) pairs times units found changed; full only.
        worst_sigma: the largest distance of a drawn slice's mean or standard deviation from what was
            planned, in standard errors; full only.
        more: what the plan's own checks found.
    """

    level: str
    tensors: int = 0
    copied: int = 0
    files: int = 0
    redrawn_units: int = 0
    worst_sigma: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        keys = ("level", "tensors", "copied", "files", *("redrawn_units", "worst_sigma") * (self.level == "full"))
        return {key: getattr(self, key) for key in keys} | self.more


def verify(
    plan: Plan,
    readers: Sequence[CheckpointReader],
    out: Path,
    level: str,
    workers: int,
    progress: Progress = silent,
) -> Proof:
    """Prove a finished folder against its plan.

    quick: config, key set, every header, the digests of the small files, what the lineage records of the draws,
    and rows of every tensor.
    full: every entry. Kept entries equal what the sources give bit for bit, every changed unit differs
    from it, and the drawn numbers of each matrix have the planned mean and standard deviation (those of the
    slice that they replaced, say), within 5 standard errors (more where chance demands it, see `bound`):
    sigma / sqrt(n) and about sigma / sqrt(2n) for n normal values.

    Raises:
        CheckpointError: names the first thing that does not hold.
    """
    proof = Proof(level)
    check_config(plan, out)
    if set(CheckpointReader(out).tensors) != {tensor.name for tensor in plan.model_tensors}:
        raise CheckpointError(f"{out} does not hold the tensors that this recipe writes")
    check_written(out, plan.shards)
    proof.files = check_files(plan, out)
    check_recorded(plan, out)
    done, digests = 0, Digests()
    limit = bound(max(1, sum(len(fill.places) for fill in plan.fills if plan.kinds[fill.kind].drawn)))
    jobs = [(number, place) for number, fill in enumerate(plan.fills) for place in range(len(fill.places))]

    def work(job: tuple[int, int]) -> _Checked:
        fill, kind = plan.fills[job[0]], plan.kinds[plan.fills[job[0]].kind]
        place = fill.places[job[1]]
        drawn = kind.drawn(fill, place) if kind.drawn else None
        matrix = _Matrix(kind, readers, written, fill, place, plan.place_info(fill, place), drawn, limit)
        return _check_full(matrix) if level == "full" else _check_sample(matrix)

    def collect(job: tuple[int, int], checked: _Checked) -> None:
        nonlocal done
        proof.copied += checked.copied
        proof.redrawn_units += checked.redrawn_units
        proof.worst_sigma = max(proof.worst_sigma, checked.sigma)
        digests.add(checked.blocks)
        done += 1
        progress("verifying", done, len(jobs))

    size = plan.num_bytes if level == "full" else SAMPLE_BYTES * len(jobs)
    with BlockFile(out) as written:
        run_jobs(work, jobs, workers, size, collect)
        proof.more = plan.also(plan, written)
    proof.tensors = len(plan.tensors)
    if level == "full":
        check_shards(plan, out, digests)
    return proof


def check_sources(
    readers: Sequence[CheckpointReader],
    recorded: Sequence[Any],
    done_to_it: str,
    workers: int,
    progress: Progress = silent,
) -> None:
    """Compare the sources' files with the hashes in moetool.json.

    Args:
        readers: the sources.
        recorded: of each, shard -> SHA-256, if moetool.json is sound.
        done_to_it: what the operation did, such as `upcycled`.
        workers: processes.
        progress: reports files.

    Raises:
        CheckpointError: a file is absent, or not the one that was read.
    """
    hashes = hash_shards(readers, workers, progress)
    for reader, known, found in zip(readers, recorded, hashes, strict=True):
        for shard in reader.shards:
            if not isinstance(known, dict) or known.get(shard) != found[shard]:
                raise CheckpointError(
                    f"{reader.folder / shard} is not the file that was {done_to_it} (its SHA-256 differs)"
                )


@dataclass(frozen=True)
class _Matrix:
    """One place of one fill, and all that its check needs."""

    kind: Kind
    readers: Sequence[CheckpointReader]
    written: BlockFile
    fill: Fill
    place: Place
    info: TensorInfo
    drawn: Drawn | None
    limit: float  # standard errors

    @property
    def is_copy(self) -> bool:
        """Whether what it keeps comes from a source, or from a recipe alone; else it is drawn as a whole."""
        return bool(self.fill.sources) or self.kind.draw is None

    def changed(self, start: int, stop: int) -> torch.Tensor:
        """Positions of the drawn units in rows [start, stop)."""
        if self.drawn is None:
            return torch.empty(0, dtype=torch.int64)
        units = self.drawn.units
        return units if self.fill.axis == 1 else units[(units >= start) & (units < stop)] - start

    def compare(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Check the kept entries of some rows; return (expected, found, positions of drawn units)."""
        found = read_rows(self.written, self.info, start, stop)
        if not is_finite(found):
            raise CheckpointError(f"tensor {self.info.name} ({self.info.shard}) holds NaN or infinity")
        expected = self.kind.kept(Block(self.fill, self.place, 0, start, stop, self.readers))
        units = self.changed(start, stop)
        differ = found.view(_INTEGERS[found.itemsize]) != expected.view(_INTEGERS[found.itemsize])
        if len(units):
            mask = torch.ones(expected.shape[self.fill.axis], dtype=torch.bool)
            mask[units] = False
            differ &= mask.unsqueeze(1 - self.fill.axis)
        if differ.any():
            where = "holds kept units" if self.kind.drawn else "should be a copy"
            raise CheckpointError(
                f"tensor {self.info.name} ({self.info.shard}) {where}, but rows {start}-{stop - 1} differ from the"
                " source"
            )
        return expected, found, units


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _kept(expected: torch.Tensor, units: torch.Tensor, axis: int) -> int:
    return expected.numel() - len(units) * expected.shape[1 - axis]


@dataclass
class _Checked:
    """What one place adds to a `Proof`, and the digests of its blocks."""

    copied: int = 0
    redrawn_units: int = 0
    sigma: float = 0.0
    blocks: list[BlockDigest] = field(default_factory=list)


def _check_sample(matrix: _Matrix) -> _Checked:
    fill = matrix.fill
    rows = fill.shape[0] if fill.shape else 1
    if not fill.num_elements:
        return _Checked()
    # Another place in each tensor, the same in each run.
    key = f"{matrix.info.name}{matrix.place.start or ''}"
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    start = place % max(1, rows - SAMPLE_ROWS + 1)
    expected, _, units = matrix.compare(start, min(rows, start + SAMPLE_ROWS))
    return _Checked(_kept(expected, units, fill.axis) if matrix.is_copy else 0)


def _check_full(matrix: _Matrix) -> _Checked:
    fill, axis, drawn, checked = matrix.fill, matrix.fill.axis, matrix.drawn, _Checked()
    old, new, whole = Sums(), Sums(), Sums()
    changed = torch.zeros(fill.shape[axis] if drawn else 0, dtype=torch.bool)
    for start, stop in fill.blocks:
        expected, found, units = matrix.compare(start, stop)
        checked.blocks.append(block_digest(matrix.place, start * fill.row_length, raw_bytes(found)))
        if matrix.is_copy:
            checked.copied += _kept(expected, units, axis)
        if drawn is None:
            continue
        if drawn.whole:
            whole.add(expected)
        if len(units):
            before, after = select(expected, axis, units), select(found, axis, units)
            if matrix.is_copy:
                changed[units + (start if axis == 0 else 0)] |= (before != after).any(1 - axis)
            old.add(before)
            new.add(after.float() - before.float() if drawn.added else after)
    if drawn is None or not new.n:
        return checked
    num = int(changed.sum())
    mean, std = drawn.moments(old, whole)
    grid = resolution(found.dtype, max(math.hypot(old.rms, std), abs(mean)))
    width = fill.num_elements // fill.shape[axis]
    # A unit that is constant in the source (all entries equal) is redrawn to the same, noise below the
    # dtype's resolution is none, and one or two numbers may be drawn as they were.
    sure = std > FAR * grid and len(drawn.units) * (grid / std) ** width * len(fill.places) < FALSE_ALARMS / 1000
    if matrix.is_copy and num != len(drawn.units) and sure:
        raise CheckpointError(
            f"tensor {matrix.info.name}: {num} units differ from the source, but the recipe changes {len(drawn.units)}"
        )
    sigma = standard_errors((new.mean, new.std, new.n), (mean, std), grid)
    if sigma > matrix.limit:
        raise CheckpointError(
            f"tensor {matrix.info.name}: the drawn entries have mean {new.mean:.6g} and std {new.std:.6g},"
            f" but {mean:.6g} and {std:.6g} were planned: {sigma:.1f} standard errors apart"
        )
    checked.sigma = sigma
    # One of the three, so that each unit of the checkpoint counts once.
    if fill.projection == PROJECTIONS[0] and not in_state(matrix.place.tensor):
        checked.redrawn_units = num
    return checked
