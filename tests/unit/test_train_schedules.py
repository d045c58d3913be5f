from __future__ import annotations

import math

import pytest

from moetool.errors import ConfigError
from moetool.train import schedules

COSINE = {"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4}


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, 0.25),  # update 1 of 4 warm-up updates
        (1, 0.5),
        (3, 1.0),  # update 4: the peak
        (6, 0.1 + 0.45 * (1 + math.cos(math.pi * 3 / 8))),
        (7, 0.55),  # update 8: half of the decay
        (11, 0.1),  # the last update
        (20, 0.1),  # beyond the run
    ],
)
def test_cosine(step: int, value: float) -> None:
    assert schedules.cosine(step, 12, lr=1.0, min_lr=0.1, warmup_steps=4) == pytest.approx(value, abs=1e-12)


def test_cosine_without_warmup_and_with_nothing_else() -> None:
    assert schedules.cosine(0, 2, lr=1.0, min_lr=0.0, warmup_steps=0) == pytest.approx(0.5)
    assert schedules.cosine(1, 2, lr=1.0, min_lr=0.0, warmup_steps=0) == pytest.approx(0.0)
    assert schedules.cosine(1, 2, lr=1.0, min_lr=0.0, warmup_steps=2) == 1.0


@pytest.mark.parametrize(("step", "value"), [(0, 0.1), (1, 0.2), (2, 0.2), (999, 0.2)])
def test_constant(step: int, value: float) -> None:
    assert schedules.constant(step, 1000, lr=0.2, warmup_steps=2) == pytest.approx(value)


def test_build_leaves_out_what_a_schedule_does_not_take() -> None:
    assert schedules.parameters("constant") == ["lr", "warmup_steps"]
    assert schedules.build("constant", 10, COSINE)(0) == 0.25
    assert schedules.build("cosine", 12, COSINE)(11) == pytest.approx(0.1)


def test_build_refuses_a_warmup_longer_than_the_run() -> None:
    with pytest.raises(ConfigError, match="4 warm-up steps do not fit into 3 steps"):
        schedules.build("cosine", 3, COSINE)
