"""Standard errors and paired differences, against hand-computed numbers."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from lm_eval.api import metrics as lm

from moetool.evaluate.paired_scores import combine, influences, outside_noise, paired_difference, standard_error


def test_mean_has_lm_evals_own_standard_error() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0]
    influence = influences(lm.mean, values)
    assert influence is not None
    assert standard_error(influence) == pytest.approx(lm.mean_stderr(values), rel=1e-12)


def test_paired_difference_of_means_by_hand() -> None:
    # Differences 1, 0, 1, 0: mean 0.5, sample variance 1/3, standard error sqrt(1/3 / 4).
    difference, error = paired_difference(lm.mean, {0: 1, 1: 1, 2: 1, 3: 0}, {0: 0, 1: 1, 2: 0, 3: 0})
    assert difference == 0.5
    assert error == pytest.approx(math.sqrt(1 / 12))


def test_paired_difference_uses_only_documents_that_both_answered() -> None:
    assert paired_difference(lm.mean, {0: 1, 1: 1, 7: 0}, {0: 0, 1: 1})[0] == 0.5


def test_bits_per_byte_by_hand() -> None:
    # Two documents of 10 and 30 bytes. Model: 20 and 30 nats lost, baseline: 10 and 30.
    # R = 50/40, R0 = 40/40. u = (20 - 12.5, 30 - 37.5) / 40, v = (10 - 10, 30 - 30) / 40 = 0.
    # Standard error = sqrt(2/1 * 2 * (7.5/40)^2) / ln 2 = 2 * 0.1875 / ln 2.
    items, baseline = {0: (-20, 10), 1: (-30, 30)}, {0: (-10, 10), 1: (-30, 30)}
    difference, error = paired_difference(lm.bits_per_byte, items, baseline)
    assert difference == pytest.approx(0.25 / math.log(2))
    assert error == pytest.approx(0.375 / math.log(2))


def test_perplexities_scale_the_error_by_themselves() -> None:
    # d exp(R) = exp(R) dR.
    items = [(-20.0, 10), (-30.0, 30), (-8.0, 12)]
    bits, perplexity = influences(lm.bits_per_byte, items), influences(lm.weighted_perplexity, items)
    assert bits is not None
    assert perplexity is not None
    assert perplexity == pytest.approx(bits * math.log(2) * math.exp(58 / 52))


@pytest.mark.parametrize("aggregation", [lm.mean, lm.perplexity, lm.bits_per_byte, lm.weighted_perplexity])
def test_formula_agrees_with_a_paired_bootstrap(aggregation) -> None:  # type: ignore[no-untyped-def]
    draw = random.Random(0)
    hard = [draw.gauss(-3, 0.5) for _ in range(400)]
    ours = {i: h + draw.gauss(0.1, 0.1) for i, h in enumerate(hard)}
    theirs = {i: h + draw.gauss(0, 0.1) for i, h in enumerate(hard)}
    if aggregation in (lm.bits_per_byte, lm.weighted_perplexity):
        size = {i: draw.randrange(5, 50) for i in ours}
        ours, theirs = ({i: (v * size[i] / 3, size[i]) for i, v in m.items()} for m in (ours, theirs))  # type: ignore[assignment]
    difference, error = paired_difference(aggregation, ours, theirs)
    bootstrapped = paired_difference(lambda items: aggregation(items), ours, theirs)
    assert bootstrapped[0] == pytest.approx(difference)
    assert error == pytest.approx(bootstrapped[1], rel=0.2)
    # Pairing is the point: unpaired errors are larger.
    u, v = influences(aggregation, list(ours.values())), influences(aggregation, list(theirs.values()))
    assert u is not None
    assert v is not None
    assert error is not None
    assert error < 0.7 * math.hypot(standard_error(u) or 0, standard_error(v) or 0)


def test_one_document_has_no_standard_error() -> None:
    assert paired_difference(lm.mean, {0: 1}, {0: 0}) == (1.0, None)
    assert standard_error(np.zeros(1)) is None


def test_combining_independent_tasks() -> None:
    assert combine([(1.0, 0.3), (0.0, 0.4)]) == pytest.approx((0.5, 0.25))
    assert combine([(1.0, 0.3), (0.0, 0.4)], [3, 1]) == pytest.approx((0.75, math.hypot(0.9, 0.4) / 4))
    assert combine([(1.0, 0.3), (0.0, None)]) == (0.5, None)


def test_noise() -> None:
    assert outside_noise(-0.21, 0.1)
    assert not outside_noise(0.2, 0.1)
    assert not outside_noise(0.5, None)
    assert not outside_noise(0.0, 0.0)


def test_many_documents_of_a_metric_without_a_formula_take_one_pass() -> None:
    draw = random.Random(1)
    hard = [draw.gauss(0, 1) for _ in range(6000)]
    ours, theirs = ({i: h + draw.gauss(0.05, 0.5) for i, h in enumerate(hard)} for _ in range(2))
    seen = []

    def aggregation(items: Sequence[float]) -> float:
        seen.append(len(items))
        return sum(items) / len(items)

    difference, error = paired_difference(aggregation, ours, theirs)
    exact = paired_difference(lm.mean, ours, theirs)
    assert sum(seen) == 4 * 6000  # the scores themselves, and the groups
    assert difference == pytest.approx(exact[0])
    assert error == pytest.approx(exact[1], rel=0.25)
