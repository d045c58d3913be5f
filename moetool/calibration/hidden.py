"""The hidden states of batches between two layers: in memory or, if large, in an unnamed file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from moetool.calibration.options import IN_MEMORY
from moetool.calibration.store import cache_folder
from moetool.checkpoint.folder import unnamed_file
from moetool.surgery.rows import raw_bytes


class HiddenStates:
    """A tensor for each batch, which may be replaced by another of the same size.

    Args:
        sizes: bytes of each.

    Raises:
        OSError: they take more than IN_MEMORY, and the disk of the cache has no room for them.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._kept: dict[int, Tensor] = {}  # in a file: their shapes, without elements
        self._file = None
        if sum(sizes) > IN_MEMORY:
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            self._file = unnamed_file(folder, sum(sizes))
            self._starts = [0, *accumulate(sizes)]

    def __setitem__(self, batch: int, states: Tensor) -> None:
        if self._file is None:
            self._kept[batch] = states.cpu()
            return
        self._kept[batch] = states.to("meta")
        left, place = raw_bytes(states.cpu()), self._starts[batch]
        assert len(left) <= self._starts[batch + 1] - place
        while left:
            count = os.pwrite(self._file.fileno(), left, place)
            left, place = left[count:], place + count

    def __getitem__(self, batch: int) -> Tensor:
        if self._file is None:
            return self._kept[batch]
        states = torch.empty_like(self._kept[batch], device="cpu")
        left, place = raw_bytes(states), self._starts[batch]
        while left:
            count = os.preadv(self._file.fileno(), [left], place)
            left, place = left[count:], place + count
        return states
