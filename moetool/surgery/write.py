"""The one loop that reads, draws and writes: blocks of rows, in processes, in any order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from moetool.checkpoint.reader import BlockFile, CheckpointReader
from moetool.checkpoint.shard import index_file
from moetool.checkpoint.writer import CheckpointWriter
from moetool.errors import CheckpointError
from moetool.lineage import LINEAGE
from moetool.progress import Progress, silent
from moetool.surgery.digests import BlockDigest, Digests, block_digest
from moetool.surgery.examine import Examined, examine
from moetool.surgery.fill import Fill, Place
from moetool.surgery.kinds import Block, Cache
from moetool.surgery.lineage import lineage
from moetool.surgery.plan import Plan, fingerprint
from moetool.surgery.rows import is_finite, raw_bytes, read_rows
from moetool.surgery.workers import run_jobs
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
    """Write a plan to a folder, or continue after a killed run of the same plan.

    Peak memory is the imports and a few blocks per worker, whatever the model's size.

    Args:
        plan: what to write.
        readers: the sources it was made from.
        out: a folder that is locked, and empty or holds the same plan, unfinished (`prepare`).
        names: of the sources as the user named them, for the lineage.
        workers: processes.
        files: small files to put beside the weights.
        progress: reports blocks.
    """
    examined = examine(plan.fills, readers, workers, progress)
    writer = CheckpointWriter(out, plan.shards, plan.identity())
    try:
        digests = _write_shards(plan, examined, readers, writer, workers, progress)
        if fingerprint(readers) != plan.fingerprint:
            raise CheckpointError(
                f"{', '.join(str(reader.folder) for reader in readers)} changed while being read, so the result is"
                " unusable; run the command again with --overwrite"
            )
    except BaseException:
        writer.abandon()
        raise
    files = dict(files) | {name: (readers[0].folder / name).read_bytes() for name in plan.companions}
    files["config.json"] = json.dumps(plan.config, indent=2).encode() + b"\n"
    files |= index_file(plan.model_shards) | (plan.beside(out) if plan.beside else {})
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
    digests = Digests()
    done, total = 0, sum(len(fill.blocks) for fill in plan.fills)

    def is_complete(place: Place) -> bool:
        return shard_of[place.tensor].name in writer.complete

    def fill_block(fill: Fill, index: int) -> list[BlockDigest]:
        (start, stop), cache, blocks = fill.blocks[index], Cache(), []
        for place in fill.places:
            if not is_complete(place):
                block = Block(fill, place, index, start, stop, readers, examined.sums, cache)
                data = plan.kinds[fill.kind].make(block)
                _check_range(fill, place, data)
                element, raw = start * fill.row_length, raw_bytes(data)
                writer.write(place.tensor, (place.start + element) * data.itemsize, raw)
                blocks.append(block_digest(place, element, raw))
        return blocks

    def hash_complete(fill: Fill, place: Place) -> list[BlockDigest]:
        """A shard that a killed run left complete is not written again; its bytes are hashed from disk."""
        info = plan.place_info(fill, place)
        return [
            block_digest(place, start * fill.row_length, raw_bytes(read_rows(written, info, start, stop)))
            for start, stop in fill.blocks
        ]

    def jobs() -> Iterator[tuple[int, int, bool]]:
        """A fill's number, that of a block of it to be written, or of a place of it (True) to be hashed."""
        opened = set(writer.complete)
        for number, fill in enumerate(plan.fills):
            for index in range(len(fill.blocks)):
                for shard in (shard_of[place.tensor] for place in fill.places):
                    if shard.name not in opened:
                        opened.add(shard.name)
                        writer.open(shard)
                yield number, index, False
        for number, fill in enumerate(plan.fills):
            yield from ((number, i, True) for i, place in enumerate(fill.places) if is_complete(place))

    def work(job: tuple[int, int, bool]) -> list[BlockDigest]:
        fill = plan.fills[job[0]]
        return hash_complete(fill, fill.places[job[1]]) if job[2] else fill_block(fill, job[1])

    def collect(job: tuple[int, int, bool], blocks: list[BlockDigest]) -> None:
        nonlocal done
        digests.add(blocks)
        if not job[2]:
            for shard in (shard_of[block.tensor] for block in blocks):
                left[shard.name] -= 1
                if not left[shard.name]:
                    closed.append(closing.submit(writer.close, shard, digests.of(shard)))
            done += 1
            progress("writing", done, total)
        for future in [future for future in closed if future.done()]:
            future.result()
            closed.remove(future)

    # To wait for the disk is a thread's work: meanwhile workers get their jobs.
    closing, closed = ThreadPoolExecutor(1), list[Future[None]]()
    with BlockFile(writer.folder) as written:
        try:
            run_jobs(work, jobs(), workers, plan.num_bytes, collect)
            for future in closed:
                future.result()
        finally:
            closing.shutdown(cancel_futures=True)
    for shard in plan.shards:
        if writer.complete.get(shard.name) not in (None, digests.of(shard)):
            raise CheckpointError(
                f"{writer.folder / shard.name} has changed since the interrupted run wrote it; delete it and"
                " run the same command again"
            )
    return {shard.name: digests.of(shard) for shard in plan.shards}


def _check_range(fill: Fill, place: Place, data: torch.Tensor) -> None:
    """Refuse drawn or computed numbers out of the dtype's range; those of the source were examined before."""
    checked = fill.kind != "carried" and (fill.dtype == "F16" or not fill.sources)
    if checked and not is_finite(data):
        raise CheckpointError(
            f"tensor {place.tensor} would hold values that {FLOAT_DTYPES[fill.dtype]} cannot represent; choose another"
            " --dtype, or draw with a smaller standard deviation"
        )
