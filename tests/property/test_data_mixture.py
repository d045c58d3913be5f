"""What holds of every mixture and every split, whatever the sizes."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from math import ceil, floor

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
@given(mixtures(), st.integers(1, 30))
def test_replay_is_exact_in_each_batch_and_in_total(mixed: TokenMixture, steps: int) -> None:
    total = 0
    share = mixed.replay_ratio * mixed.global_batch_size
    for step in range(steps):
        count = sum(mixed.sources[mixed.sample(n).source].replay for n in mixed.batch(step))
        assert floor(share) <= count <= ceil(share)
        total += count
        assert abs(total - share * (step + 1)) < 1


@settings(deadline=None)
@given(mixtures(), st.integers(0, 150))
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


@settings(deadline=None, max_examples=50)
@given(mixtures())
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
@given(mixtures(), st.lists(st.integers(0, 10**9), min_size=1, max_size=20), st.randoms(use_true_random=False))
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
