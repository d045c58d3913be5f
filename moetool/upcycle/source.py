"""The dense checkpoint's numbers: blocks of rows, read in threads, and one pass over all of them."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch

from moetool.checkpoint.reader import BlockFile, CheckpointReader, TensorInfo, sha256_file
from moetool.errors import CheckpointError
from moetool.progress import Progress, silent
from moetool.upcycle.plan import FLOAT_DTYPES, Fill, Plan

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def raw_bytes(block: torch.Tensor) -> memoryview:
    """A block's bytes as they lie on disk."""
    return memoryview(block.contiguous().view(torch.uint8).view(-1).numpy())  # type: ignore[arg-type]


@dataclass
class Source:
    """What one pass over the dense checkpoint gives.

    Attributes:
        sha256: of each shard.
        sums: (layer, projection) -> sum of each unit's entries, float64 (F,).
        squares: the same of their squares.
    """

    sha256: dict[str, str] = field(default_factory=dict)
    sums: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    squares: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)


def in_threads(jobs: Iterable[Callable[[], None]], workers: int) -> None:
    """Run jobs, in order of start, on `workers` threads; the first error stops the rest and is raised."""
    jobs = list(jobs)
    pending = iter(jobs)
    lock, stop = threading.Lock(), threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        torch.set_num_threads(1)  # the threads here are the parallelism
        while not stop.is_set():
            try:
                with lock:
                    job = next(pending, None)
                if job is None:
                    return
                job()
            except BaseException as error:
                errors.append(error)
                stop.set()

    threads = [threading.Thread(target=work) for _ in range(min(workers, len(jobs)))]
    before = torch.get_num_threads()
    # Ctrl-C and SIGTERM are held back while threads start (one that is half started can neither be
    # joined nor left behind) and while they end; between the two they stop the work.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        for thread in threads:
            thread.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for thread in threads:
            thread.join()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        torch.set_num_threads(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    if errors:
        raise errors[0]


def read_rows(reader: BlockFile, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a tensor, shape (rows, row length) (a vector: rows of one)."""
    rows = info.shape[0] if info.shape else 1
    row_bytes = info.size // rows
    buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
    reader.read_into(info, start * row_bytes, raw_bytes(buffer))
    return buffer.view(TORCH_DTYPES[info.dtype]).view(stop - start, -1)


def gather_rows(reader: BlockFile, info: TensorInfo, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a matrix in any order."""
    row_bytes = info.size // info.shape[0]
    buffer = torch.empty((len(rows), row_bytes), dtype=torch.uint8)
    view = raw_bytes(buffer)
    for position, row in enumerate(rows.tolist()):
        reader.read_into(info, row * row_bytes, view[position * row_bytes : (position + 1) * row_bytes])
    return buffer.view(TORCH_DTYPES[info.dtype])


def num_blocks(fills: Iterable[Fill]) -> int:
    """How many blocks there are to read."""
    return sum(len(fill.blocks) for fill in fills)


def examine(plan: Plan, reader: CheckpointReader, workers: int, progress: Progress = silent) -> Source:
    """Read the whole source once: hash its files, sum its FFN units, and look for NaN and infinity.

    Raises:
        CheckpointError: a weight is not finite, or would not be in the target's dtype; names the tensor.
    """
    source = Source()
    done, lock = Counter[str](), threading.Lock()
    fills = [fill for fill in plan.fills if fill.source]
    total = num_blocks(fills) + len(reader.shards)

    def advance() -> None:
        with lock:
            done["steps"] += 1
            progress("reading the source", done["steps"], total)

    def hash_shard(shard: str) -> None:
        source.sha256[shard] = sha256_file(reader.folder / shard)
        advance()

    def look(fill: Fill) -> None:
        assert fill.source is not None
        units = plan.intermediate_size
        sums, squares = torch.zeros(units, dtype=torch.float64), torch.zeros(units, dtype=torch.float64)
        overflows = fill.dtype != fill.source.dtype and fill.dtype != "F32"
        for start, stop in fill.blocks:
            block = read_rows(reader, fill.source, start, stop).float()
            # A sum is finite unless an entry is not (or the sum overflows: then look at each entry).
            if not torch.isfinite(block.sum()) and not torch.isfinite(block).all():
                raise CheckpointError(
                    f"{reader.folder / fill.source.shard}: tensor {fill.source.name} holds NaN or infinity;"
                    " nothing was written: mend or fetch the source again"
                )
            if overflows and not torch.isfinite(block.to(TORCH_DTYPES[fill.dtype])).all():
                raise CheckpointError(
                    f"{reader.folder / fill.source.shard}: tensor {fill.source.name} holds values that"
                    f" {FLOAT_DTYPES[fill.dtype]} cannot; nothing was written: choose another --dtype"
                )
            if fill.projection and plan.num_redrawn:
                wide = block.double()
                if fill.projection == "down":
                    sums += wide.sum(0)
                    squares += wide.square_().sum(0)
                else:
                    sums[start:stop] = wide.sum(1)
                    squares[start:stop] = wide.square_().sum(1)
            advance()
        if fill.projection:
            assert fill.layer is not None
            source.sums[fill.layer, fill.projection] = sums
            source.squares[fill.layer, fill.projection] = squares

    in_threads([*(partial(hash_shard, s) for s in reader.shards), *(partial(look, f) for f in fills)], workers)
    return source
