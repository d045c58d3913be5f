"""The source and window of sample n, as a pure function of (seed, n).

There is no generator with a state. Orders are keyed permutations, and shares are exact fractions split by floors. Any
sample, and the use of every source before it, is computed directly. The sample number alone therefore suffices to
resume a run and to spread it over processes.
"""

from __future__ import annotations

import hashlib
import operator
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache, partial

import numpy as np

from moetool.data.tokens import TokenStream
from moetool.errors import ConfigError, DataError
from moetool.values import exact_fraction

Number = Fraction | Decimal | float | str  # read as the exact decimal typed


@dataclass(frozen=True)
class Source:
    """A named token stream of a mixture.

    Attributes:
        name: unique in the mixture.
        stream: its tokens.
        weight: share relative to the other sources of its kind (training, replay): a number, or the number from each
            optimizer step on, from step 0.
        replay: whether it is earlier data, repeated to limit forgetting.
    """

    name: str
    stream: TokenStream
    weight: Number | Mapping[int, Number] = 1
    replay: bool = False


@dataclass(frozen=True)
class Sample:
    """Sample n: window `window` of source `source`, in the source's pass number `epoch` (from 0)."""

    source: str
    epoch: int
    window: int


@dataclass(frozen=True)
class _Phase:
    """Steps in which the weights of a kind of sources are the same.

    Attributes:
        step: the first of them.
        before: samples of the kind before it.
        used: of these, how many of each source: what each goes on from.
        shares: see `_shares`.
    """

    step: int
    before: int
    used: Sequence[int]
    shares: Sequence[Fraction]

    def split(self, count: int) -> list[int]:
        """How many of the first `count` samples of the kind are of each source; they end in this phase."""
        left, counts = count - self.before, []
        for used, share in zip(self.used, self.shares, strict=True):
            here = _floor(left, share)
            counts.append(used + here)
            left -= here
        return counts


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
        replay_ratio: Number = 0,
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
        self._phases = [_phases(group, partial(self._before, replay)) for replay, group in enumerate(self._groups)]

    def _before(self, replay: int, step: int) -> int:
        """How many samples of a kind come before a step."""
        slots = step * self.global_batch_size
        replayed = _floor(slots, self.replay_ratio)
        return replayed if replay else slots - replayed

    def sample(self, n: int) -> Sample:
        """Sample `n` (from 0)."""
        # operator.index: keys need plain integers, and callers may pass numpy or torch integers.
        step, place = divmod(operator.index(n), self.global_batch_size)
        slot = step * self.global_batch_size + permute(place, self.global_batch_size, key(self.seed, "batch", step))
        before = _floor(slot, self.replay_ratio)
        replay = _floor(slot + 1, self.replay_ratio) > before
        phase = _phase(self._phases[replay], step)
        index, k = _choose(phase.shares, (before if replay else slot - before) - phase.before)
        name, k = self._groups[replay][index].name, phase.used[index] + k
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
        steps = num_samples // self.global_batch_size
        counts: dict[str, int] = {}
        for replay, (group, phases) in enumerate(zip(self._groups, self._phases, strict=True)):
            split = _phase(phases, steps).split(self._before(replay, steps))
            counts |= {source.name: count for source, count in zip(group, split, strict=True)}
        for n in range(
            steps * self.global_batch_size, num_samples
        ):  # positions are permuted, so a partial batch is counted one by one
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


def _phases(group: Sequence[Source], before: Callable[[int], int]) -> list[_Phase]:
    """The phases of a kind of sources, ascending; `before` counts its samples before a step.

    Raises:
        ConfigError: a weight is not a positive number, or all weights of a phase are 0.
    """
    by_name = {source.name: _weights(source) for source in group}
    phases: list[_Phase] = []
    for step in sorted({0, *(step for weights in by_name.values() for step in weights)}):
        weights = [found[max(start for start in found if start <= step)] for found in by_name.values()]
        if group and not any(weights):
            names = " and ".join(by_name)
            raise ConfigError(f"--weight: all weights of {names} are 0 from step {step} on; give one of them a weight")
        shares = _shares(weights)
        if not phases:
            phases.append(_Phase(0, 0, [0] * len(group), shares))
        elif shares != phases[-1].shares:
            count = before(step)
            phases.append(_Phase(step, count, phases[-1].split(count), shares))
    return phases


def _phase(phases: Sequence[_Phase], step: int) -> _Phase:
    """The phase that a step is in."""
    return phases[bisect_right(phases, step, key=lambda phase: phase.step) - 1]


def _weights(source: Source) -> dict[int, Fraction]:
    """The weight of a source from each step on.

    Raises:
        ConfigError: one is not a number above 0; of several, some may be 0.
    """
    several = source.weight if isinstance(source.weight, Mapping) else {0: source.weight}
    weights = {step: exact_fraction(f"--weight {source.name}", weight) for step, weight in several.items()}
    if min(weights.values()) < 0 or not any(weights.values()):
        raise ConfigError(f"--weight {source.name}={source.weight}: give a weight above 0")
    return weights


def _shares(weights: Sequence[Fraction]) -> list[Fraction]:
    """Each source's share of the remainder left by the sources before it (so the last one above 0 is 1)."""
    rests = [sum(weights[i:], Fraction(0)) for i in range(len(weights))]
    return [weight / rest if rest else rest for weight, rest in zip(weights, rests, strict=True)]


def _choose(shares: Sequence[Fraction], k: int) -> tuple[int, int]:
    """The source of sample k of its group, and the sample's number within that source."""
    for index, share in enumerate(shares):
        before = _floor(k, share)
        if _floor(k + 1, share) > before:
            return index, before
        k -= before
    raise AssertionError("a share is 1")
