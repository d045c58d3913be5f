"""Saving during training: each process writes its files of a step folder in a thread, from a copy in host memory.

No process holds more than its share of the model and one part of what it writes (assignment.py). The threads talk in a
gloo group of their own, so training may talk at the same time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from moetool.cost import devices
from moetool.errors import CheckpointError, in_one_line
from moetool.train.assignment import FILES, Assignment, Contents, Held, Part, assign
from moetool.train.ranks import ALONE, Ranks, Severed
from moetool.train.shards import Region, boxes, extent, local, region
from moetool.train.tensor_file import TensorFile

# Threads that write where there is one process, because one is slower than a fast disk. They help only as far as they
# write different files: the system locks a file that is written. Several processes write in parallel anyway, and must
# not hold more than one tensor each that others sent.
WRITERS = 4
PATIENCE = 5.0  # seconds in which a thread ends that was told to; it may be waiting for a process that is gone


class Saver:
    """Copies the tensors to save, and writes them in a thread, one step at a time.

    As a context it waits for a step that is being written, whatever error ends the run; a signal ends both.

    Attributes:
        ranks: the processes that save together.
        assignment: what each of them does; None before the first step is saved.
    """

    def __init__(self, need: int, ranks: Ranks = ALONE) -> None:
        """Decide whether training goes on while a step is written: where host memory has room for the copy.

        Args:
            need: bytes of this machine's memory that its processes' copies take, with all else that the run is still
                going to take there.
            ranks: the processes that save together; all must call.
        """
        self.ranks = ranks
        free = devices.free_memory("cpu")
        self._aside = all(self.ranks.gather(free is not None and need <= free))
        self._described: Any = None
        self.assignment: Assignment | None = None
        self._copies: dict[str, Tensor] = {}
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._stop = Event()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)
        if stopped:
            self._stop.set()
        if self._thread:
            self._thread.join(PATIENCE if stopped else None)

    def save(
        self,
        tensors: Mapping[str, Tensor],
        units: Sequence[tuple[str, ...]],
        contents: Contents,
        write: Callable[[Callable[[Path], dict[str, str]]], object],
        kinds: Collection[str] = tuple(FILES),
    ) -> None:
        """Have a step written; training may change the tensors afterwards. All processes must call.

        Waits for the step that is being written before.

        Args:
            tensors: all that is saved, by name; this process may hold a share of each.
            units: see `assign`.
            contents: see `assign`.
            write: writes the step folder. It is given a function that writes this process's files of tensors into a
                folder, together with the others, and returns the digests of all such files by path.
            kinds: of files that are written (see `assignment.FILES`). Who writes what, and so which copies are kept,
                does not depend on it.
        """
        self.wait()
        assignment = self._assigned(tensors, units, contents).only(kinds)

        def wanted(whole: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
            return (made for made in contents(whole) if made[0] in kinds)

        if self._aside:
            self._copy({name: local(tensors[name]) for name in assignment.given(self.ranks.rank)})
            read = self._copies.__getitem__
        else:

            def read(name: str) -> Tensor:
                return local(tensors[name]).cpu()

        def put(folder: Path) -> dict[str, str]:
            digests = self.ranks.together(lambda: write_files(assignment, self.ranks, read, wanted, folder, self.go_on))
            files = {path: digest for one in digests for path, digest in one.items()}
            absent = [path for path in files if not (folder / path).is_file()] if self.ranks.is_main else []
            if absent:
                raise CheckpointError(
                    f"{folder / absent[0]} was written by another process, but the first one cannot see it; OUT must"
                    f" be on a file system that all processes share"
                )
            return files

        def run() -> None:
            try:
                write(put)
            except BaseException as error:
                self._error = error

        if self._aside:
            self._thread = Thread(target=run, name="save", daemon=True)
            self._thread.start()
        else:
            write(put)

    def _assigned(
        self, tensors: Mapping[str, Tensor], units: Sequence[tuple[str, ...]], contents: Contents
    ) -> Assignment:
        """Who writes what. It changes only with what this process holds, and then in all processes."""
        described = {name: (tensor.dtype, tuple(tensor.shape), region(tensor)) for name, tensor in tensors.items()}
        if self.assignment is None or described != self._described:
            everywhere = self.ranks.gather({name: held for name, (_, _, held) in described.items()})
            held = {
                name: Held(dtype, shape, tuple(one[name] for one in everywhere))
                for name, (dtype, shape, _) in described.items()
            }
            self._described, self.assignment = described, assign(held, units, contents, self.ranks.size)
        return self.assignment

    def _copy(self, shares: Mapping[str, Tensor]) -> None:
        for name, share in shares.items():
            if name not in self._copies:  # for good: memory that a GPU copies into is slow to get
                self._copies[name] = torch.empty(share.shape, dtype=share.dtype, pin_memory=share.is_cuda)
            self._copies[name].copy_(share, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def go_on(self) -> None:
        """Called between pieces of work; raises once the run is ending."""
        if self._stop.is_set():
            raise CancelledError

    def failed(self) -> bool:
        """Whether the last step has been written, and that has failed."""
        return self._error is not None

    def wait(self) -> None:
        """Wait until the last step is written; raise what it failed with."""
        if self._thread:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error:
            raise error


def write_files(
    assignment: Assignment,
    ranks: Ranks,
    read: Callable[[str], Tensor],
    contents: Contents,
    folder: Path,
    go_on: Callable[[], None],
) -> dict[str, str]:
    """Write this process's files of a step, in threads; all must call, also those that write nothing.

    A process that cannot write still gives what the others need.

    Args:
        assignment: what each does.
        ranks: they.
        read: a tensor's name -> what this process holds of it, on the CPU.
        contents: see `assign`.
        folder: of the step.
        go_on: called between pieces of work; may raise.

    Returns:
        Digests by path.

    Raises:
        Exception: what writing failed with.
        Severed: this process cannot give what it holds, or another one does not.
    """
    files: dict[str, TensorFile] = {}
    places: dict[tuple[str, str], TensorFile] = {}
    errors: list[Exception] = []
    writing: deque[Future[None]] = deque()
    over = Event()
    threads = WRITERS if ranks.size == 1 else 1

    def still() -> None:
        if over.is_set():
            raise CancelledError
        go_on()

    def attempt(do: Callable[[], None]) -> None:
        try:
            if not errors:
                do()
        except CancelledError:
            raise
        except Exception as error:
            errors.append(error)

    with ExitStack() as stack:

        def begin() -> None:
            for file in assignment.files:
                if file.writer == ranks.rank:
                    files[file.path] = stack.enter_context(TensorFile(folder / file.path, file.entries, still))
                    places.update(dict.fromkeys(((file.kind, name) for name in file.entries), files[file.path]))

        def put() -> None:
            for kind, name, tensor in contents(whole):
                until(threads - 1)
                writing.append(pool.submit(places[kind, name].put, name, tensor))

        def until(left: int) -> None:
            while len(writing) > left:
                writing.popleft().result()

        attempt(begin)
        pool = stack.enter_context(ThreadPoolExecutor(threads))  # after the files: it ends before they are closed
        stack.callback(over.set)
        for parts in assignment.rounds:
            go_on()
            try:
                sends = _give(assignment, ranks, parts, read)
                whole = _take(assignment, ranks, parts, read)
            except Exception as failed:
                what = f"{folder} cannot be written: {in_one_line(failed)}; run the same command again"
                raise Severed(what) from failed
            if whole:
                attempt(put)
            whole = {}
            attempt(lambda: until(threads - 1))
            for work, _ in sends:
                work.wait()
        attempt(lambda: until(0))
        for error in errors:
            raise error
        return {path: file.finish() for path, file in files.items()}


def _give(
    assignment: Assignment, ranks: Ranks, parts: Sequence[Part], read: Callable[[str], Tensor]
) -> list[tuple[Any, Tensor]]:
    """Begin to send what this process gives to the writers of a round; the tensors must be kept until that is over."""
    sends: list[tuple[Any, Tensor]] = []
    for part in parts:
        for tag, name in enumerate(part.names):
            if part.writer != ranks.rank and ranks.rank in assignment.sources[name]:
                piece = read(name).contiguous()
                sends.append((ranks.send(piece, part.writer, tag), piece))
    return sends


def _take(
    assignment: Assignment, ranks: Ranks, parts: Sequence[Part], read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """The tensors of the part that this process writes in a round, whole; empty where it writes none."""
    whole: dict[str, Tensor] = {}
    arriving: list[tuple[Any, list[tuple[list[Tensor], Region, Tensor]]]] = []
    for part in parts:
        for tag, name in enumerate(part.names):
            if part.writer != ranks.rank:
                continue
            held, sources = assignment.held[name], assignment.sources[name]
            if list(sources) == [ranks.rank]:
                whole[name] = read(name)
                continue
            whole[name] = torch.empty(held.shape, dtype=held.dtype)
            for sender, given in sources.items():
                slots = [whole[name][there] for there, _ in boxes(given)]
                if sender == ranks.rank:
                    _fill(slots, given, read(name))
                elif len(slots) == 1 and slots[0].is_contiguous():
                    arriving.append((ranks.receive(slots[0], sender, tag), []))
                else:
                    piece = torch.empty(extent(given), dtype=held.dtype)
                    arriving.append((ranks.receive(piece, sender, tag), [(slots, given, piece)]))
    for work, pieces in arriving:
        work.wait()
        for slots, given, piece in pieces:
            _fill(slots, given, piece)
    return whole


def _fill(slots: Sequence[Tensor], given: Region, piece: Tensor) -> None:
    for slot, (_, here) in zip(slots, boxes(given), strict=True):
        slot.copy_(piece[here])
