"""The law of upcycling against reference values, its range, and the rules of thumb."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetool.budget import law
from moetool.budget.rules import learning_rate, skywork

# Billions of training tokens, by dense parameters and dense tokens in billions: worked out apart from this code, to two
# digits. None: never.
SCRATCH_WINS: dict[tuple[float, float], float | None] = {
    (0.1, 10): 14, (0.1, 30): 40, (0.1, 100): 200, (0.1, 300): None, (0.1, 1000): None,
    (0.5, 10): 8.8, (0.5, 30): 22, (0.5, 100): 75, (0.5, 300): 400, (0.5, 1000): None,
    (1, 10): 7.2, (1, 30): 17, (1, 100): 51, (1, 300): 190, (1, 1000): None,
    (2, 10): 5.8, (2, 30): 13, (2, 100): 36, (2, 300): 110, (2, 1000): 710,
    (7, 10): 3.9, (7, 30): 8.1, (7, 100): 20, (7, 300): 48, (7, 1000): 160,
}  # fmt: skip
BREAK_EVEN = {10: 2.4, 30: 5, 100: 11, 300: 24, 1000: 53}  # of a model of 1 B


def test_the_papers_own_case() -> None:
    found = law.verdict(1e9, 74e9, 37e9)
    assert found.start == pytest.approx(2.253, abs=5e-4)
    assert found.upcycled == pytest.approx(2.144, abs=5e-4)
    # 32 x 37e9^-0.161 + 7.05 x 1e9^-0.08 + 0.165, by logarithms.
    by_hand = 32 * math.exp(-0.161 * math.log(37e9)) + 7.05 * math.exp(-0.08 * math.log(1e9)) + 0.165
    assert found.scratch == pytest.approx(by_hand, abs=1e-12)
    assert found.dense < found.start
    assert law.outside(1e9, 74e9, 37e9, 8, 2, 1, 0) == []


@pytest.mark.parametrize(("case", "expected"), SCRATCH_WINS.items())
def test_where_from_scratch_overtakes(case: tuple[float, float], expected: float | None) -> None:
    found = law.verdict(case[0] * 1e9, case[1] * 1e9, 1e10).scratch_wins
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert found / 1e9 == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("dense", "expected"), BREAK_EVEN.items())
def test_where_copies_are_below_where_they_began(dense: float, expected: float) -> None:
    found = law.verdict(1e9, dense * 1e9, 1e10).break_even
    assert found is not None
    assert found / 1e9 == pytest.approx(expected, rel=0.05)


def test_at_15_trillion_tokens_the_law_would_say_worse_than_the_start_so_it_says_nothing() -> None:
    found = law.verdict(1e9, 15e12, 37e9)
    assert found.upcycled == pytest.approx(2.010, abs=1e-3)
    assert found.start == pytest.approx(1.888, abs=1e-3)
    (reason,) = law.outside(1e9, 15e12, 37e9, 8, 2, 1, 0)
    assert reason == "15 T dense tokens, and the law holds for 1 B to 1 T"


def test_what_is_outside_is_said_in_full() -> None:
    found = law.outside(8e9, 2e12, 5e8, 64, 8, 4, 1)
    assert [text.split(",")[0] for text in found] == [
        "8 B parameters", "2 T dense tokens", "500 M training tokens", "64 experts of 1/4 FFN",
    ]  # fmt: skip
    assert "top-8 and 1 shared" in found[3]
    for parameters, dense, tokens in ((1e8, 1e9, 1e9), (2e9, 1e12, 368e9)):
        assert law.outside(parameters, dense, tokens, 8, 2, 1, 0) == []
        assert len(law.outside(parameters * 30, dense * 2000, tokens * 400, 8, 2, 1, 0)) == 3


@given(st.floats(1e8, 2e9), st.floats(1e9, 1e12), st.floats(1e9, 3e11))
def test_a_crossing_is_where_two_losses_are_the_same(parameters: float, dense: float, tokens: float) -> None:
    found = law.verdict(parameters, dense, tokens)
    if found.break_even:
        assert law.upcycled_loss(dense, found.break_even, parameters) == pytest.approx(found.start, abs=1e-6)
    if found.beats_dense:
        trained = law.dense_loss(dense + found.beats_dense, parameters)
        assert law.upcycled_loss(dense, found.beats_dense, parameters) == pytest.approx(trained, abs=1e-6)
    if found.scratch_wins:
        other = law.upcycled_loss(dense, found.scratch_wins, parameters)
        assert law.scratch_loss(found.scratch_wins, parameters) == pytest.approx(other, abs=1e-6)
    assert law.upcycled_loss(dense, 2 * tokens, parameters) < found.upcycled


@pytest.mark.parametrize(
    ("moe", "expected"), [(1, "upcycle"), (10, "upcycle"), (11, "open"), (199, "open"), (200, "from scratch")]
)
def test_skyworks_rule(moe: float, expected: str) -> None:
    assert skywork(moe, 100) == expected


def test_the_rate_depends_on_the_tokens() -> None:
    said = [learning_rate(tokens).between for tokens in (5e9, 50e9, 500e9)]
    assert len(set(said)) == 3
    assert "half the peak" in said[0]
