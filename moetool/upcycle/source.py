"""The dense models' numbers: blocks of rows, read in threads, and one pass over all of them."""

from __future__ import annotations

import hashlib
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from moetool.arch.forms import pieces
from moetool.checkpoint.reader import BlockFile, CheckpointReader, TensorInfo
from moetool.errors import CheckpointError
from moetool.progress import Progress, silent
from moetool.upcycle.check import FLOAT_DTYPES
from moetool.upcycle.layout import BLOCK_ELEMENTS, Fill
from moetool.upcycle.plan import Plan

MAX_WAITING = 8  # pieces of a file that wait to be hashed
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
    """Rows [start, stop) of a tensor, shape (rows, row length) (a vector: rows of one); bytes of a foreign dtype."""
    rows = info.shape[0] if info.shape else 1
    row_bytes = info.size // rows
    buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
    reader.read_into(info, start * row_bytes, raw_bytes(buffer))
    return buffer.view(TORCH_DTYPES.get(info.dtype, torch.uint8)).view(stop - start, -1)


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


class _Hash:
    """SHA-256 of a file whose pieces one thread reads, in order, and any thread hashes."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._waiting: deque[memoryview] = deque()
        self._busy = threading.Lock()

    def feed(self, piece: memoryview) -> None:
        """Add the next piece."""
        self._waiting.append(piece)
        if len(self._waiting) > MAX_WAITING:
            self.work(wait=True)

    def work(self, wait: bool) -> None:
        """Hash what waits, unless another thread is at it and `wait` is false."""
        if self._busy.acquire(blocking=wait):
            try:
                while self._waiting:
                    self._sha256.update(self._waiting.popleft())
            finally:
                self._busy.release()

    def hexdigest(self) -> str:
        """Of all that was fed."""
        self.work(wait=True)
        return self._sha256.hexdigest()


def examine(plan: Plan, readers: Sequence[CheckpointReader], workers: int, progress: Progress = silent) -> Source:
    """Read the sources once: hash their files, sum their FFN units, and look for NaN and infinity.

    A shard is read by one thread from its first byte to its last, because a hash and a sum of rows
    depend on the order; where threads are left, others hash what those have read.

    Raises:
        CheckpointError: a weight is not finite, or would not be in the target's dtype; names the tensor.
    """
    source = Source([{} for _ in readers])
    # The shared expert and the routed ones are made of the same matrices: the routed ones come last.
    uses = {(d, info.name): fill for fill in plan.fills for d, info in enumerate(fill.sources)}
    uses |= {(d, info.name): f for f in plan.fills if f.kind == "expert" for d, info in enumerate(f.sources)}
    # In one piece: small tensors that outlive the blocks between them would keep the allocator from ever
    # giving those back, and memory would grow with the number of layers.
    if plan.num_redrawn:
        ffn = [(d, *_ffn(fill)) for fill in plan.fills if fill.kind == "expert" for d in range(len(readers))]
        moments = torch.zeros((2, len(ffn), plan.intermediate_size), dtype=torch.float64)
        source.sums, source.squares = (dict(zip(ffn, part, strict=True)) for part in moments)
    hashes = {(d, shard): _Hash() for d, reader in enumerate(readers) for shard in reader.shards}
    total = sum(info.size for reader in readers for info in reader.tensors.values())
    done, left, lock = 0, len(hashes), threading.Lock()

    def read_shard(donor: int, shard: str) -> None:
        nonlocal done, left
        reader, sha256 = readers[donor], hashes[donor, shard]
        whole = sorted((t for t in reader.tensors.values() if t.shard == shard), key=lambda t: t.start)
        used = (fill.sources[donor] for fill in plan.fills if fill.sources and fill.sources[donor].shard == shard)
        tensors = list(pieces(whole, used))
        try:
            with (reader.folder / shard).open("rb") as file:  # the header: what lies before the first tensor
                sha256.feed(memoryview(file.read(tensors[0].start if tensors else -1)))
            for info in tensors:
                for start, stop in _block_rows(info):
                    block = read_rows(reader, info, start, stop)
                    sha256.feed(raw_bytes(block))
                    if (donor, info.name) in uses:
                        _look(plan, source, reader, donor, info, uses[donor, info.name], start, block)
                    with lock:
                        done += block.nbytes
                        progress("reading the source", done, total)
            source.sha256[donor][shard] = sha256.hexdigest()
            _check_name(reader.folder / shard, source.sha256[donor][shard])
        finally:
            with lock:
                left -= 1

    def help_hashing() -> None:
        while left:
            for sha256 in hashes.values():
                sha256.work(wait=False)
            time.sleep(0.001)

    helpers = min(len(hashes), max(0, workers - len(hashes)))
    in_threads([*(partial(read_shard, *key) for key in hashes), *[help_hashing] * helpers], workers)
    return source


def _check_name(path: Path, sha256: str) -> None:
    """The hub's cache names what it fetched by its SHA-256, and a snapshot links to it."""
    name = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", name) and name != sha256:
        raise CheckpointError(
            f"{path} is not what was fetched: its SHA-256 is not {name}, by which the hub's cache names it; delete"
            f" {path.resolve()} and run the same command again"
        )


def _ffn(fill: Fill) -> tuple[int, str]:
    assert fill.layer is not None
    assert fill.projection is not None
    return fill.layer, fill.projection


def _block_rows(info: TensorInfo) -> list[tuple[int, int]]:
    rows = info.shape[0] if info.shape else 1
    step = max(1, BLOCK_ELEMENTS // max(1, info.num_elements // max(1, rows)))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)] if info.size else []


def _look(
    plan: Plan,
    source: Source,
    reader: BlockFile,
    donor: int,
    info: TensorInfo,
    fill: Fill,
    start: int,
    rows: torch.Tensor,
) -> None:
    """Sum the units in some rows of a tensor, and refuse what is not finite; `fill` is what is made of it."""
    block = rows.float()
    # A sum is finite unless an entry is not (or the sum overflows: then look at each entry).
    if not torch.isfinite(block.sum()) and not torch.isfinite(block).all():
        raise CheckpointError(
            f"{reader.folder / info.shard}: tensor {info.name} holds NaN or infinity;"
            " nothing was written: mend or fetch the source again"
        )
    largest = max(1.0, plan.factor(fill))
    overflows = fill.dtype != "F32" and (fill.dtype != info.dtype or largest > 1)
    if overflows and not torch.isfinite((block * largest).to(TORCH_DTYPES[fill.dtype])).all():
        raise CheckpointError(
            f"{reader.folder / info.shard}: tensor {info.name} holds values that"
            f" {FLOAT_DTYPES[fill.dtype]} cannot; nothing was written: choose another --dtype"
        )
    if fill.kind != "expert" or not plan.num_redrawn:
        return
    sums, squares = source.sums[donor, *_ffn(fill)], source.squares[donor, *_ffn(fill)]
    wide = block.double()
    if fill.projection == "down":
        sums += wide.sum(0)
        squares += wide.square_().sum(0)
    else:
        sums[start : start + len(wide)] = wide.sum(1)
        squares[start : start + len(wide)] = wide.square_().sum(1)
