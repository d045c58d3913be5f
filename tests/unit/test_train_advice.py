"""What helps a run must be an option that has an effect beside the options that the run has."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moetool.errors import ConfigError
from moetool.option import options, without_effect
from moetool.train.advice import TABLE, advice
from moetool.train.config import TrainConfig
from moetool.values import named

DEFAULT = {"aux": 0.01, "z-loss": 0.001}
BALANCES: list[dict[str, float] | None] = [
    None, {}, {"aux": 0.05}, {"global-aux": 0.01, "z-loss": 0.001}, {"adaptive-aux": 0.02}, {"pooled-aux": 0.04},
    {"z-loss": 0.001}, {"erc": 1.0}, {"seq-aux": 1e-4}, {"sinkhorn": 0.0}, {"sinkhorn": 0.0, "aux": 0.01},
    {"loss-free": 0.001}, {"loss-free": 0.001, "seq-aux": 1e-4},
]  # fmt: skip
CHOICES: dict[str, list[Any]] = {
    "balance": BALANCES,
    "balance_end": [1.0, 0.9],
    "freeze_router": [False, True],
    "train_only": ["everything", "experts", "routers"],
    "router_lr": [1.0, 0.1],
    "replay": [{}, {"old": "old.txt"}],
    "replay_ratio": [None, 0.5, 1.0],
    "val_fraction": [0.01, 0.0],
    "teacher": [None, Path("t")],
    "teacher_on": ["replay", "all"],
    "teacher_weight": [0.5, 1.0],
    "schedule": ["cosine", "infinite", "constant"],
    "cooldown_end": [None, 0.0],
    "grad_clip": [1.0, 0.0],
    "warmup_steps": [None, 0, 7],
}

_GROUPS = [("schedule", "cooldown_end"), ("teacher", "teacher_on", "teacher_weight")]
TOGETHER = [*((name,) for name in CHOICES if not any(name in group for group in _GROUPS)), *_GROUPS]


def resolved(**changes: Any) -> TrainConfig:
    """As `cpt` resolves it, or ConfigError."""
    values: dict[str, Any] = {"model": Path("m"), "out": Path("o"), "train": {"a": "a.txt"}, "max_steps": 100}
    config = TrainConfig(**(values | changes))
    config.check([name for name in changes if name != "balance_end" or changes[name] != 1])
    return config.resolve(2048, DEFAULT, gpu=False)


def say(trouble: str, **changes: Any) -> str:
    return advice(trouble, resolved(**changes).to_json())


def test_what_the_run_has_decides_what_balances_its_routers() -> None:
    assert say("unbalanced") == (
        "in a new run, raise the coefficient of aux in --balance aux=0.01 --balance z-loss=0.001"
    )
    assert say("unbalanced", balance={}) == "in a new run, leave --balance none out; the default balances each layer"
    assert "--balance aux=0.01 in place of --freeze-router" in say("unbalanced", freeze_router=True)
    assert "in place of --train-only experts" in say("unbalanced", train_only="experts")
    assert say("unbalanced", train_only="routers") == say("unbalanced")
    assert "in place of pooled-aux" in say("unbalanced", balance={"pooled-aux": 0.04})
    assert say("unbalanced", balance={"sinkhorn": 0.0}) == (
        "in a new run, give --balance aux=0.01 --balance sinkhorn, because aux balances each layer"
    )
    free = {"loss-free": 0.002}
    assert say("unbalanced", balance=free) == (
        "in a new run, raise the coefficient of loss-free in --balance loss-free=0.002"
    )
    assert say("unbalanced", balance=free, freeze_router=True) == say("unbalanced", balance=free)
    assert say("unbalanced", balance=free, balance_end=0.5).endswith(", and leave --balance-end 0.5 out")
    assert say("unbalanced", router_lr=0.1).endswith(", or --router-lr (0.1)")


def test_forgetting_is_held_by_what_the_run_can_have() -> None:
    old = {"old": "old.txt"}
    assert say("forgotten", replay=old) == "in a new run, raise --replay-ratio (0.3), or lower --lr (0.0003)"
    assert say("forgotten", replay=old, replay_ratio=1.0) == "in a new run, lower --lr (0.0003)"
    assert "--replay-ratio" not in say("forgotten")
    assert "give --replay NAME=PATH with text of the old kind, --teacher MODEL" in say("forgotten")
    taught = say("forgotten", replay=old, teacher=Path("t"))
    assert taught == "in a new run, raise --replay-ratio (0.3), raise --teacher-weight (0.5), or lower --lr (0.0003)"
    assert "or --replay" in say("forgetting not measured")
    assert "or --replay" not in say("forgetting not measured", val_fraction=0.0)


def test_other_troubles() -> None:
    assert say("not learned") == "check the data; in a new run, raise --lr"
    assert "leave --train-only routers out" in say("not learned", train_only="routers")
    assert "lower --teacher-weight (1)" in say("not learned", teacher=Path("t"), teacher_on="all", teacher_weight=1.0)
    assert "give --grad-clip 1, or raise --warmup-steps (9)" in say("spike", grad_clip=0.0, warmup_steps=9)
    constant = {"schedule": "infinite", "cooldown_end": 0.0, "constant_lr": 1e-4}
    assert say("unlearned", **constant) == "in a new run, lower --constant-lr (0.0001) or raise --warmup-steps (1)"


@pytest.mark.parametrize("trouble", TABLE)
def test_options_as_they_were_typed_are_read_too(trouble: str) -> None:
    text = "{balance: [aux=0.05, z-loss=0.001], replay: [old=x], freeze_router: 'false', lr: '0.01', grad_clip: '2'}"
    typed = yaml.load(text, Loader=yaml.BaseLoader) | {"warmup_steps": "4", "replay_ratio": "0.4"}
    more = {"replay": {"old": "x"}, "lr": 0.01, "grad_clip": 2.0, "warmup_steps": 4, "replay_ratio": 0.4}
    assert advice(trouble, typed) == say(trouble, balance={"aux": 0.05, "z-loss": 0.001}, **more)
    assert advice(trouble, {"balance": "none"}) == advice(trouble, {"balance": {}})
    damaged = {name: value for name in CHOICES for value in ([[5]],)} | {"lr": "x", "balance": {"aux": [], "b": "c"}}
    assert advice(trouble, damaged)


@given(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()}))
def test_every_option_of_any_advice_has_an_effect(chosen: dict[str, Any]) -> None:
    changes: dict[str, Any] = {}
    for together in TOGETHER:  # what is refused, or has no effect beside the options before, is left out
        more = changes | {name: chosen[name] for name in together if chosen[name] != CHOICES[name][0]}
        with suppress(ConfigError):
            changes = changes if without_effect_of(resolved(**more), more) else more
    config = resolved(**changes)
    for trouble in TABLE:
        text = advice(trouble, config.to_json())
        for flag, value in re.findall(r"--([a-z-]+) \(([^)]*)\)", text):
            assert value == f"{getattr(config, flag.replace('-', '_')):g}", text
        follow(changes, text)


def without_effect_of(config: TrainConfig, changed: Any) -> list[str]:
    return [name for name, _ in without_effect(config, options(config)) if name in changed]


def follow(changes: dict[str, Any], text: str) -> None:
    """Do what the advice says, each alternative of options with a value alone; none may be refused or be idle."""
    base = {name: value for name, value in changes.items() if name not in left_out(text)}
    if flags := re.findall(r"--balance ([a-z-]+(?:=[\d.e-]+)?)", text):
        if flags == ["none"]:
            base.pop("balance")
        else:
            base["balance"] = {name: float(value or 0) for name, _, value in (one.partition("=") for one in flags)}
    resolved(**base)
    moves: dict[str, Any] = {}
    for flag in re.findall(r"(?:raise|lower|or|give) --([a-z-]+)", text):
        field = flag.replace("-", "_")
        old = getattr(resolved(**base), field)
        if field in ("lr", "constant_lr"):
            moves[field] = old * 0.99
        elif isinstance(old, (int, float)):
            assert not (field in ("replay_ratio", "teacher_weight") and "raise" in text and old >= 1), text
            moves[field] = old / 2 if old and field != "warmup_steps" else old + 1
        elif field in ("replay", "val"):
            moves[field] = named(["x=x.txt"], flag)
    if "--teacher MODEL --teacher-on all" in text:
        resolved(**base, **{"teacher": Path("t"), "teacher_on": "all"})
    for field, value in moves.items():
        config = resolved(**(base | {field: value}))
        assert without_effect_of(config, [field]) == [], text


def left_out(text: str) -> set[str]:
    """The options that the advice says are left out."""
    flags = re.findall(r"(?:in place of|leave) --([a-z-]+)(?! none)", text)
    return {flag.replace("-", "_") for flag in flags if flag != "balance"}
