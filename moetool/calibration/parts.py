"""Texts as the parts that run through a model together, and their held-out tokens.

Shapes: B windows, S tokens of each, T tokens of a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moetool.errors import DataError
from moetool.routing.text_pass import Tokens, Windows, read_batches

HELD_OUT = 4  # every so many windows of a text are held out, until the sample is full


@dataclass(frozen=True)
class Part:
    """Some windows of a text.

    Attributes:
        text: its name.
        ids_BS: the tokens; the last window of a text is filled up.
        own_T: tokens that are in sums.
        held_T: tokens that are held out.
        first_T: those of the first half of the text.
        limit: tokens of each sample up to this text, so that every text has its share.
        done: tokens of the text up to here.
        total: tokens of the text.
    """

    text: str
    ids_BS: Tensor
    own_T: Tensor
    held_T: Tensor
    first_T: Tensor
    limit: int
    done: int
    total: int


def parts_of_texts(
    texts: Mapping[str, Tokens],
    sample: int,
    vocabulary: int,
    windows: Windows,
    option: str = "--data",
) -> Iterator[Part]:
    """Cut texts into parts; every fourth window of each is held out, until there are enough for the sample.

    Args:
        texts: name -> tokens.
        sample: tokens of each sample.
        vocabulary: tokens that the model knows.
        windows: how they are read; a part is a batch of them.
        option: that gave the texts, for errors.

    Raises:
        DataError: a text has no tokens, or one that the model does not know.
    """
    held = 0
    for position, (name, text) in enumerate(texts.items(), 1):
        limit, first, done = sample * position // len(texts), 0, 0
        total = windows.num_tokens(text)
        if total < 1:
            raise DataError(f"{option} {name}: the text has no tokens; give a longer one")
        for batch in read_batches(text, windows, vocabulary, f"{option} {name}"):
            B, S = batch.ids_BS.shape
            held_B = (torch.arange(first, first + B) % HELD_OUT == HELD_OUT - 1) & (held < limit)
            text_T = torch.ones(B * S, dtype=torch.bool) if batch.mask_T is None else batch.mask_T
            out_T = held_B.repeat_interleave(S)
            first, done = first + B, done + len(batch.tokens_N)
            held = min(limit, held + int((text_T & out_T).sum()))
            first_T = torch.arange(batch.start, batch.start + B * S) < total // 2
            yield Part(name, batch.ids_BS, text_T & ~out_T, text_T & out_T, first_T, limit, done, total)
