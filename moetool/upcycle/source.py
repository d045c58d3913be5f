"""The dense models' numbers: blocks of rows, read in threads, and one pass over all of them."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from moetool.checkpoint.reader import BlockFile, CheckpointReader, TensorInfo, sha256_file
from moetool.errors import CheckpointError
from moetool.progress import Progress, silent
from moetool.upcycle.check import FLOAT_DTYPES
from moetool.upcycle.layout import BLOCK_ELEMENTS, Fill
from moetool.upcycle.plan import Plan

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def raw_bytes(block: torch.Tensor) -> memoryview:
    """A block's bytes as they lie on disk."""
    return memoryview(block.contiguous().view(torch.uint8).view(-1).numpy())  # type: ignore[arg-type]


@dataclass
class Source:
    """What one pass over the dense models gives.

    Attributes:
        sha256: of each shard, for each donor.
        sums: (donor, layer, projection) -> sum of each FFN unit's entries, float64 (F,).
        squares: the same of their squares.
    """

    sha256: list[dict[str, str]] = field(default_factory=list)
    sums: dict[tuple[int, int, str], torch.Tensor] = field(default_factory=dict)
    squares: dict[tuple[int, int, str], torch.Tensor] = field(default_factory=dict)


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
    """How many blocks there are to write."""
    return sum(len(fill.blocks) for fill in fills)


@dataclass(frozen=True)
class _Look:
    """One tensor of one donor, to be looked at once; `fill` says what is made of it."""

    donor: int
    info: TensorInfo
    fill: Fill

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Of the tensor as it is in the donor."""
        rows = self.info.shape[0] if self.info.shape else 1
        step = max(1, BLOCK_ELEMENTS // max(1, self.info.num_elements // max(1, rows)))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def examine(plan: Plan, readers: Sequence[CheckpointReader], workers: int, progress: Progress = silent) -> Source:
    """Read the sources once: hash their files, sum their FFN units, and look for NaN and infinity.

    Raises:
        CheckpointError: a weight is not finite, or would not be in the target's dtype; names the tensor.
    """
    source = Source([{} for _ in readers])
    # The shared expert and the routed ones are made of the same matrices: the routed ones come first.
    looks = {(d, info.name): _Look(d, info, fill) for fill in plan.fills for d, info in enumerate(fill.sources)}
    looks |= {(d, i.name): _Look(d, i, f) for f in plan.fills if f.kind == "expert" for d, i in enumerate(f.sources)}
    # In one piece: small tensors that outlive the blocks between them would keep the allocator from ever
    # giving those back, and memory would grow with the number of layers.
    summed = [
        (d, f.layer or 0, f.projection or "") for f in plan.fills if f.kind == "expert" for d in range(len(readers))
    ]
    if plan.num_redrawn:
        moments = torch.zeros((2, len(summed), plan.intermediate_size), dtype=torch.float64)
        source.sums, source.squares = (dict(zip(summed, part, strict=True)) for part in moments)
    done, lock = Counter[str](), threading.Lock()
    total = sum(len(look.blocks) for look in looks.values()) + sum(len(reader.shards) for reader in readers)

    def advance() -> None:
        with lock:
            done["steps"] += 1
            progress("reading the source", done["steps"], total)

    def hash_shard(donor: int, shard: str) -> None:
        source.sha256[donor][shard] = sha256_file(readers[donor].folder / shard)
        advance()

    def look_at(look: _Look) -> None:
        fill, info, reader = look.fill, look.info, readers[look.donor]
        key = (look.donor, fill.layer or 0, fill.projection or "")
        is_ffn = fill.kind == "expert" and key in source.sums
        largest = max(1.0, plan.factor(fill))
        overflows = fill.dtype != "F32" and (fill.dtype != info.dtype or largest > 1)
        for start, stop in look.blocks:
            block = read_rows(reader, info, start, stop).float()
            # A sum is finite unless an entry is not (or the sum overflows: then look at each entry).
            if not torch.isfinite(block.sum()) and not torch.isfinite(block).all():
                raise CheckpointError(
                    f"{reader.folder / info.shard}: tensor {info.name} holds NaN or infinity;"
                    " nothing was written: mend or fetch the source again"
                )
            if overflows and not torch.isfinite((block * largest).to(TORCH_DTYPES[fill.dtype])).all():
                raise CheckpointError(
                    f"{reader.folder / info.shard}: tensor {info.name} holds values that"
                    f" {FLOAT_DTYPES[fill.dtype]} cannot; nothing was written: choose another --dtype"
                )
            if is_ffn:
                wide = block.double()
                if fill.projection == "down":
                    source.sums[key] += wide.sum(0)
                    source.squares[key] += wide.square_().sum(0)
                else:
                    source.sums[key][start:stop] = wide.sum(1)
                    source.squares[key][start:stop] = wide.square_().sum(1)
            advance()

    jobs: list[Callable[[], None]] = [
        partial(hash_shard, donor, shard) for donor, reader in enumerate(readers) for shard in reader.shards
    ]
    in_threads([*jobs, *(partial(look_at, look) for look in looks.values())], workers)
    return source
