"""One pass of a model over texts, counting routes as they are made.

Shapes: B sequences, S tokens per sequence, T = B x S tokens of a batch with its padding, N without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moetool.errors import ConfigError, DataError
from moetool.progress import Progress, silent
from moetool.routing.capture import Route, RouterCapture
from moetool.routing.shape import probe, run_layers
from moetool.routing.stats import RoutingStats

SEQ_LEN = 2048


class Tokens(Protocol):
    """A text as tokens, such as `moetool.data.tokens.TokenStream`."""

    @property
    def num_tokens(self) -> int: ...

    def read(self, start: int, length: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Windows:
    """How much of a text is read, and in which pieces.

    Attributes:
        seq_len: tokens per window; windows do not see each other.
        batch_size: windows per forward.
        max_tokens: the first so many tokens of each text.
    """

    seq_len: int
    batch_size: int
    max_tokens: int

    def num_tokens(self, text: Tokens) -> int:
        """Tokens of a text that are read."""
        return min(text.num_tokens, self.max_tokens)


@dataclass(frozen=True)
class Batch:
    """Consecutive windows of a text.

    Attributes:
        start: place of the first token in the text.
        tokens_N: the tokens.
        next_N: the token after each; one shorter than `tokens_N` at the end of the text.
        ids_BS: the tokens as windows; the last window of a text is filled up with zeros.
        mask_T: False for the filling; None when there is none.
    """

    start: int
    tokens_N: np.ndarray
    next_N: np.ndarray
    ids_BS: Tensor
    mask_T: Tensor | None


# Called inside the hook with the text's name, a route and its batch.
Observer = Callable[[str, Route, Batch], None]


def read_batches(text: Tokens, windows: Windows, vocabulary: int, option: str) -> Iterator[Batch]:
    """Cut a text into windows, several at a time.

    Args:
        text: the tokens.
        windows: how they are read.
        vocabulary: tokens that the model knows.
        option: that gave the text, and its name, for errors.

    Raises:
        DataError: the model does not know a token.
    """
    total, size = windows.num_tokens(text), windows.seq_len * windows.batch_size
    for start in range(0, total, size):
        tokens_N = text.read(start, min(size, total - start))
        if (unknown := int(tokens_N.max())) >= vocabulary:
            raise DataError(
                f"{option}: token {unknown} is not among the model's {vocabulary} tokens; the text was tokenized for"
                " another model"
            )
        N = len(tokens_N)
        next_N = text.read(start + 1, min(N, text.num_tokens - start - 1))
        # A text shorter than one window is one short window, not mostly filling.
        S = min(windows.seq_len, N)
        B = -(-N // S)
        ids_T = np.zeros(B * S, dtype=np.int64)
        ids_T[:N] = tokens_N
        mask_T = torch.arange(B * S) < N if N < B * S else None
        yield Batch(start, tokens_N, next_N, torch.from_numpy(ids_T).reshape(B, S), mask_T)


def window(model: Any, seq_len: int | None) -> int:
    """How many tokens of a text a model gets at a time.

    Args:
        model: it may have fewer positions than SEQ_LEN, the default.
        seq_len: `--seq-len`.

    Raises:
        ConfigError: the model has fewer positions than `seq_len`.
    """
    positions = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or SEQ_LEN)
    if seq_len and seq_len > positions:
        raise ConfigError(f"--seq-len {seq_len}: the model has only {positions} positions; give at most that")
    return seq_len or min(SEQ_LEN, positions)


@torch.no_grad()  # not inference mode, whose tensors FSDP cannot put in place
def measure(
    model: Any,
    capture: RouterCapture,
    texts: Mapping[str, Tokens],
    windows: Windows,
    observers: Sequence[Observer] = (),
    progress: Progress = silent,
) -> dict[str, RoutingStats]:
    """Run texts through a model and count its routes.

    Args:
        model: a causal language model of transformers; its head is not run.
        capture: the hooks on it.
        texts: name -> tokens.
        windows: how they are read.
        observers: called for each route besides, in the order of layers and batches.

    Returns:
        Name -> sums.

    Raises:
        CheckpointError: a router cannot be read, or layers differ in experts or top-k.
        DataError: a text has no tokens, or one that the model does not know.
    """
    device, vocabulary = model.get_input_embeddings().weight.device, model.get_input_embeddings().num_embeddings
    empty = probe(model, capture)
    stats: dict[str, RoutingStats] = {}
    for name, text in texts.items():
        total = windows.num_tokens(text)
        if total < 1:
            raise DataError(f"--data {name}: the text has no tokens to route; give a longer one")
        stats[name] = sums = deepcopy(empty)
        began, done = time.monotonic(), 0
        for batch in read_batches(text, windows, vocabulary, f"--data {name}"):
            # Filling lies behind the text, where a causal model does not see it: no attention mask.
            with capture.collect(partial(_count, sums, observers, name, batch)):
                run_layers(model, batch.ids_BS.to(device))
            done += len(batch.tokens_N)
            progress(f"routing of {name}", done, total, f"{done / (time.monotonic() - began):.0f} tokens/s")
    return stats


def _count(sums: RoutingStats, observers: Sequence[Observer], name: str, batch: Batch, route: Route) -> None:
    sums.update([route], batch.mask_T)
    for observe in observers:
        observe(name, route, batch)
