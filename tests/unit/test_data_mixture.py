"""The mixture by hand: shares, windows, errors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from moetool.data.mixture import Sample, Source, TokenMixture, key, permute
from moetool.data.tokens import TokenStream
from moetool.errors import ConfigError, DataError


def stream(num_tokens: int, first: int = 0) -> TokenStream:
    """One document whose tokens count up from `first`."""
    offsets = np.array([0, num_tokens], np.int64)
    return TokenStream({}, offsets[:-1], offsets, np.arange(first, first + num_tokens, dtype=np.uint32))


def mixture(ratio: object = "0.3", batch: int = 10, seed: int = 0, seq_len: int = 4) -> TokenMixture:
    sources = [Source("code", stream(41)), Source("prose", stream(22, first=1000), replay=True)]
    return TokenMixture(sources, seq_len, batch, ratio, seed)  # type: ignore[arg-type]


def test_three_of_ten_are_replay_in_every_batch() -> None:
    mixed = mixture()
    for step in range(50):
        counts = Counter(mixed.sample(n).source for n in mixed.batch(step))
        assert counts == {"code": 7, "prose": 3}


def test_the_place_of_replay_in_a_batch_changes_from_batch_to_batch() -> None:
    mixed = mixture()
    places = {tuple(n % 10 for n in mixed.batch(step) if mixed.sample(n).source == "prose") for step in range(20)}
    assert len(places) > 10
    assert set().union(*places) == set(range(10))


def test_a_window_is_the_text_as_it_stands_and_the_rest_is_left() -> None:
    mixed = mixture()
    assert mixed.num_windows == {"code": 10, "prose": 5}
    for n in range(100):
        sample, tokens = mixed.sample(n), mixed.tokens(n)
        first = sample.window * 4 + (1000 if sample.source == "prose" else 0)
        assert tokens.tolist() == list(range(first, first + 5))
        assert tokens.dtype == np.int64


def test_the_ledger_by_hand() -> None:
    assert mixture().ledger(20) == {
        "code": {"sequences": 14, "tokens": 56, "epochs": 1.4},
        "prose": {"sequences": 6, "tokens": 24, "epochs": 1.2},
    }


def test_total_tokens_do_not_depend_on_the_ratio() -> None:
    for ratio in ("0.1", "1/3", 0.999, Fraction(2, 7), Decimal("0.25")):
        assert sum(entry["tokens"] for entry in mixture(ratio).ledger(1000).values()) == 4000


def test_ten_percent_is_a_tenth_and_not_the_nearest_binary_fraction() -> None:
    mixed = mixture(0.1, batch=10)
    assert mixed.ledger(10**18)["prose"]["sequences"] == 10**17


def test_weights_are_relative_within_their_kind() -> None:
    sources = [
        Source("a", stream(50), weight=3),
        Source("b", stream(50), weight="1"),
        Source("c", stream(50), weight=Decimal("0.5"), replay=True),
        Source("d", stream(50), weight=0.5, replay=True),
    ]
    counts = TokenMixture(sources, 4, 16, "0.5", 0).ledger(160)
    assert {name: entry["sequences"] for name, entry in counts.items()} == {"a": 60, "b": 20, "c": 40, "d": 40}


def test_the_ledger_over_phases_by_hand() -> None:
    """Batches of 8, a quarter replay: 6 and 2 sequences a step."""
    sources = [
        Source("a", stream(41), weight={0: 1, 2: 2, 4: "0"}),  # of 6: 3, from step 2 on 4, from step 4 on none
        Source("b", stream(41)),
        Source("c", stream(41), weight={0: 0, 3: 3}, replay=True),  # of 2: none; from step 3 on 3 of 4
        Source("d", stream(41), replay=True),
    ]
    mixed = TokenMixture(sources, 4, 8, "0.25", 0)
    by_step = [[0, 0, 0, 0], [3, 3, 0, 2], [6, 6, 0, 4], [10, 8, 0, 6], [14, 10, 1, 7], [14, 16, 3, 7], [14, 22, 4, 8]]
    for step, counts in enumerate(by_step):
        assert [entry["sequences"] for entry in mixed.ledger(8 * step).values()] == counts
    assert mixed.ledger(48)["b"] == {"sequences": 22, "tokens": 88, "epochs": 2.2}
    # Each source goes on where it stood: its windows in the order that it has alone.
    for source in sources:
        alone = TokenMixture([replace(source, weight=1, replay=False)], 4, 8, 0, 0)
        windows = [(s.epoch, s.window) for s in in_turn(mixed, 48) if s.source == source.name]
        assert windows == [(s.epoch, s.window) for s in in_turn(alone, len(windows))]


def in_turn(mixed: TokenMixture, count: int) -> list[Sample]:
    """The first samples in the order of their slots: each batch is shuffled."""
    size, samples = mixed.global_batch_size, []
    for step in range(-(-count // size)):
        places = [permute(place, size, key(mixed.seed, "batch", step)) for place in range(size)]
        samples += [mixed.sample(step * size + places.index(slot)) for slot in range(size)]
    return samples[:count]


def test_equal_weights_in_other_words_are_no_phase() -> None:
    plain = [Source("a", stream(50), weight="0.2"), Source("b", stream(50))]
    twice = [Source("a", stream(50), weight={0: 0.2, 5: "0.2"}), Source("b", stream(50), weight={0: 1, 9: 1})]
    one, other = (TokenMixture(sources, 4, 7, 0, 3) for sources in (plain, twice))
    assert [one.sample(n) for n in range(200)] == [other.sample(n) for n in range(200)]


def test_a_kind_needs_a_weight_in_every_phase() -> None:
    sources = [Source("a", stream(50), weight={0: 1, 5: 0}), Source("b", stream(50), weight={0: 0, 6: 1})]
    with pytest.raises(ConfigError, match="all weights of a and b are 0 from step 5 on"):
        TokenMixture(sources, 4, 8, 0, 0)
    with pytest.raises(ConfigError, match=r"--weight a=.*give a weight above 0"):
        TokenMixture([Source("a", stream(50), weight={0: 1, 5: -1}), sources[1]], 4, 8, 0, 0)


def test_an_epoch_has_an_order_of_its_own_by_seed_source_and_number() -> None:
    def order(seed: int, name: str, epoch: int) -> list[int]:
        mixed = TokenMixture([Source(name, stream(101))], 1, 1, 0, seed)
        return [mixed.sample(n).window for n in range(epoch * 100, epoch * 100 + 100)]

    orders = [order(0, "a", 0), order(0, "a", 1), order(0, "b", 0), order(1, "a", 0)]
    assert all(sorted(windows) == list(range(100)) for windows in orders)
    assert len({tuple(windows) for windows in orders}) == 4


def test_numbers_of_numpy_are_numbers() -> None:
    mixed = mixture(seed=np.int64(7))  # type: ignore[arg-type]
    first = [mixed.sample(n) for n in np.arange(5000, 5040)]  # type: ignore[arg-type]
    key.cache_clear()
    assert first == [mixture(seed=7).sample(n) for n in range(5000, 5040)]


# These samples belong to the format: if they change, runs of an earlier version cannot be resumed.
def test_the_order_is_the_one_of_every_version() -> None:
    assert key("batch", 1) == 8_015_562_455_668_888_450
    assert [permute(i, 10, 42) for i in range(10)] == [8, 2, 6, 4, 9, 1, 0, 7, 3, 5]
    assert [mixture().sample(n) for n in (0, 1, 7, 123_456_789)] == [
        Sample("code", 0, 2),
        Sample("code", 0, 9),
        Sample("code", 0, 6),
        Sample("code", 8641975, 7),
    ]


def test_every_small_permutation_comes_up_about_equally_often() -> None:
    for size in (3, 4):
        counts = Counter(tuple(permute(i, size, key("uniform", trial)) for i in range(size)) for trial in range(2400))
        expected = 2400 / len(counts)
        assert len(counts) == (6 if size == 3 else 24)
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


@pytest.mark.parametrize(
    ("sources", "ratio", "message"),
    [
        ([("a", 50, 1, False)], "0.3", "--replay-ratio 0.3 needs text to replay"),
        ([("a", 50, 1, False), ("b", 50, 1, True)], "0", "--replay b is never used"),
        ([("a", 50, 1, False), ("b", 50, 1, True)], "1.5", "share between 0 and 1"),
        ([("a", 50, 1, False), ("b", 50, 1, True)], "-0.1", "share between 0 and 1"),
        ([("a", 50, 1, False), ("b", 50, 1, True)], "much", "'much': not a number"),
        ([("a", 50, 1, False), ("b", 50, 1, True)], "nan", "'nan': not a number"),
        ([("b", 50, 1, True)], "0.5", "no training source"),
        ([("a", 50, 1, False), ("a", 50, 1, True)], "0.5", "two sources are named 'a'"),
        ([("a", 50, 0, False)], "0", "--weight a=0: give a weight above 0"),
        ([("a", 50, "x", False)], "0", "--weight a 'x': not a number"),
    ],
)
def test_contradictions_are_refused(sources: list[tuple], ratio: str, message: str) -> None:
    built = [Source(name, stream(size), weight, replay) for name, size, weight, replay in sources]
    with pytest.raises(ConfigError, match=message):
        TokenMixture(built, 4, 8, ratio, 0)


def test_a_source_shorter_than_a_window_is_named() -> None:
    TokenMixture([Source("short", stream(5))], 4, 8, 0, 0)
    with pytest.raises(DataError, match=r"'short' holds 4 tokens, fewer than one window of 5; .*--seq-len"):
        TokenMixture([Source("short", stream(4))], 4, 8, 0, 0)
