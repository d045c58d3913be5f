"""The one loop that reads, draws and writes: blocks of rows, in threads, in any order."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import xxhash

from moetool import __version__
from moetool.checkpoint.reader import BlockFile, CheckpointReader, TensorInfo
from moetool.checkpoint.writer import CheckpointWriter, Shard, index_file
from moetool.errors import CheckpointError
from moetool.progress import Progress, silent
from moetool.recipe import LINEAGE, LINEAGE_FORMAT, PROJECTIONS, units_digest
from moetool.upcycle.blocks import Cache, expert_block, kept_block, normal_block
from moetool.upcycle.check import FLOAT_DTYPES
from moetool.upcycle.layout import Fill, Place
from moetool.upcycle.plan import Plan, fingerprint
from moetool.upcycle.source import TORCH_DTYPES, Source, examine, in_threads, num_blocks, raw_bytes, read_rows


def run_plan(
    plan: Plan,
    readers: Sequence[CheckpointReader],
    out: Path,
    names: Sequence[str],
    workers: int,
    files: Mapping[str, bytes],
    progress: Progress = silent,
) -> None:
    """Write a plan to a folder, or go on with what a killed run of the same plan left there.

    Peak memory is the imports and a few blocks a worker, whatever the model's size.

    Args:
        plan: from `build_plan`.
        readers: the dense checkpoints it was built from.
        out: a folder that is locked, and empty or holds the same plan, unfinished (`prepare`).
        names: of the sources as the user named them, for the lineage.
        workers: threads.
        files: small files to put beside the weights.
        progress: told in blocks.
    """
    source = examine(plan, readers, workers, progress)
    writer = CheckpointWriter(out, plan.shards, plan.identity())
    try:
        digests = _write_shards(plan, source, readers, writer, workers, progress)
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
    files[LINEAGE] = _lineage(plan, source, names, digests, files)
    writer.finish(files)


def _write_shards(
    plan: Plan,
    source: Source,
    readers: Sequence[CheckpointReader],
    writer: CheckpointWriter,
    workers: int,
    progress: Progress,
) -> dict[str, str]:
    """Fill the shards that are not complete; return a digest of each shard's bytes."""
    shard_of = {tensor: shard for shard in plan.shards for tensor in shard.starts}
    left = Counter(shard_of[place.tensor].name for fill in plan.fills for place in fill.places for _ in fill.blocks)
    opened: set[str] = set()
    digests: Digests = {}
    lock, done, total = threading.Lock(), 0, num_blocks(plan.fills)
    numbers = draw_numbers(plan)

    def digest_of(shard: Shard) -> str:
        return shard_digest((name, tensor_digest(digests.get(name, {}))) for name in shard.starts)

    def write(place: Place, element: int, data: torch.Tensor) -> None:
        shard = shard_of[place.tensor]
        with lock:
            if shard.name not in opened:
                opened.add(shard.name)
                writer.open(shard)
        raw = raw_bytes(data)
        note(digests, place, element, raw, lock)
        writer.write(place.tensor, (place.start + element) * data.itemsize, raw)
        with lock:
            left[shard.name] -= 1
            last = left[shard.name] == 0
        if last:
            writer.close(shard, digest_of(shard))

    def fill_block(fill: Fill, index: int) -> None:
        nonlocal done
        start, stop = fill.blocks[index]
        wanted = [e for e, place in enumerate(fill.places) if shard_of[place.tensor].name not in writer.complete]
        cache: Cache = {}
        # Experts of the same part of the same donor one after another: they share what is read.
        for _, experts in groupby(sorted(wanted, key=partial(_origin, plan, fill)), key=partial(_origin, plan, fill)):
            for expert in experts:
                if fill.kind == "normal":
                    block = normal_block(plan, fill, start, stop, numbers[fill.places[expert]] + index)
                else:
                    block = kept_block(plan, readers, fill, expert, start, stop, cache)
                if fill.kind == "expert":
                    block = expert_block(plan, source, fill, expert, index, block)
                _check_range(fill, fill.places[expert], block)
                write(fill.places[expert], start * fill.row_length, block)
            # A block of down's rows holds all parts; of gate's and up's, each part has rows of its own.
            for key in [key for key in cache if fill.projection != "down" or key[0] == "made"]:
                del cache[key]
        with lock:
            done += 1
            progress("writing", done, total)

    def hash_complete(fill: Fill, expert: int) -> None:
        """A shard that a killed run left complete is not written again; its bytes are hashed from disk."""
        info = place_info(plan, fill, expert)
        for start, stop in fill.blocks:
            raw = raw_bytes(read_rows(written, info, start, stop))
            note(digests, fill.places[expert], start * fill.row_length, raw, lock)

    with BlockFile(writer.folder) as written:
        in_threads(
            [
                *(partial(fill_block, fill, index) for fill in plan.fills for index in range(len(fill.blocks))),
                *(
                    partial(hash_complete, fill, expert)
                    for fill in plan.fills
                    for expert, place in enumerate(fill.places)
                    if shard_of[place.tensor].name in writer.complete
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


def _check_range(fill: Fill, place: Place, block: torch.Tensor) -> None:
    """What is drawn or multiplied can leave the range of numbers; that of the source has been looked at."""
    if (fill.dtype == "F16" or fill.kind == "normal") and fill.kind != "carried" and not torch.isfinite(block).all():
        raise CheckpointError(
            f"tensor {place.tensor} would hold values that {FLOAT_DTYPES[fill.dtype]} cannot; choose another --dtype,"
            " or draw with a smaller standard deviation"
        )


def _origin(plan: Plan, fill: Fill, number: int) -> tuple[int, int]:
    return (plan.donor(number), plan.first_unit(number)) if fill.kind == "expert" else (0, 0)


def draw_numbers(plan: Plan) -> dict[Place, int]:
    """A number for the first block of each drawn place, so that no two blocks of the result share one."""
    numbers, count = {}, 0
    for fill in plan.fills:
        if fill.kind == "normal":
            for place in fill.places:
                numbers[place] = count
                count += len(fill.blocks)
    return numbers


def place_info(plan: Plan, fill: Fill, number: int) -> TensorInfo:
    """Where a fill's matrix lies in the result, as if it were a tensor of its own."""
    place = fill.places[number]
    whole = plan.written[place.tensor]
    itemsize = TORCH_DTYPES[fill.dtype].itemsize
    start = whole.start + place.start * itemsize
    return TensorInfo(place.tensor, fill.dtype, fill.shape, whole.shard, start, fill.num_elements * itemsize)


# tensor -> first element of a block -> digest of the block's bytes.
Digests = dict[str, dict[int, str]]


def note(digests: Digests, place: Place, element: int, raw: memoryview, lock: threading.Lock) -> None:
    """Note the digest of a block that lies `element` elements into a place."""
    digest = xxhash.xxh3_128_hexdigest(raw)
    with lock:
        digests.setdefault(place.tensor, {})[place.start + element] = digest


def tensor_digest(blocks: Mapping[int, str]) -> str:
    """XXH3-128 over the digests of a tensor's blocks, so that blocks can be hashed in any order."""
    return xxhash.xxh3_128_hexdigest("".join(blocks[element] for element in sorted(blocks)).encode())


def shard_digest(tensors: Iterable[tuple[str, str]]) -> str:
    """XXH3-128 over (name, digest) of a shard's tensors: what moetool.json records of each shard."""
    return xxhash.xxh3_128_hexdigest("".join(f"{name}:{digest};" for name, digest in tensors).encode())


def _lineage(
    plan: Plan, source: Source, names: Sequence[str], digests: dict[str, str], files: Mapping[str, bytes]
) -> bytes:
    recipe, units = plan.recipe, plan.num_units
    sources = [
        {"name": name, "model_type": plan.dense["model_type"], "sha256": dict(sorted(sha256.items()))}
        for name, sha256 in zip(names, source.sha256, strict=True)
    ]
    entry: dict[str, Any] = {
        "command": "upcycle",
        "moetool": __version__,
        "torch": torch.__version__,
        "recipe": recipe.to_json(),
        "max_shard_size": plan.max_shard_size,
        "source": sources[0],
    }
    if len(sources) > 1:
        entry["donors"] = sources[1:]
    if plan.num_redrawn:
        # From these and the recipe the sets are rebuilt exactly; a rebuild that disagrees is an error.
        entry["redrawn_units"] = {
            "num_units": units,
            "num_redrawn": plan.num_redrawn,
            "matrices": list(PROJECTIONS),
            "layers": list(plan.moe_layers),
            "digests": [
                [units_digest(recipe, layer, expert, units) for expert in range(recipe.num_experts)]
                for layer in plan.moe_layers
            ],
        }
    # moetool.yaml has OUT and --workers in it, which make no difference to the checkpoint.
    sha256 = {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files) if name != "moetool.yaml"}
    document = {"format": LINEAGE_FORMAT, "lineage": [entry], "shards": digests, "files": sha256}
    return json.dumps(document, indent=1).encode() + b"\n"
