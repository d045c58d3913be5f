"""Documents -> the ids of their tokens: on all cores, in order, in bounded memory."""

from __future__ import annotations

import os
from array import array
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

# A thread gets documents of about this many characters at once; a quarter of it takes a third longer for short ones.
_BATCH_CHARACTERS = 2**18
# Characters that wait or are worked on, per core. A tokenizer takes about 110 bytes of memory per character.
_CHARACTERS_PER_CORE = 2**20


class Encoded(NamedTuple):
    """Consecutive documents as tokens.

    Attributes:
        tokens: (T,) uint32, the documents one after another, each with its end-of-text token.
        ends: where each document ends in `tokens`.
        num_bytes: of their text as UTF-8.
    """

    tokens: np.ndarray
    ends: list[int]
    num_bytes: int


def encode(documents: Iterable[str], encoder: Any, eos: int) -> Generator[Encoded, None, None]:
    """Tokenize documents in their order, each without special tokens and ended by `eos`.

    The tokenizer works without Python's lock, so threads keep all cores busy while this one reads the
    documents that come next and its caller writes those that are done. However long the documents are, no
    more than 2**20 characters per core are in memory at once, or a single document.

    Args:
        documents: read one after another, in the thread of the caller.
        encoder: a `tokenizers.Tokenizer`.
        eos: the id of the end-of-text token.
    """
    cores = len(os.sched_getaffinity(0))
    pending: deque[tuple[int, Future[Encoded]]] = deque()
    characters = 0
    pool = ThreadPoolExecutor(cores + 1)  # one more, because one may wait for Python's lock
    try:
        for batch, size in _batches(documents):
            while pending and (characters + size > cores * _CHARACTERS_PER_CORE or len(pending) > 2 * cores):
                done, encoded = pending.popleft()
                characters -= done
                yield encoded.result()
            pending.append((size, pool.submit(_encode, batch, encoder, eos)))
            characters += size
        while pending:
            yield pending.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(batch: Sequence[str], encoder: Any, eos: int) -> Encoded:
    tokens, ends = array("I"), []
    for encoding in encoder.encode_batch_fast(batch, add_special_tokens=False):
        tokens.fromlist(encoding.ids)  # three times as fast as an array of NumPy from the list
        tokens.append(eos)
        ends.append(len(tokens))
    return Encoded(np.frombuffer(tokens, np.uint32), ends, len("".join(batch).encode()))


def _batches(documents: Iterable[str]) -> Iterator[tuple[list[str], int]]:
    """Documents of together `_BATCH_CHARACTERS` or a little more, and the number of characters."""
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch, characters
            batch, characters = [], 0
    if batch:
        yield batch, characters
