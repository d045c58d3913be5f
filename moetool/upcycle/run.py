"""The one loop that reads, draws and writes: blocks of rows, in threads, in any order."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash

from moetool import __version__, registry
from moetool.checkpoint.reader import BlockFile, CheckpointReader
from moetool.checkpoint.writer import CheckpointWriter, Shard
from moetool.errors import CheckpointError
from moetool.progress import Progress, silent
from moetool.recipe import (
    LINEAGE,
    LINEAGE_FORMAT,
    PROJECTIONS,
    UpcycleRecipe,
    generator,
    matrix_index,
    permutation,
    redrawn_units,
    units_digest,
)
from moetool.upcycle.init import slice_moments
from moetool.upcycle.plan import Fill, Plan
from moetool.upcycle.source import (
    TORCH_DTYPES,
    Source,
    examine,
    gather_rows,
    in_threads,
    num_blocks,
    raw_bytes,
    read_rows,
)


@dataclass(frozen=True)
class _Expert:
    """What is redrawn in one matrix of one expert."""

    units: torch.Tensor
    order: torch.Tensor | None
    moments: tuple[float, float]


def _expert(plan: Plan, source: Source, fill: Fill, expert: int) -> _Expert:
    assert fill.layer is not None
    assert fill.projection is not None
    recipe, size = plan.recipe, plan.intermediate_size
    units = redrawn_units(recipe, fill.layer, expert, fill.projection, size)
    order = permutation(recipe, fill.layer, expert, size)
    if not len(units):
        return _Expert(units, order, (0.0, 0.0))
    key = (fill.layer, fill.projection)
    dropped = units if order is None else order[units]
    width = fill.shape[0] if fill.projection == "down" else fill.row_length
    return _Expert(units, order, slice_moments(source.sums[key], source.squares[key], dropped, width))


def expert_block(
    plan: Plan, source: Source, reader: CheckpointReader, fill: Fill, expert: int, index: int, block: torch.Tensor
) -> torch.Tensor:
    """One block of one expert's matrix, given the dense block at the same rows in the target's dtype."""
    assert fill.source is not None
    start, stop = fill.blocks[index]
    what = _expert(plan, source, fill, expert)
    axis = 1 if fill.projection == "down" else 0
    if what.order is not None:
        if axis == 1:
            block = block.index_select(1, what.order)
        else:
            block = gather_rows(reader, fill.source, what.order[start:stop]).to(block.dtype)
    units = what.units
    if axis == 0:
        units = units[(units >= start) & (units < stop)] - start
    assert fill.layer is not None
    assert fill.projection is not None
    place = matrix_index(plan.recipe, fill.layer, expert, fill.projection) * len(fill.blocks) + index
    method = registry.load("method", plan.recipe.method)
    return method(block, units, axis, what.moments, generator(plan.recipe.seed, "values", place))  # type: ignore[no-any-return]


def run_plan(
    plan: Plan,
    reader: CheckpointReader,
    out: Path,
    source_name: str,
    workers: int,
    files: Mapping[str, bytes],
    progress: Progress = silent,
) -> None:
    """Write a plan to a folder, or go on with what a killed run of the same plan left there.

    Peak memory is the imports and a few blocks a worker, whatever the model's size.

    Args:
        plan: from `build_plan`.
        reader: the dense checkpoint it was built from.
        out: a folder that is locked, and empty or holds the same plan, unfinished (`prepare`).
        source_name: the source as the user named it, for the lineage.
        workers: threads.
        files: small files to put beside the weights.
        progress: told in blocks.
    """
    source = examine(plan, reader, workers, progress)
    writer = CheckpointWriter(out, plan.shards, plan.identity())
    try:
        digests = _write_shards(plan, source, reader, writer, workers, progress)
    except BaseException:
        writer.abandon()
        raise
    files = dict(files) | {name: (reader.folder / name).read_bytes() for name in plan.companions}
    files["config.json"] = json.dumps(plan.config, indent=2).encode() + b"\n"
    files[LINEAGE] = _lineage(plan, source, source_name, digests)
    writer.finish(files)


def _write_shards(
    plan: Plan, source: Source, reader: CheckpointReader, writer: CheckpointWriter, workers: int, progress: Progress
) -> dict[str, str]:
    """Fill the shards that are not complete; return a digest of each shard's bytes."""
    shard_of = {tensor: shard for shard in plan.shards for tensor in shard.starts}
    left = Counter(shard_of[t].name for fill in plan.fills for t in fill.targets for _ in fill.blocks)
    opened: set[str] = set()
    digests: dict[tuple[str, int], str] = {}
    lock, done, total = threading.Lock(), 0, num_blocks(plan.fills)

    fill_of = {target: fill for fill in plan.fills for target in fill.targets}

    def digest_of_tensor(name: str) -> str:
        return tensor_digest(digests[name, index] for index in range(len(fill_of[name].blocks)))

    def digest_of(shard: Shard) -> str:
        return shard_digest((name, digest_of_tensor(name)) for name in shard.starts)

    def write(tensor: str, index: int, offset: int, data: torch.Tensor) -> None:
        shard = shard_of[tensor]
        with lock:
            if shard.name not in opened:
                opened.add(shard.name)
                writer.open(shard)
        raw = raw_bytes(data)
        digests[tensor, index] = xxhash.xxh3_128_hexdigest(raw)
        writer.write(tensor, offset, raw)
        with lock:
            left[shard.name] -= 1
            last = left[shard.name] == 0
        if last:
            writer.close(shard, digest_of(shard))

    def fill_block(fill: Fill, index: int) -> None:
        nonlocal done
        wanted = [(e, t) for e, t in enumerate(fill.targets) if shard_of[t].name not in writer.complete]
        start, stop = fill.blocks[index]
        dtype = TORCH_DTYPES[fill.dtype]
        if wanted:
            block = dense_rows(plan, reader, fill, start, stop)
            for expert, target in wanted:
                made = expert_block(plan, source, reader, fill, expert, index, block) if fill.projection else block
                write(target, index, start * fill.row_length * dtype.itemsize, made)
        with lock:
            done += 1
            progress("writing", done, total)

    def hash_complete(fill: Fill, target: str) -> None:
        """A shard that a killed run left complete is not written again; its bytes are hashed from disk."""
        info = plan.written[target]
        for index, (start, stop) in enumerate(fill.blocks):
            digests[target, index] = xxhash.xxh3_128_hexdigest(raw_bytes(read_rows(written, info, start, stop)))

    with BlockFile(writer.folder) as written:
        in_threads(
            [
                *(partial(fill_block, fill, index) for fill in plan.fills for index in range(len(fill.blocks))),
                *(
                    partial(hash_complete, fill, target)
                    for fill in plan.fills
                    for target in fill.targets
                    if shard_of[target].name in writer.complete
                ),
            ],
            workers,
        )
    for shard in plan.shards:
        if writer.complete.get(shard.name) not in (None, digest_of(shard)):
            raise CheckpointError(
                f"{writer.folder / shard.name} has changed since the interrupted run wrote it; delete it, and the"
                " same command writes it again"
            )
    return {shard.name: digest_of(shard) for shard in plan.shards}


def tensor_digest(blocks: Iterable[str]) -> str:
    """XXH3-128 over the digests of a tensor's blocks, so that blocks can be hashed in any order."""
    return xxhash.xxh3_128_hexdigest("".join(blocks).encode())


def shard_digest(tensors: Iterable[tuple[str, str]]) -> str:
    """XXH3-128 over (name, digest) of a shard's tensors: what moetool.json records of each shard."""
    return xxhash.xxh3_128_hexdigest("".join(f"{name}:{digest};" for name, digest in tensors).encode())


def dense_rows(plan: Plan, reader: CheckpointReader, fill: Fill, start: int, stop: int) -> torch.Tensor:
    """Rows of a fill's source in the target's dtype; of a router, which has none, the drawn rows."""
    rows = (
        router_rows(plan.recipe, fill)[start:stop]
        if fill.source is None
        else read_rows(reader, fill.source, start, stop)
    )
    return rows.to(TORCH_DTYPES[fill.dtype])


def router_rows(recipe: UpcycleRecipe, fill: Fill) -> torch.Tensor:
    """A layer's router, fp32 (E, D); its draw depends on the seed and the layer, not on the method."""
    draw = registry.load("router", recipe.router)
    return draw(fill.shape, float(recipe.router_std), generator(recipe.seed, "router", fill.layer or 0))  # type: ignore[no-any-return]


def _lineage(plan: Plan, source: Source, source_name: str, digests: dict[str, str]) -> bytes:
    recipe, units = plan.recipe, plan.intermediate_size
    entry: dict[str, Any] = {
        "command": "upcycle",
        "moetool": __version__,
        "torch": torch.__version__,
        "recipe": recipe.to_json(),
        "max_shard_size": plan.max_shard_size,
        "source": {
            "name": source_name,
            "model_type": plan.dense["model_type"],
            "sha256": dict(sorted(source.sha256.items())),
        },
    }
    if plan.num_redrawn:
        # From these and the recipe the sets are rebuilt exactly; a rebuild that disagrees is an error.
        entry["redrawn_units"] = {
            "num_units": units,
            "num_redrawn": plan.num_redrawn,
            "matrices": list(PROJECTIONS),
            "digests": [
                [units_digest(recipe, layer, expert, units) for expert in range(recipe.num_experts)]
                for layer in range(plan.num_layers)
            ],
        }
    document = {"format": LINEAGE_FORMAT, "lineage": [entry], "shards": digests}
    return json.dumps(document, indent=1).encode() + b"\n"
