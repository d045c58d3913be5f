"""What holds of every mixture and every split, whatever the sizes."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetool.data.mixture import Source, TokenMixture, permute
from moetool.data.tokens import TokenStream, split_validation

SHARES = st.fractions(min_value=0, max_value=1, max_denominator=50)
WEIGHTS = st.lists(st.fractions(min_value=Fraction(1, 9), max_value=9, max_denominator=9), min_size=1, max_size=4)


def stream(lengths: list[int]) -> TokenStream:
    """Documents of these lengths; every token is its own place."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenStream({}, offsets[:-1], offsets, np.arange(offsets[-1], dtype=np.uint32))


@st.composite
def phases(draw: st.DrawFn) -> dict[int, Fraction]:
    """Weights from up to four steps on; the first is above 0."""
    starts = sorted(draw(st.sets(st.integers(1, 30), max_size=3)))
    later = st.fractions(min_value=0, max_value=9, max_denominator=9)
    return {0: draw(st.fractions(min_value=1, max_value=9, max_denominator=9)), **{s: draw(later) for s in starts}}


@st.composite
def phased(draw: st.DrawFn) -> TokenMixture:
    """A mixture whose weights change; one source of each kind never has weight 0."""
    ratio = draw(SHARES)
    sources = [
        Source(f"{kind}{i}", stream([draw(st.integers(4, 60))]), draw(phases()) if i else 1, kind == "replay")
        for kind in ("train", "replay")
        if kind == "train" or ratio > 0
        for i in range(draw(st.integers(1, 3)))
    ]
    return TokenMixture(sources, 3, draw(st.integers(1, 12)), ratio, draw(st.integers(0, 2**63)))


@st.composite
def mixtures(draw: st.DrawFn) -> TokenMixture:
    ratio = draw(SHARES)
    sources = [
        Source(f"{kind}{i}", stream([draw(st.integers(4, 60))]), weight, kind == "replay")
        for kind in ("train", "replay")
        if kind == "train" or ratio > 0
        for i, weight in enumerate(draw(WEIGHTS))
    ]
    return TokenMixture(sources, 3, draw(st.integers(1, 12)), ratio, draw(st.integers(0, 2**63)))


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@given(st.integers(2**20, 2**45), st.integers(0, 2**64 - 1), st.data())
def test_permute_stays_in_range_and_apart_on_large_sizes(size: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, size - 1), unique=True, min_size=2, max_size=20))
    images = {permute(i, size, key) for i in indices}
    assert len(images) == len(indices)
    assert all(0 <= image < size for image in images)


@settings(deadline=None)
@given(mixtures() | phased(), st.integers(1, 30))
def test_replay_is_exact_in_each_batch_and_in_total(mixed: TokenMixture, steps: int) -> None:
    total = 0
    share = mixed.replay_ratio * mixed.global_batch_size
    for step in range(steps):
        count = sum(mixed.sources[mixed.sample(n).source].replay for n in mixed.batch(step))
        assert floor(share) <= count <= ceil(share)
        total += count
        assert abs(total - share * (step + 1)) < 1


@settings(deadline=None)
@given(mixtures() | phased(), st.integers(0, 150))
def test_the_ledger_counts_what_the_samples_are(mixed: TokenMixture, num_samples: int) -> None:
    counts = Counter(mixed.sample(n).source for n in range(num_samples))
    ledger = mixed.ledger(num_samples)
    assert {name: entry["sequences"] for name, entry in ledger.items()} == {n: counts[n] for n in mixed.sources}
    assert sum(entry["tokens"] for entry in ledger.values()) == num_samples * mixed.seq_len
    for name, entry in ledger.items():
        assert entry["epochs"] == counts[name] / mixed.num_windows[name]


@settings(deadline=None)
@given(mixtures())
def test_sources_of_a_kind_share_it_by_weight(mixed: TokenMixture) -> None:
    ledger = mixed.ledger(400 * mixed.global_batch_size)
    for replay in (False, True):
        group = [source for source in mixed.sources.values() if source.replay is replay]
        total = sum(ledger[source.name]["sequences"] for source in group)
        weights = sum(Fraction(str(source.weight)) for source in group)
        for source in group:
            assert abs(ledger[source.name]["sequences"] - total * Fraction(str(source.weight)) / weights) < len(group)


@settings(deadline=None)
@given(phased(), st.data())
def test_sources_share_each_phase_by_its_weights(mixed: TokenMixture, data: st.DataObject) -> None:
    """Between two steps of a phase; what the phases of any split use adds up."""
    weights: dict[str, dict[int, Any]] = {
        name: source.weight if isinstance(source.weight, dict) else {0: source.weight}
        for name, source in mixed.sources.items()
    }
    ends = sorted({0, 40, *(start for one in weights.values() for start in one)})
    batch, used = mixed.global_batch_size, dict.fromkeys(mixed.sources, 0.0)
    for start, end in pairwise(ends):
        step = data.draw(st.integers(start, end))
        before, then, after = (mixed.ledger(n * batch) for n in (start, step, end))
        now = {name: Fraction(one[max(s for s in one if s <= start)]) for name, one in weights.items()}
        for replay in (False, True):
            group = [name for name, source in mixed.sources.items() if source.replay is replay]
            counts = {name: then[name]["sequences"] - before[name]["sequences"] for name in group}
            for name in group:
                share = sum(counts.values()) * now[name] / sum(now[other] for other in group)
                # A kind goes on from where it stood if its own weights stay, and is split anew if they change.
                assert abs(counts[name] - share) < 2 * len(group)
                assert now[name] or not counts[name]
                used[name] += counts[name] + after[name]["sequences"] - then[name]["sequences"]
    assert used == {name: entry["sequences"] for name, entry in mixed.ledger(40 * batch).items()}


@settings(deadline=None, max_examples=50)
@given(phased(), st.integers(0, 30))
def test_later_phases_change_nothing_before_them(mixed: TokenMixture, step: int) -> None:
    def until(weight: Any) -> Any:
        return {s: w for s, w in weight.items() if s < max(step, 1)} if isinstance(weight, dict) else weight

    sources = [replace(source, weight=until(source.weight)) for source in mixed.sources.values()]
    other = TokenMixture(sources, mixed.seq_len, mixed.global_batch_size, mixed.replay_ratio, mixed.seed)
    samples = range(step * mixed.global_batch_size)
    assert [mixed.sample(n) for n in samples] == [other.sample(n) for n in samples]


@settings(deadline=None, max_examples=50)
@given(mixtures() | phased())
def test_every_window_comes_once_an_epoch_before_any_comes_again(mixed: TokenMixture) -> None:
    seen: dict[str, list[tuple[int, int]]] = {name: [] for name in mixed.sources}
    for n in range(50 * mixed.global_batch_size):
        sample = mixed.sample(n)
        seen[sample.source].append((sample.epoch, sample.window))
    for name, samples in seen.items():
        windows = mixed.num_windows[name]
        assert len(set(samples)) == len(samples)
        per_epoch = Counter(epoch for epoch, _ in samples)
        assert all(0 <= window < windows for _, window in samples)
        # Only the last epochs can be incomplete: those that the last batch has begun or not ended.
        whole = len(samples) // windows - ceil(mixed.global_batch_size / windows)
        assert all(per_epoch[epoch] == windows for epoch in range(whole))


@settings(deadline=None)
@given(
    mixtures() | phased(), st.lists(st.integers(0, 10**9), min_size=1, max_size=20), st.randoms(use_true_random=False)
)
def test_a_sample_depends_on_its_number_alone(mixed: TokenMixture, numbers: list[int], rng: random.Random) -> None:
    once = {n: (mixed.sample(n), mixed.tokens(n).tolist()) for n in numbers}
    again = TokenMixture(
        list(mixed.sources.values()), mixed.seq_len, mixed.global_batch_size, mixed.replay_ratio, mixed.seed
    )
    rng.shuffle(numbers)
    for n in numbers:
        random.seed(n)
        torch.manual_seed(n)
        np.random.seed(n % 2**32)
        assert (again.sample(n), again.tokens(n).tolist()) == once[n]


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.data())
def test_a_view_reads_as_the_documents_put_together(lengths: list[int], data: st.DataObject) -> None:
    whole = stream(lengths)
    chosen = data.draw(st.permutations(range(len(lengths))))[: data.draw(st.integers(1, len(lengths)))]
    view = whole.documents(np.array(chosen))
    flat = [t for d in chosen for t in range(int(whole.offsets[d]), int(whole.offsets[d + 1]))]
    start = data.draw(st.integers(0, len(flat)))
    length = data.draw(st.integers(0, len(flat) - start))
    assert view.read(start, length).tolist() == flat[start : start + length]


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=200),
    st.fractions(min_value=Fraction(1, 1000), max_value=Fraction(999, 1000), max_denominator=1000),
    st.integers(0, 2**40),
)
def test_a_split_parts_the_documents(lengths: list[int], fraction: Fraction, seed: int) -> None:
    whole = stream(lengths)
    train, val = split_validation(whole, fraction, seed)
    places = train.starts.tolist() + val.starts.tolist()
    assert sorted(places) == whole.starts.tolist()
    assert train.starts.tolist() == sorted(train.starts.tolist())
    assert val.num_documents == min(max(round(fraction * len(lengths)), 1), len(lengths) - 1)
