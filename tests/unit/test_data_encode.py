"""Documents are tokenized on all cores, in large batches, in order, and few at a time are in memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import pytest

from moetool.data.encode import encode

EOS = 7


class Encoder:
    """A token per document, its length; `wait` is called with each batch, and what is in work is counted."""

    def __init__(self, wait: Callable[[Sequence[str]], object] = lambda batch: None) -> None:
        self.wait = wait
        self.lock = threading.Lock()
        self.batches: list[int] = []
        self.characters = self.most = 0

    def encode_batch_fast(self, batch: Sequence[str], add_special_tokens: bool) -> list[SimpleNamespace]:
        assert not add_special_tokens
        size = sum(map(len, batch))
        with self.lock:
            self.batches.append(len(batch))
            self.characters += size
            self.most = max(self.most, self.characters)
        self.wait(batch)
        with self.lock:
            self.characters -= size
        return [SimpleNamespace(ids=[len(text)]) for text in batch]


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})


def test_short_documents_share_a_call() -> None:
    encoder = Encoder()
    encoded = list(encode(["x" * 64] * 10_000, encoder, EOS))
    assert sorted(encoder.batches) == [1808, 4096, 4096]  # 2**18 / 64 in each but the last
    assert sum(len(batch.ends) for batch in encoded) == 10_000
    assert encoded[0].tokens[:4].tolist() == [64, EOS, 64, EOS]
    assert encoded[0].ends[:2] == [2, 4]
    assert encoded[0].num_bytes == 2**18


def test_long_documents_are_tokenized_at_the_same_time() -> None:
    together = threading.Barrier(2)  # broken, and an error, unless both are in the tokenizer
    encoder = Encoder(lambda batch: together.wait(timeout=60))
    assert len(list(encode(["x" * 10**6] * 4, encoder, EOS))) == 4


def test_the_next_documents_are_read_while_the_tokenizer_works() -> None:
    read = threading.Event()

    def documents() -> Iterator[str]:
        yield "x" * 2**18
        read.set()
        yield "y"

    encoder = Encoder(lambda batch: read.wait(timeout=60) or pytest.fail("nothing was read meanwhile"))
    assert len(list(encode(documents(), encoder, EOS))) == 2


def test_the_order_is_that_of_the_documents() -> None:
    sizes = [2**18 + i for i in range(12)]
    encoder = Encoder(lambda batch: time.sleep(0.01 * (len(batch[0]) % 3)))
    encoded = encode(["x" * size for size in sizes], encoder, EOS)
    assert [int(token) for batch in encoded for token in batch.tokens] == [n for size in sizes for n in (size, EOS)]


@pytest.mark.parametrize("length", [10**3, 5 * 10**5, 2**20, 5 * 10**6])
def test_what_is_in_memory_is_bounded(length: int) -> None:
    read = 0

    def documents() -> Iterator[str]:
        nonlocal read
        for _ in range(max(8, 10**6 // length)):
            read += length
            yield "x" * length

    encoder, given = Encoder(lambda batch: time.sleep(0.001)), 0
    for batch in encode(documents(), encoder, EOS):
        given += batch.num_bytes
        assert read - given <= max(2 * 2**20, length) + length
    assert encoder.most <= max(2 * 2**20, length)


def test_an_error_of_the_documents_or_of_the_tokenizer_is_raised_as_it_is() -> None:
    def documents() -> Iterator[str]:
        yield "x"
        raise OSError("line 2")

    def fail(batch: Sequence[str]) -> None:
        raise ValueError("no token")

    with pytest.raises(OSError, match="line 2"):
        list(encode(documents(), Encoder(), EOS))
    with pytest.raises(ValueError, match="no token"):
        list(encode(["x"], Encoder(fail), EOS))
