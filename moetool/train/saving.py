"""Saving while training goes on: step folders are written by a thread, from a copy in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Event

import torch
from torch import Tensor

from moetool.cost import devices
from moetool.train.accelerator import is_shared_out, whole


class Saver:
    """Copies what is to be saved, and writes it, one step at a time.

    As a context it waits for a step that is being written, whatever error ends the run; a signal ends both.
    """

    def __init__(self, need: int) -> None:
        """Decide whether training goes on while a step is written: where host memory has room for the copy.

        Args:
            need: bytes of host memory that the copy takes, with all else that the run is still going to take.
        """
        free = devices.free_memory("cpu")
        self._aside = free is not None and need <= free
        self._copies: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "save")
        self._writing: Future[object] | None = None
        self._stop = Event()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self._stop.set()
        self._thread.shutdown()

    def copies(self, tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
        """Whole tensors in host memory, which training does not change until the next copies are made.

        Waits for the step that is being written, whose copies these may overwrite.

        Args:
            tensors: by name; where they are shared out, all processes must walk through them.
            keep: whether this process saves; the others take part in gathering.
        """
        self.wait()
        kept: dict[str, Tensor] = {}
        for name, tensor in tensors:
            if is_shared_out(tensor) or (keep and not self._aside):
                copy = whole(tensor)
            elif keep:
                if name not in self._copies:  # for good: memory that a GPU copies into is slow to get
                    self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                copy = self._copies[name].copy_(tensor.detach(), non_blocking=True)
            if keep:
                kept[name] = copy
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return kept

    def write(self, write: Callable[[Callable[[], None]], object]) -> None:
        """Have a step written, from copies.

        Args:
            write: writes it, and between pieces of work calls what it is given, which ends it where that is wanted.
        """
        if self._aside:
            self._writing = self._thread.submit(write, self._go_on)
        else:
            write(self._go_on)

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise CancelledError

    def check(self) -> None:
        """Raise what the last step failed with, if it has been written."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last step is written; raise what it failed with."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()
