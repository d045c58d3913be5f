"""The source and window of sample n, as a pure function of (seed, n).

There is no generator with a state. Orders are keyed permutations, and shares are exact fractions split by floors. Any
sample, and the use of every source before it, is computed directly. The sample number alone therefore suffices to
resume a run and to spread it over processes.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

import numpy as np

from moetool.data.tokens import TokenStream, exact_fraction
from moetool.errors import ConfigError, DataError


@dataclass(frozen=True)
class Source:
    """A named token stream of a mixture.

    Attributes:
        name: unique in the mixture.
        stream: its tokens.
        weight: share relative to the other sources of its kind (training, replay).
        replay: whether it is earlier data, repeated to limit forgetting.
    """

    name: str
    stream: TokenStream
    weight: Fraction | Decimal | float | str = 1
    replay: bool = False


@dataclass(frozen=True)
class Sample:
    """Sample n: window `window` of source `source`, in the source's pass number `epoch` (from 0)."""

    source: str
    epoch: int
    window: int


class TokenMixture:
    """Sources mixed into an endless, fixed sequence of windows of `seq_len` + 1 tokens.

    Windows have stride `seq_len`: the last token of one is the first of the next. Every token except the
    stream's first is predicted once per epoch (a remainder shorter than `seq_len` is dropped).
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seq_len: int,
        global_batch_size: int,
        replay_ratio: Fraction | Decimal | float | str = 0,
        seed: int = 0,
    ) -> None:
        """Check the sources and shares.

        Args:
            sources: training and replay sources, in any order.
            seq_len: tokens predicted per window.
            global_batch_size: windows of one optimizer step, over all processes.
            replay_ratio: share of replay windows, 0..1, read as the exact decimal typed. Every
                global batch holds floor or ceil of its share, and so does the running total.
            seed: for the order of windows and positions in a batch.

        Raises:
            ConfigError: names or weights are invalid, or the ratio contradicts the replay sources.
            DataError: a source holds less than one window.
        """
        self.seq_len = seq_len
        self.global_batch_size = global_batch_size
        self.seed = operator.index(seed)
        self.replay_ratio = exact_fraction("--replay-ratio", replay_ratio)
        self.sources = {source.name: source for source in sources}
        self._groups = [[s for s in sources if s.replay is replay] for replay in (False, True)]
        self._shares = [_shares(group) for group in self._groups]
        train, replay = self._groups
        if len(self.sources) < len(sources):
            names = [source.name for source in sources]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"two sources are named '{twice}'; give each --train and --replay its own name")
        if not 0 <= self.replay_ratio <= 1:
            raise ConfigError(f"--replay-ratio {replay_ratio}: give a share between 0 and 1")
        if self.replay_ratio > 0 and not replay:
            raise ConfigError(f"--replay-ratio {replay_ratio} needs text to replay; add --replay NAME=PATH")
        if self.replay_ratio == 0 and replay:
            raise ConfigError(
                f"--replay {replay[0].name} is never used with --replay-ratio 0; raise the ratio or leave out --replay"
            )
        if not train:
            raise ConfigError("no training source; add --train NAME=PATH")
        self.num_windows = {source.name: num_windows(source.stream, seq_len) for source in sources}
        for name, windows in self.num_windows.items():
            if windows < 1:
                raise DataError(
                    f"source '{name}' holds {self.sources[name].stream.num_tokens} tokens, fewer than one window"
                    f" of {seq_len + 1}; give more text or a smaller --seq-len"
                )

    def sample(self, n: int) -> Sample:
        """Sample `n` (from 0)."""
        # operator.index: keys need plain integers, and callers may pass numpy or torch integers.
        step, place = divmod(operator.index(n), self.global_batch_size)
        slot = step * self.global_batch_size + permute(place, self.global_batch_size, key(self.seed, "batch", step))
        before = _floor(slot, self.replay_ratio)
        replay = _floor(slot + 1, self.replay_ratio) > before
        index, k = _choose(self._shares[replay], before if replay else slot - before)
        name = self._groups[replay][index].name
        epoch, place = divmod(k, self.num_windows[name])
        window = permute(place, self.num_windows[name], key(self.seed, "epoch", name, epoch))
        return Sample(name, epoch, window)

    def batch(self, step: int) -> range:
        """The numbers of the samples of optimizer step `step` (from 0), over all processes."""
        return range(step * self.global_batch_size, (step + 1) * self.global_batch_size)

    def tokens(self, n: int) -> np.ndarray:
        """The tokens of sample `n`: int64 of shape (seq_len + 1,); inputs are [:-1], labels [1:]."""
        sample = self.sample(n)
        return self.sources[sample.source].stream.read(sample.window * self.seq_len, self.seq_len + 1)

    def positions(self, n: int) -> np.ndarray:
        """Positions of the tokens of sample `n` in their documents: int64 of shape (seq_len + 1,)."""
        sample = self.sample(n)
        return self.sources[sample.source].stream.positions(sample.window * self.seq_len, self.seq_len + 1)

    def ledger(self, num_samples: int) -> dict[str, dict[str, float]]:
        """The use of each source by the first `num_samples` samples.

        Returns:
            Source name -> `sequences`, `tokens` (sequences x seq_len) and `epochs` (a fraction).
        """
        whole = num_samples - num_samples % self.global_batch_size
        replayed = _floor(whole, self.replay_ratio)
        counts: dict[str, int] = {}
        for group, shares, left in zip(self._groups, self._shares, (whole - replayed, replayed), strict=True):
            for source, share in zip(group, shares, strict=True):
                counts[source.name] = _floor(left, share)
                left -= counts[source.name]
        for n in range(whole, num_samples):  # positions are permuted, so a partial batch is counted one by one
            counts[self.sample(n).source] += 1
        return {
            name: {
                "sequences": counts[name],
                "tokens": counts[name] * self.seq_len,
                "epochs": counts[name] / self.num_windows[name],
            }
            for name in self.sources
        }


def num_windows(stream: TokenStream, seq_len: int) -> int:
    """The number of windows of `seq_len` + 1 tokens with stride `seq_len` in a stream."""
    return max(stream.num_tokens - 1, 0) // seq_len


def permute(index: int, size: int, key: int) -> int:
    """Image of `index` under a pseudo-random permutation of range(size), in constant memory.

    A Feistel network over the next power of four, walked along its cycle until it is back in range
    (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002, section 4 and 5).
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mix(key + number * _GOLDEN + right) >> (64 - half))
        index = left << half | right
        if index < size:
            return index


@lru_cache(maxsize=1024)
def key(*parts: int | str) -> int:
    """A 64-bit key from any values, the same in every process and version."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def _mix(x: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): 64 bits to 64 well-mixed bits."""
    x &= _MASK64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK64
    return x ^ x >> 31


def _floor(count: int, share: Fraction) -> int:
    return count * share.numerator // share.denominator


def _shares(group: list[Source]) -> list[Fraction]:
    """Each source's share of the remainder left by the sources before it (so the last share is 1).

    Raises:
        ConfigError: a weight is not a positive number.
    """
    weights = [exact_fraction(f"--weight {source.name}", source.weight) for source in group]
    for source, weight in zip(group, weights, strict=True):
        if weight <= 0:
            raise ConfigError(f"--weight {source.name}={source.weight}: give a weight above 0")
    return [weight / sum(weights[i:], Fraction(0)) for i, weight in enumerate(weights)]


def _choose(shares: list[Fraction], k: int) -> tuple[int, int]:
    """The source of sample k of its group, and the sample's number within that source."""
    for index, share in enumerate(shares):
        before = _floor(k, share)
        if _floor(k + 1, share) > before:
            return index, before
        k -= before
    raise AssertionError("the last share is 1")
