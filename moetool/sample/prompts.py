"""The beginnings of samples: a start token, or the first tokens of documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moetool.data.mixture import key, permute
from moetool.data.tokens import TokenStream
from moetool.errors import ConfigError, DataError


@dataclass(frozen=True)
class Prompts:
    """The prompt of sample n, as a pure function of (seed, n).

    Attributes:
        begin: the token before every document.
        num_tokens: of a document that begin a sample; 0 without texts.
        texts: name -> tokens.
        long: name -> (D,) int64, the documents that have so many tokens.
        seed: of the order of documents.
    """

    begin: int
    num_tokens: int
    texts: Mapping[str, TokenStream]
    long: Mapping[str, np.ndarray]
    seed: int

    def name(self, n: int) -> str | None:
        """The text from which sample n begins."""
        return [*self.texts][n % len(self.texts)] if self.texts else None

    def tokens(self, n: int) -> list[int]:
        """The tokens of sample n that come from its text: as many for each n."""
        name = self.name(n)
        if name is None:
            return []
        text, long = self.texts[name], self.long[name]
        epoch, place = divmod(n // len(self.texts), len(long))
        document = long[permute(place, len(long), key(self.seed, "prompts", name, epoch))]
        return [int(token) for token in text.read(int(text.offsets[document]), self.num_tokens)]


def open_prompts(begin: int, texts: Mapping[str, TokenStream], num_tokens: int, seq_len: int, seed: int) -> Prompts:
    """Find the documents that are long enough.

    Raises:
        ConfigError: a prompt would fill a whole sample.
        DataError: a text has no such document.
    """
    if texts and num_tokens >= seq_len:
        raise ConfigError(
            f"--prompt-tokens {num_tokens} leaves no room in a sample of {seq_len} tokens; give fewer, or a larger"
            " --seq-len"
        )
    long = {}
    for name, text in texts.items():
        lengths = np.diff(text.offsets) - 1  # without the end-of-text token
        long[name] = np.flatnonzero(lengths >= num_tokens)
        if not len(long[name]):
            raise DataError(
                f"--prompts {name}: the longest document has {lengths.max()} tokens, fewer than --prompt-tokens"
                f" {num_tokens}; give fewer --prompt-tokens, or another text"
            )
    return Prompts(begin, num_tokens if texts else 0, texts, long, seed)
