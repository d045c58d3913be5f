"""The one loop that reads, draws and writes: blocks of rows, in threads, in any order."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from moetool.checkpoint.reader import BlockFile, CheckpointReader
from moetool.checkpoint.writer import CheckpointWriter, index_file
from moetool.errors import CheckpointError
from moetool.progress import Progress, silent
from moetool.recipe import LINEAGE
from moetool.surgery.digests import Digests
from moetool.surgery.examine import Examined, examine
from moetool.surgery.fill import Fill, Place
from moetool.surgery.kinds import Block, Cache
from moetool.surgery.lineage import lineage
from moetool.surgery.plan import Plan, fingerprint
from moetool.surgery.rows import raw_bytes, read_rows
from moetool.surgery.threads import in_threads
from moetool.values import FLOAT_DTYPES


def write(
    plan: Plan,
    readers: Sequence[CheckpointReader],
    out: Path,
    names: Sequence[str],
    workers: int,
    files: Mapping[str, bytes],
    progress: Progress = silent,
) -> None:
    """Write a plan to a folder, or continue what a killed run of the same plan left there.

    Peak memory is the imports and a few blocks per worker, whatever the model's size.

    Args:
        plan: what to write.
        readers: the sources it was made from.
        out: a folder that is locked, and empty or holds the same plan, unfinished (`prepare`).
        names: of the sources as the user named them, for the lineage.
        workers: threads.
        files: small files to put beside the weights.
        progress: reports blocks.
    """
    examined = examine(plan.fills, readers, workers, progress)
    writer = CheckpointWriter(out, plan.shards, plan.identity())
    try:
        digests = _write_shards(plan, examined, readers, writer, workers, progress)
        if fingerprint(readers) != plan.fingerprint:
            raise CheckpointError(
                f"{', '.join(str(reader.folder) for reader in readers)} changed while it was being read, so what was"
                " made of it is unusable; run the command again with --overwrite"
            )
    except BaseException:
        writer.abandon()
        raise
    files = dict(files) | {name: (readers[0].folder / name).read_bytes() for name in plan.companions}
    files["config.json"] = json.dumps(plan.config, indent=2).encode() + b"\n"
    files |= index_file(plan.shards)
    files[LINEAGE] = lineage(plan, names, examined.sha256, digests, files)
    writer.finish(files)


def _write_shards(
    plan: Plan,
    examined: Examined,
    readers: Sequence[CheckpointReader],
    writer: CheckpointWriter,
    workers: int,
    progress: Progress,
) -> dict[str, str]:
    """Fill the shards that are not complete; return a digest of each shard's bytes."""
    shard_of = {tensor: shard for shard in plan.shards for tensor in shard.starts}
    left = Counter(shard_of[place.tensor].name for fill in plan.fills for place in fill.places for _ in fill.blocks)
    opened: set[str] = set()
    digests = Digests()
    lock, done, total = threading.Lock(), 0, sum(len(fill.blocks) for fill in plan.fills)

    def is_complete(place: Place) -> bool:
        return shard_of[place.tensor].name in writer.complete

    def write_block(place: Place, element: int, data: torch.Tensor) -> None:
        shard = shard_of[place.tensor]
        with lock:
            if shard.name not in opened:
                opened.add(shard.name)
                writer.open(shard)
        raw = raw_bytes(data)
        digests.note(place, element, raw)
        writer.write(place.tensor, (place.start + element) * data.itemsize, raw)
        with lock:
            left[shard.name] -= 1
            last = left[shard.name] == 0
        if last:
            writer.close(shard, digests.of(shard))

    def fill_block(fill: Fill, index: int) -> None:
        nonlocal done
        (start, stop), cache = fill.blocks[index], Cache()
        for place in fill.places:
            if not is_complete(place):
                block = Block(fill, place, index, start, stop, readers, examined.sums, cache)
                data = plan.kinds[fill.kind].make(block)
                _check_range(fill, place, data)
                write_block(place, start * fill.row_length, data)
        with lock:
            done += 1
            progress("writing", done, total)

    def hash_complete(fill: Fill, place: Place) -> None:
        """A shard that a killed run left complete is not written again; its bytes are hashed from disk."""
        info = plan.place_info(fill, place)
        for start, stop in fill.blocks:
            digests.note(place, start * fill.row_length, raw_bytes(read_rows(written, info, start, stop)))

    with BlockFile(writer.folder) as written:
        in_threads(
            [
                *(partial(fill_block, fill, index) for fill in plan.fills for index in range(len(fill.blocks))),
                *(
                    partial(hash_complete, fill, place)
                    for fill in plan.fills
                    for place in fill.places
                    if is_complete(place)
                ),
            ],
            workers,
        )
    for shard in plan.shards:
        if writer.complete.get(shard.name) not in (None, digests.of(shard)):
            raise CheckpointError(
                f"{writer.folder / shard.name} has changed since the interrupted run wrote it; delete it, and the"
                " same command writes it again"
            )
    return {shard.name: digests.of(shard) for shard in plan.shards}


def _check_range(fill: Fill, place: Place, data: torch.Tensor) -> None:
    """What is drawn or computed can leave the range of numbers; that of the source has been looked at."""
    checked = fill.kind != "carried" and (fill.dtype == "F16" or not fill.sources)
    if checked and not torch.isfinite(data).all():
        raise CheckpointError(
            f"tensor {place.tensor} would hold values that {FLOAT_DTYPES[fill.dtype]} cannot; choose another --dtype,"
            " or draw with a smaller standard deviation"
        )
