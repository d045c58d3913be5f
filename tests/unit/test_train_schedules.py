from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from moetool import registry
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


INFINITE: dict[str, Any] = {
    "lr": 1.0, "min_lr": 0.1, "constant_lr": 0.4, "warmup_steps": 2, "cooldown_end": 0.5, "constant_end": 0.8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, 0.5),  # update 1 of 2 warm-up updates
        (1, 1.0),  # update 2: the peak
        (5, 0.7),  # update 6: half of the cooldown from 1 to 0.4, updates 3 to 10
        (9, 0.4),  # update 10 = 0.5 * 20: the cooldown has ended
        (12, 0.4),
        (15, 0.4),  # update 16 = 0.8 * 20: the last constant one
        (17, 0.2),  # update 18: half of the annealing, 0.4 * (0.1 / 0.4) ** 0.5
        (19, 0.1),  # the last update
        (30, 0.1),  # beyond the run
    ],
)
def test_infinite(step: int, value: float) -> None:
    assert schedules.infinite(step, 20, **INFINITE) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(("step", "value"), [(0, 0.2), (1, 0.4), (2, 0.4), (15, 0.4), (17, 0.2), (19, 0.1)])
def test_infinite_without_cooldown_warms_up_to_the_constant_rate(step: int, value: float) -> None:
    assert schedules.infinite(step, 20, **(INFINITE | {"cooldown_end": 0.0})) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "value"),
    [(0, 0.5), (1, 1.0), (15, 1.0), (16, 0.775), (17, 0.55), (19, 0.1), (30, 0.1)],
)
def test_wsd(step: int, value: float) -> None:
    rate = schedules.wsd(step, 20, lr=1.0, min_lr=0.1, warmup_steps=2, constant_end=0.8)
    assert rate == pytest.approx(value, abs=1e-12)


# Of 20 updates, 17 to 20 decay, from `above` to 0.1: a share of 1/4, 1/2, 3/4 and 1.
@pytest.mark.parametrize(
    ("shape", "above", "values"),
    [
        ("linear", 1.0, [0.775, 0.55, 0.325, 0.1]),
        ("minus-sqrt", 1.0, [0.55, 0.36360389693210725, 0.22057713659400518, 0.1]),  # 1 - 0.9 * sqrt(share)
        ("exponential", 1.0, [0.5623413251903491, 0.31622776601683794, 0.1778279410038923, 0.1]),  # 10 ** -share
        ("linear", 0.4, [0.325, 0.25, 0.175, 0.1]),
        ("minus-sqrt", 0.4, [0.25, 0.18786796564403572, 0.14019237886466842, 0.1]),  # 0.4 - 0.3 * sqrt(share)
        ("exponential", 0.4, [0.282842712474619, 0.2, 0.1414213562373095, 0.1]),  # 0.4 * 2 ** (-2 * share)
    ],
)
def test_decay_shapes(shape: str, above: float, values: list[float]) -> None:
    name, options = ("wsd", INFINITE) if above == 1.0 else ("infinite", INFINITE)
    rate = schedules.build(name, 20, options | {"decay_shape": shape})
    assert [rate(step) for step in range(15, 20)] == pytest.approx([above, *values], abs=1e-12)
    own = schedules.build(name, 20, options)
    assert all(own(step) == rate(step) for step in range(16))
    assert schedules.default_shape(name) == ("linear" if name == "wsd" else "exponential")
    same = [own(step) == rate(step) for step in range(16, 19)]
    assert same == [shape == schedules.default_shape(name)] * 3


def test_a_decay_that_is_no_power_reaches_zero() -> None:
    for shape in ("linear", "minus-sqrt"):
        rate = schedules.build("infinite", 20, INFINITE | {"min_lr": 0.0, "decay_shape": shape})
        assert rate(19) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ConfigError, match=r"the decay of --schedule wsd is exponential .* --decay-shape linear"):
        schedules.build("wsd", 20, INFINITE | {"min_lr": 0.0, "decay_shape": "exponential"})


@pytest.mark.parametrize("name", registry.names("schedule"))
@pytest.mark.parametrize("cooldown_end", [0.0, 0.7])
def test_no_schedule_jumps(name: str, cooldown_end: float) -> None:
    options = {"lr": 3e-4, "min_lr": 3e-5, "constant_lr": 1.65e-4, "warmup_steps": 100, "constant_end": 0.8}
    rate = schedules.build(name, 10_000, options | {"cooldown_end": cooldown_end})
    rates = [rate(step) for step in range(10_000)]
    # The steepest slope is the warm-up's: 3e-4 in 100 updates.
    assert max(abs(after - before) for before, after in pairwise(rates)) <= 3e-6 + 1e-12
    assert rates[-1] == pytest.approx(3e-4 if name == "constant" else 3e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 10}, r"--cooldown-end 0.5 is update 10 of 20, not after 10 warm-up steps"),
        ({"constant_end": 0.4}, r"--constant-end 0.4 is update 8 of 20, not after --cooldown-end 0.5 \(update 10\)"),
        ({"cooldown_end": 0.0, "warmup_steps": 17}, r"--constant-end 0.8 is update 16 of 20, not after 17 warm-up"),
        ({"constant_lr": 2.0}, r"--constant-lr 2 is above --lr 1"),
        ({"min_lr": 0.5}, r"--min-lr 0.5 is above --constant-lr 0.4"),
        ({"min_lr": 0.0}, r"--min-lr 0: the decay of --schedule infinite is exponential and needs rates above 0"),
        ({"min_lr": 0.0, "constant_lr": 0.0}, r"needs rates above 0"),
        ({"min_lr": 0.0, "constant_lr": 0.0, "decay_shape": "linear"}, r"--constant-lr 0: --schedule infinite needs"),
    ],
)
def test_build_refuses_phases_and_rates_out_of_order(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schedules.build("infinite", 20, INFINITE | changes)


def test_rates_and_phases_that_are_not_reached_need_no_order() -> None:
    schedules.build("infinite", 20, INFINITE | {"cooldown_end": 0.0, "constant_lr": 2.0})
    schedules.build("infinite", 20, INFINITE | {"constant_end": 1.0, "min_lr": 0.0})
    schedules.build("infinite", 20, INFINITE | {"constant_end": 0.5})


def test_build_leaves_out_what_a_schedule_does_not_take() -> None:
    assert schedules.parameters("constant") == ["lr", "warmup_steps"]
    assert schedules.build("constant", 10, COSINE)(0) == 0.25
    assert schedules.build("cosine", 12, COSINE)(11) == pytest.approx(0.1)


def test_build_refuses_a_warmup_longer_than_the_run() -> None:
    with pytest.raises(ConfigError, match="4 warm-up steps do not fit into 3 steps"):
        schedules.build("cosine", 3, COSINE)
