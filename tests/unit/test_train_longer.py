"""Which runs may be longer: of 20 steps that become 40, by the rates worked out from the formulas of docs/cpt.md."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moetool.errors import ConfigError
from moetool.train.config import TrainConfig
from moetool.train.longer import check_going_on, first_length
from moetool.train.weights import parse


def run(
    steps: int, shares_of: int | None = None, out: Path = Path("o"), **options: Any
) -> tuple[TrainConfig, dict[str, Any]]:
    """A resolved run and its identity as state.json holds it."""
    sources = {"a": "a.txt", "b": "b.txt"}
    config = TrainConfig(model=Path("m"), out=out, train=sources, max_steps=steps, **options)
    config = (replace(config, shares_of=shares_of) if shares_of else config).resolve(128, {"aux": 0.01}, gpu=False)
    return config, json.loads(json.dumps(config.identity("m", {"train": sources})))


def going_on(step: int, before: dict[str, Any], now: dict[str, Any] | None = None, out: Path = Path("o")) -> list[str]:
    _, earlier = run(20, **before)
    config, identity = run(40, first_length(earlier), out, **(before if now is None else now))
    return check_going_on(config, earlier, identity, step)


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({"schedule": "constant", "warmup_ratio": 0.5}, 20),  # warm-up 10 in both
        ({"schedule": "cosine", "warmup_steps": 4}, 4),  # the warm-up
        ({"schedule": "cosine", "warmup_ratio": 0.2}, 4),
        ({"schedule": "wsd"}, 16),  # 0.8 * 20; the longer one decays from 32 on
        ({"schedule": "wsd", "decay_shape": "minus-sqrt", "warmup_ratio": 0.1}, 16),
        ({"schedule": "wsd", "constant_end": 1.0}, 20),
        ({"schedule": "infinite", "warmup_ratio": 0.1}, 16),  # cooldown to 14 in both
        ({"schedule": "infinite", "cooldown_end": 0.0, "constant_end": 0.5}, 10),
        ({"schedule": "constant", "weight": {"a": "1@0,3@50%"}}, 20),  # from step 10 on in both
    ],
)
def test_a_run_may_be_longer_until_it_decays(tmp_path: Path, options: dict[str, Any], last: int) -> None:
    for step in range(3, 21):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    for step in {0, 1, last - 1, last}:
        assert going_on(step, options) == []
    for step in range(last + 1, 21):
        with pytest.raises(ConfigError) as error:
            going_on(step, options, out=tmp_path)
        assert f"their learning rate would differ from step {last + 1} on" in str(error.value)
        assert f"step-{last:06d}, the last step folder before that, with --keep-optimizer" in str(error.value)
        assert f"or from {tmp_path}/checkpoints/step-{step:06d} with a new warm-up" in str(error.value)


BIASED: dict[str, Any] = {"schedule": "constant", "balance": {"loss-free": 0.001}}


def test_the_selection_bias_must_not_have_stopped(tmp_path: Path) -> None:
    options = BIASED | {"balance_end": 0.9}  # of 20 updates the first 18 move it, of 40 the first 36
    assert going_on(18, options) == []
    (tmp_path / "checkpoints" / "step-000019").mkdir(parents=True)
    with pytest.raises(ConfigError, match="their selection bias would differ from step 19 on"):
        going_on(19, options, out=tmp_path)


@pytest.mark.parametrize(
    ("before", "now", "last", "told"),
    [
        ({"schedule": "wsd", "constant_end": 1.0}, {"constant_end": 0.5}, 20, "--constant-end (1 before, 0.5 now)"),
        ({"schedule": "wsd", "constant_end": 1.0}, {"constant_end": 0.25}, 10, "--constant-end (1 before, 0.25 now)"),
        ({"schedule": "wsd"}, {"decay_shape": "minus-sqrt"}, 16, "--decay-shape (none before, minus-sqrt now)"),
        ({"schedule": "constant"}, {"schedule": "wsd"}, 20, "--schedule (constant before, wsd now)"),
        ({"schedule": "cosine", "warmup_steps": 4}, {"schedule": "wsd"}, 4, "--schedule (cosine before, wsd now)"),
        ({"schedule": "constant", "lr": 1e-3}, {"lr": 2e-3}, 0, "--lr (0.001 before, 0.002 now)"),
        ({"schedule": "constant"}, {"weight": {"a": "1@0,2@17"}}, 17, "--weight (a=1 b=1 before, a=1@0,2@17 b=1 now)"),
        ({"schedule": "constant"}, {"weight": {"a": "1@0,1@17"}}, 20, "--weight (a=1 b=1 before, a=1@0,1@17 b=1 now)"),
        (BIASED, {"balance_end": 0.4}, 16, "--balance-end (1 before, 0.4 now)"),
        (BIASED | {"balance_end": 0.5}, {"balance_end": 0.25}, 20, "--balance-end (0.5 before, 0.25 now)"),
        ({"schedule": "constant"}, {"warmup_steps": 3}, 0, "--warmup-steps (0 before, 3 now)"),
    ],
)
def test_what_is_to_come_may_change_with_the_length(
    before: dict[str, Any], now: dict[str, Any], last: int, told: str
) -> None:
    for step in {0, last}:
        assert told in going_on(step, before, before | now)
    for step in range(last + 1, 21):
        with pytest.raises(ConfigError) as error:
            going_on(step, before, before | now)
        assert f"o holds a run with other options: {told}" in str(error.value)


def test_nothing_else_may_change() -> None:
    constant: dict[str, Any] = {"schedule": "constant"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, "--seed (0 before, 1 now)"),
        ({"weight_decay": 0.0}, "--weight-decay (0.1 before, 0 now)"),
        ({"beta2": 0.9, "lr": 1e-3}, "--lr (0.0003 before, 0.001 now); --beta2 (0.95 before, 0.9 now)"),
    ]
    for changes, told in cases:
        with pytest.raises(ConfigError) as error:
            going_on(0, constant, constant | changes)
        assert told in str(error.value)
    _, earlier = run(20, **constant)
    for steps, told in ((10, "other options: --max-steps (20 before, 10 now)."), (20, "--lr (0.0003 before, 0.1 now)")):
        config, identity = run(steps, **constant, lr=3e-4 if steps == 10 else 0.1)
        with pytest.raises(ConfigError) as error:
            check_going_on(config, earlier, identity, 5)
        assert told in str(error.value)


def test_a_weight_of_one_phase_is_that_number() -> None:
    assert parse(["code=0.2@0", "wiki=2@0%"], "--weight") == parse(["code=0.2", "wiki=2"], "--weight")
