"""Every loss and gradient norm of a large metrics.jsonl, without reading its rows whole."""

from __future__ import annotations

import multiprocessing
import re
import signal
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np

from moetool.watch.tail import open_regular
from moetool.watch.thin import Array

_LOSS = b', "loss": '
_VALUES = {"loss": _LOSS + rb'([^,\n]+), "lr": ', "grad_norm": rb'"grad_norm": ([^,\n]+),'}


def scanned(path: Path) -> dict[str, tuple[Array, Array]]:
    """Loss and gradient norm of every training row, each with its steps; each is found in a process of its own.

    Returns:
        Nothing where rows are not as this version writes them, a run went back in them, or there is no such process.
    """
    with warnings.catch_warnings(), suppress(OSError, BrokenExecutor, NotImplementedError):
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: they are numpy's, and at rest
        fork, quiet = multiprocessing.get_context("fork"), (signal.SIGINT, signal.SIG_IGN)
        with ProcessPoolExecutor(len(_VALUES), fork, signal.signal, quiet) as pool:
            columns = dict(zip(_VALUES, pool.map(partial(_column, path), _VALUES.values()), strict=True))
        if all(columns.values()):
            return {name: column for name, column in columns.items() if column}
    return {}


def _column(path: Path, value: bytes) -> tuple[Array, Array] | None:
    """One of them. A file that is cut short meanwhile ends this process, as maps do, and no other."""
    with open_regular(path) as file, suppress(ValueError):  # an empty file, or what is no number
        data = mmap(file.fileno(), 0, access=ACCESS_READ)
        places = data.find(_LOSS), data.rfind(_LOSS)
        first, last = (re.search(rb'"step": (\d{1,15})$', data[max(0, at - 40) : max(0, at)]) for at in places)
        if first and last:
            begin, number = int(first[1]), int(last[1]) + 1 - int(first[1])
            texts = re.findall(value, data)
            if len(texts) == number:  # else a step is missing, or there twice
                return np.arange(begin, begin + number), np.fromiter(map(float, texts), np.float64, number)
    return None
