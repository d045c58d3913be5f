"""The proof: re-open what was written and hold it against the plan and the dense source."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
import xxhash

from moetool.checkpoint.reader import BlockFile, CheckpointReader, TensorInfo, read_json, sha256_file
from moetool.checkpoint.writer import check_written
from moetool.errors import CheckpointError
from moetool.progress import Progress, silent
from moetool.recipe import PROJECTIONS, permutation, read_lineage, redrawn_units, units_digest
from moetool.upcycle.plan import Fill, Plan
from moetool.upcycle.run import dense_rows, shard_digest, tensor_digest
from moetool.upcycle.source import TORCH_DTYPES, gather_rows, in_threads, raw_bytes, read_rows

SAMPLE_ROWS = 16  # rows of each tensor that a quick check compares
FALSE_ALARMS = 1e-3  # chance that the statistics of a right checkpoint fail, over all its slices


def bound(plan: Plan) -> float:
    """How many standard errors a slice's statistics may lie off: 5, and more where there are many slices."""
    tests = 2 * len(PROJECTIONS) * plan.num_layers * plan.recipe.num_experts
    return max(5.0, NormalDist().inv_cdf(1 - FALSE_ALARMS / tests / 2))


@dataclass
class Proof:
    """What was checked.

    Attributes:
        level: quick or full.
        tensors: tensors whose entries were compared.
        copied: entries found equal to the source, bit for bit (rounded once where the dtype differs).
        redrawn_units: (layer, expert) pairs times units found redrawn; full only.
        worst_sigma: the largest distance of a redrawn slice's mean or standard deviation from the
            slice it replaced, in standard errors; full only.
    """

    level: str
    tensors: int = 0
    copied: int = 0
    redrawn_units: int = 0
    worst_sigma: float = 0.0
    lock: Any = field(default_factory=threading.Lock, repr=False)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        keys = ("level", "tensors", "copied", "redrawn_units", "worst_sigma")
        return {
            key: getattr(self, key) for key in keys if self.level == "full" or key in ("level", "tensors", "copied")
        }


def verify(
    plan: Plan, reader: CheckpointReader, out: Path, level: str, workers: int, progress: Progress = silent
) -> Proof:
    """Prove a finished folder against its plan.

    quick: config, key set, every header, the redrawn units' checksums, and rows of every tensor.
    full: every entry. Kept entries equal the source bit for bit, every redrawn unit differs from it,
    and each redrawn slice has the mean and standard deviation of the slice it replaced, within 5
    standard errors (more where chance demands it, see `bound`): sigma / sqrt(n) and sigma / sqrt(2n) for n
    normal values.

    Raises:
        CheckpointError: names the first thing that does not hold.
    """
    proof = Proof(level)
    if read_json(out / "config.json") != dict(plan.config):
        raise CheckpointError(f"{out}/config.json is not the one that this recipe writes")
    if set(CheckpointReader(out).tensors) != {target for fill in plan.fills for target in fill.targets}:
        raise CheckpointError(f"{out} does not hold the tensors that this recipe writes")
    check_written(out, plan.shards)
    _check_digests(plan, out)
    infos = plan.written
    total = len(plan.fills)
    done = 0
    digests: dict[str, str] = {}

    def check(fill: Fill) -> None:
        nonlocal done
        if level == "full":
            for index, target in enumerate(fill.targets):
                _check_full(plan, reader, written, fill, index, infos[target], proof, digests)
        else:
            _check_sample(plan, reader, written, fill, infos, proof)
        with proof.lock:
            proof.tensors += len(fill.targets)
            done += 1
            progress("verifying", done, total)

    with BlockFile(out) as written:
        in_threads([partial(check, fill) for fill in plan.fills], workers)
    if level == "full":
        _check_shards(plan, out, digests)
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


def _check_digests(plan: Plan, out: Path) -> None:
    """The units that the recipe redraws on this machine are those that were redrawn."""
    lineage = read_lineage(out)
    entry: Mapping[str, Any] = lineage["lineage"][0] if lineage and lineage["lineage"] else {}
    if not plan.num_redrawn:
        return
    recorded = entry.get("redrawn_units", {}).get("digests")
    rebuilt = [
        [units_digest(plan.recipe, layer, expert, plan.intermediate_size) for expert in range(plan.recipe.num_experts)]
        for layer in range(plan.num_layers)
    ]
    if recorded != rebuilt:
        raise CheckpointError(
            f"{out}: the redrawn units rebuilt from the recipe are not those in moetool.json; it was written with"
            f" torch {entry.get('torch')}, this is {torch.__version__}"
        )


def _check_shards(plan: Plan, out: Path, digests: Mapping[str, str]) -> None:
    recorded = (read_lineage(out) or {}).get("shards")
    recorded = recorded if isinstance(recorded, dict) else {}
    for shard in plan.shards:
        if recorded.get(shard.name) != shard_digest((t, digests[t]) for t in shard.starts):
            raise CheckpointError(
                f"{out / shard.name} has changed since it was written (its digest is not moetool.json's)"
            )


def _kept(plan: Plan, fill: Fill, expert: int, start: int, stop: int) -> tuple[torch.Tensor, int]:
    """Local positions of the units in rows [start, stop) that are redrawn, and the axis of the units."""
    assert fill.layer is not None
    assert fill.projection is not None
    units = redrawn_units(plan.recipe, fill.layer, expert, fill.projection, plan.intermediate_size)
    if fill.projection == "down":
        return units, 1
    return units[(units >= start) & (units < stop)] - start, 0


def _rows(plan: Plan, reader: CheckpointReader, fill: Fill, expert: int, start: int, stop: int) -> torch.Tensor:
    """What the target's rows would be if nothing were redrawn."""
    order = None
    if fill.projection and fill.layer is not None:
        order = permutation(plan.recipe, fill.layer, expert, plan.intermediate_size)
    if order is None or fill.source is None:
        return dense_rows(plan, reader, fill, start, stop)
    if fill.projection == "down":
        return dense_rows(plan, reader, fill, start, stop).index_select(1, order)
    return gather_rows(reader, fill.source, order[start:stop]).to(TORCH_DTYPES[fill.dtype])


def _compare(
    plan: Plan,
    reader: CheckpointReader,
    written: BlockFile,
    fill: Fill,
    expert: int,
    info: TensorInfo,
    start: int,
    stop: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """Check the kept entries of some rows; return (expected, found, redrawn positions, axis, kept entries)."""
    expected = _rows(plan, reader, fill, expert, start, stop)
    found = read_rows(written, info, start, stop)
    if not fill.projection:
        units, axis = torch.empty(0, dtype=torch.int64), 0
    else:
        units, axis = _kept(plan, fill, expert, start, stop)
    same = found.view(_INTEGERS[found.itemsize]) == expected.view(_INTEGERS[found.itemsize])
    mask = torch.ones(expected.shape[axis], dtype=torch.bool)
    mask[units] = False
    kept = same[mask] if axis == 0 else same[:, mask]
    if not kept.all():
        where = "was to be copied" if not fill.projection else "holds kept units"
        raise CheckpointError(
            f"tensor {info.name} ({info.shard}) {where}, but rows {start}-{stop - 1} differ from the source"
        )
    if not torch.isfinite(found).all():
        raise CheckpointError(f"tensor {info.name} ({info.shard}) holds NaN or infinity")
    return expected, found, units, axis, kept.numel()


_INTEGERS = {2: torch.int16, 4: torch.int32}


def _check_sample(
    plan: Plan, reader: CheckpointReader, written: BlockFile, fill: Fill, infos: Mapping[str, TensorInfo], proof: Proof
) -> None:
    rows = fill.shape[0]
    for expert, target in enumerate(fill.targets):
        # Another place in each tensor, the same in each run.
        place = int.from_bytes(hashlib.sha256(target.encode()).digest()[:4], "little")
        start = place % max(1, rows - SAMPLE_ROWS + 1)
        *_, kept = _compare(plan, reader, written, fill, expert, infos[target], start, min(rows, start + SAMPLE_ROWS))
        with proof.lock:
            proof.copied += kept


def _check_full(
    plan: Plan,
    reader: CheckpointReader,
    written: BlockFile,
    fill: Fill,
    expert: int,
    info: TensorInfo,
    proof: Proof,
    digests: dict[str, str],
) -> None:
    units_total = plan.intermediate_size
    old, new = _Sums(), _Sums()
    changed = torch.zeros(units_total, dtype=torch.bool)
    blocks = []
    for start, stop in fill.blocks:
        expected, found, units, axis, kept = _compare(plan, reader, written, fill, expert, info, start, stop)
        blocks.append(xxhash.xxh3_128_hexdigest(raw_bytes(found)))
        if len(units):
            before, after = expected.index_select(axis, units), found.index_select(axis, units)
            old.add(before)
            new.add(after)
            differs = (before != after).any(1 - axis)
            changed[units + (start if axis == 0 else 0)] |= differs
        with proof.lock:
            proof.copied += kept
    digests[info.name] = tensor_digest(blocks)
    if not old.n:
        return
    num = int(changed.sum())
    # A redrawn unit of a dense model that is constant there (all entries equal) is redrawn to the same.
    if num != plan.num_redrawn and old.std > 0:
        raise CheckpointError(
            f"tensor {info.name}: {num} units differ from the source, the recipe redraws {plan.num_redrawn}"
        )
    sigma = 0.0
    if old.std > 0:
        mean_error, std_error = old.std / old.n**0.5, old.std / (2 * old.n) ** 0.5
        sigma = max(abs(new.mean - old.mean) / mean_error, abs(new.std - old.std) / std_error)
        if sigma > bound(plan):
            raise CheckpointError(
                f"tensor {info.name}: the redrawn entries have mean {new.mean:.6g} and std {new.std:.6g},"
                f" the replaced ones {old.mean:.6g} and {old.std:.6g}: {sigma:.1f} standard errors apart"
            )
    with proof.lock:
        proof.worst_sigma = max(proof.worst_sigma, sigma)
        if fill.projection == "gate":
            proof.redrawn_units += num


class _Sums:
    """Mean and standard deviation of blocks as they come, in float64."""

    def __init__(self) -> None:
        self.n, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, block: torch.Tensor) -> None:
        wide = block.double()
        self.n += wide.numel()
        self._sum += float(wide.sum())
        self._squares += float(wide.square().sum())

    @property
    def mean(self) -> float:
        return self._sum / self.n

    @property
    def std(self) -> float:
        return (max(self._squares / self.n - self.mean**2, 0.0) * self.n / max(1, self.n - 1)) ** 0.5  # type: ignore[no-any-return]
