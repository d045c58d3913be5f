"""The proof: re-open what was written and hold it against the plan and the dense source."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moetool.checkpoint.reader import BlockFile, CheckpointReader, TensorInfo, sha256_file
from moetool.checkpoint.writer import check_written
from moetool.errors import CheckpointError
from moetool.progress import Progress, silent
from moetool.recipe import redrawn_units
from moetool.upcycle.blocks import Cache, kept_block
from moetool.upcycle.groups import split_share
from moetool.upcycle.layout import Fill
from moetool.upcycle.moments import FALSE_ALARMS, FAR, Sums, bound, resolution, standard_errors
from moetool.upcycle.plan import Plan
from moetool.upcycle.recorded import check_config, check_files, check_shards, check_units
from moetool.upcycle.run import Digests, note, place_info
from moetool.upcycle.source import in_threads, raw_bytes, read_rows

SAMPLE_ROWS = 16  # rows of each tensor that a quick check compares


@dataclass
class Proof:
    """What was checked.

    Attributes:
        level: quick or full.
        tensors: tensors whose entries were compared.
        copied: entries found equal to the source times the planned factor, bit for bit (rounded once
            where that or the dtype asks for it).
        files: files beside the weights whose SHA-256 was compared; 0 where moetool.json records none.
        redrawn_units: (layer, expert) pairs times units found changed; full only.
        worst_sigma: the largest distance of a drawn slice's mean or standard deviation from what was
            planned, in standard errors; full only.
        split_groups: share of random tokens for which logits that tie in the model's dtype split a
            group of experts; 0 where groups cannot tie.
    """

    level: str
    tensors: int = 0
    copied: int = 0
    files: int = 0
    redrawn_units: int = 0
    worst_sigma: float = 0.0
    split_groups: float = 0.0
    lock: Any = field(default_factory=threading.Lock, repr=False)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        keys = ("level", "tensors", "copied", "files", "redrawn_units", "worst_sigma", "split_groups")
        full_only = ("redrawn_units", "worst_sigma")
        return {key: getattr(self, key) for key in keys if self.level == "full" or key not in full_only}


def verify(
    plan: Plan,
    readers: Sequence[CheckpointReader],
    out: Path,
    level: str,
    workers: int,
    progress: Progress = silent,
) -> Proof:
    """Prove a finished folder against its plan.

    quick: config, key set, every header, the digests of the small files, the redrawn units' checksums, and
    rows of every tensor.
    full: every entry. Kept entries equal the source (times the planned factor) bit for bit, every
    changed unit differs from it, and each redrawn slice has the mean and standard deviation of the
    slice it replaced, within 5 standard errors (more where chance demands it, see `bound`):
    sigma / sqrt(n) and about sigma / sqrt(2n) for n normal values. Added noise and what is drawn from
    scratch are held against their planned moments in the same way.

    Raises:
        CheckpointError: names the first thing that does not hold.
    """
    proof = Proof(level)
    check_config(plan, out)
    if set(CheckpointReader(out).tensors) != {tensor.name for tensor in plan.tensors}:
        raise CheckpointError(f"{out} does not hold the tensors that this recipe writes")
    check_written(out, plan.shards)
    proof.files = check_files(plan, out)
    check_units(plan, out)
    done = 0
    digests: Digests = {}
    limit = bound(sum(len(fill.places) for fill in plan.fills if fill.kind in ("expert", "normal")))

    def check(fill: Fill) -> None:
        nonlocal done
        for expert in range(len(fill.places)):
            matrix = _Matrix(plan, readers, written, fill, expert, place_info(plan, fill, expert), limit)
            if level == "full":
                _check_full(matrix, proof, digests)
            else:
                _check_sample(matrix, proof)
        with proof.lock:
            done += 1
            progress("verifying", done, len(plan.fills))

    with BlockFile(out) as written:
        in_threads([partial(check, fill) for fill in plan.fills], workers)
        proof.split_groups = split_share(plan, written)
    proof.tensors = len(plan.tensors)
    if level == "full":
        check_shards(plan, out, digests)
    return proof


def check_source(reader: CheckpointReader, recorded: Any, progress: Progress = silent) -> None:
    """Compare the source's files with the hashes in moetool.json.

    Raises:
        CheckpointError: a file is absent, or not the one that was upcycled.
    """
    recorded = recorded if isinstance(recorded, dict) else {}
    for done, shard in enumerate(reader.shards):
        progress("hashing the source", done, len(reader.shards))
        if recorded.get(shard) != sha256_file(reader.folder / shard):
            raise CheckpointError(f"{reader.folder / shard} is not the file that was upcycled (its SHA-256 differs)")
    progress("hashing the source", len(reader.shards), len(reader.shards))


@dataclass(frozen=True)
class _Matrix:
    """One place of one fill, and all that its check needs."""

    plan: Plan
    readers: Sequence[CheckpointReader]
    written: BlockFile
    fill: Fill
    expert: int
    info: TensorInfo
    limit: float  # standard errors

    @property
    def axis(self) -> int:
        """On which units lie."""
        return 1 if self.fill.projection == "down" else 0

    def changed(self, start: int, stop: int) -> torch.Tensor:
        """Positions of the changed units in rows [start, stop) (columns, for down)."""
        fill, plan = self.fill, self.plan
        if fill.kind != "expert" or fill.layer is None or fill.projection is None:
            return torch.empty(0, dtype=torch.int64)
        units = redrawn_units(plan.recipe, fill.layer, self.expert, fill.projection, plan.num_units)
        return units if self.axis == 1 else units[(units >= start) & (units < stop)] - start

    def compare(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Check the kept entries of some rows; return (expected, found, positions of changed units)."""
        found = read_rows(self.written, self.info, start, stop)
        if not torch.isfinite(found).all():
            raise CheckpointError(f"tensor {self.info.name} ({self.info.shard}) holds NaN or infinity")
        if self.fill.kind == "normal":
            return found, found, torch.empty(0, dtype=torch.int64)
        cache: Cache = {}
        expected = kept_block(self.plan, self.readers, self.fill, self.expert, start, stop, cache)
        units = self.changed(start, stop)
        same = found.view(_INTEGERS[found.itemsize]) == expected.view(_INTEGERS[found.itemsize])
        mask = torch.ones(expected.shape[self.axis], dtype=torch.bool)
        mask[units] = False
        kept = same[mask] if self.axis == 0 else same[:, mask]
        if not kept.all():
            where = "holds kept units" if self.fill.kind == "expert" else "was to be copied"
            raise CheckpointError(
                f"tensor {self.info.name} ({self.info.shard}) {where}, but rows {start}-{stop - 1} differ from the"
                " source"
            )
        return expected, found, units


_INTEGERS = {2: torch.int16, 4: torch.int32}


def _kept(expected: torch.Tensor, units: torch.Tensor, axis: int) -> int:
    return expected.numel() - len(units) * expected.shape[1 - axis]


def _check_sample(matrix: _Matrix, proof: Proof) -> None:
    fill = matrix.fill
    rows = fill.shape[0]
    if not fill.num_elements:
        return
    # Another place in each tensor, the same in each run.
    key = f"{matrix.info.name}{fill.places[matrix.expert].start or ''}"
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    start = place % max(1, rows - SAMPLE_ROWS + 1)
    expected, _, units = matrix.compare(start, min(rows, start + SAMPLE_ROWS))
    with proof.lock:
        proof.copied += _kept(expected, units, matrix.axis) if fill.kind != "normal" else 0


def _check_full(matrix: _Matrix, proof: Proof, digests: Digests) -> None:
    plan, fill, axis = matrix.plan, matrix.fill, matrix.axis
    old, new, whole = Sums(), Sums(), Sums()
    changed = torch.zeros(plan.num_units, dtype=torch.bool)
    for start, stop in fill.blocks:
        expected, found, units = matrix.compare(start, stop)
        note(digests, fill.places[matrix.expert], start * fill.row_length, raw_bytes(found), proof.lock)
        if fill.kind == "normal":
            zero = fill.zero_row if fill.zero_row is not None and start <= fill.zero_row < stop else None
            new.add(found if zero is None else torch.cat([found[: zero - start], found[zero - start + 1 :]]))
            continue
        whole.add(expected)
        if len(units):
            before, after = expected.index_select(axis, units), found.index_select(axis, units)
            changed[units + (start if axis == 0 else 0)] |= (before != after).any(1 - axis)
            # Of noise, what was added counts; of a redrawn slice, what is there now.
            old.add(before)
            new.add(after.float() - before.float() if plan.recipe.method == "noise" else after)
        with proof.lock:
            proof.copied += _kept(expected, units, axis)
    if not new.n:
        return
    num, recipe = int(changed.sum()), plan.recipe
    if fill.kind == "normal":
        mean, std = 0.0, fill.value
    elif recipe.method == "noise":
        mean = 0.0
        std = float(recipe.noise_scale) * whole.std if recipe.noise_std is None else float(recipe.noise_std)
    else:
        mean, std = old.mean, old.std
    grid = resolution(found.dtype, math.hypot(old.rms, std))
    width = fill.num_elements // fill.shape[axis]
    # A unit that is constant in the dense model (all entries equal) is redrawn to the same, noise below the
    # dtype's resolution is none, and one or two numbers may be drawn as they were.
    sure = std > FAR * grid and plan.num_redrawn * (grid / std) ** width * len(fill.places) < FALSE_ALARMS / 1000
    if fill.kind == "expert" and num != plan.num_redrawn and sure:
        raise CheckpointError(
            f"tensor {matrix.info.name}: {num} units differ from the source, the recipe changes {plan.num_redrawn}"
        )
    sigma = standard_errors((new.mean, new.std, new.n), (mean, std), grid)
    if sigma > matrix.limit:
        raise CheckpointError(
            f"tensor {matrix.info.name}: the drawn entries have mean {new.mean:.6g} and std {new.std:.6g},"
            f" planned were {mean:.6g} and {std:.6g}: {sigma:.1f} standard errors apart"
        )
    with proof.lock:
        proof.worst_sigma = max(proof.worst_sigma, sigma)
        if fill.projection == "gate":
            proof.redrawn_units += num
