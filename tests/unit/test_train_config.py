from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moetool.errors import ConfigError
from moetool.train.checks import check_batches, default_micro_batch
from moetool.train.config import TrainConfig
from moetool.train.differences import differences
from moetool.values import parse_count

DEFAULT = {"aux": 0.01, "z-loss": 0.001}


def config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"model": Path("m"), "out": Path("o"), "train": {"a": "a.txt"}, "max_steps": 100}
    return TrainConfig(**(values | changes))


def test_resolve_fills_in_what_was_not_given() -> None:
    done = config(lr=1e-3).resolve(4096, DEFAULT, gpu=False)
    assert (done.seq_len, done.micro_batch_size, done.max_tokens) == (2048, 8, 100 * 32 * 2048)
    assert (done.min_lr, done.warmup_steps, done.precision, done.balance) == (1e-4, 1, "fp32", DEFAULT)
    assert (done.save_every, done.eval_every, done.replay_ratio) == (10, 10, 0.0)
    assert config(replay={"b": "b.txt"}).resolve(128, {}, gpu=True).replay_ratio == 0.3
    done = config(replay={"b": "b.txt"}, replay_ratio=0.1, min_lr=0.0, warmup_steps=0).resolve(128, {}, gpu=True)
    assert (done.replay_ratio, done.min_lr, done.warmup_steps, done.precision) == (0.1, 0.0, 0, "bf16")
    assert (done.seq_len, done.balance) == (128, {})
    assert config(balance={}).resolve(128, DEFAULT, gpu=False).balance == {}


def test_the_rates_and_phases_of_the_study_are_the_defaults() -> None:
    done = config(schedule="infinite").resolve(128, {}, gpu=False)
    assert done.lr == 3e-4
    assert done.min_lr == pytest.approx(3e-5)
    assert done.constant_lr == pytest.approx(1.65e-4)
    assert (done.cooldown_end, done.constant_end) == (0.7, 0.8)
    # What a schedule does not read does not make another run of it.
    assert done.identity("m", {})["constant-lr"] == done.constant_lr
    assert "constant-lr" not in config().resolve(128, {}, gpu=False).identity("m", {})
    assert config(cooldown_end=0.0).resolve(128, {}, gpu=False).cooldown_end == 0.0


def test_tokens_are_rounded_down_to_whole_steps() -> None:
    done = config(max_steps=None, max_tokens=1000, seq_len=10, global_batch_size=32).resolve(128, {}, gpu=False)
    assert (done.max_steps, done.max_tokens) == (3, 960)
    with pytest.raises(ConfigError, match="less than one step"):
        config(max_steps=None, max_tokens=319, seq_len=10).resolve(128, {}, gpu=False)
    with pytest.raises(ConfigError, match="--shares-of 4: the run has only 3 steps; give at most that"):
        config(max_steps=3, shares_of=4, schedule="infinite").resolve(128, {}, gpu=False)


def test_identity_holds_what_defines_the_result_and_no_more() -> None:
    one = config().resolve(128, DEFAULT, gpu=False).identity("m", {"train": {"a": "1"}})
    same = config(
        out=Path("p"), train={"a": "elsewhere.txt"}, save_every=3, eval_every=2, keep_checkpoints=9, resume=False
    )
    assert differences(one, same.resolve(128, DEFAULT, gpu=False).identity("m", {"train": {"a": "1"}})) == []
    other = config(lr=1e-3, balance={"aux": 0.1}, weight={"a": 2.0}).resolve(128, DEFAULT, gpu=False)
    assert differences(one, other.identity("n", {"train": {"a": "2", "b": "3"}})) == [
        "MODEL (other files)",
        "--train a (other text), b (new)",
        "--weight (a=1 before, a=2 now)",
        "--lr (0.0003 before, 0.001 now)",
        "--min-lr (3e-05 before, 0.0001 now)",
        "--balance (aux=0.01 z-loss=0.001 before, aux=0.1 now)",
    ]


def test_a_strategy_without_a_coefficient_is_told_by_its_name() -> None:
    balances = {"balance": {"sinkhorn": 0.0, "erc": 1.0}}, {"balance": {"sinkhorn": 0.0}}
    assert differences(*balances) == ["--balance (sinkhorn erc=1 before, sinkhorn now)"]


def test_check_batches() -> None:
    check_batches(12, 2, 3)
    with pytest.raises(ConfigError, match="--micro-batch-size may be 1, 2, 3, 6"):
        check_batches(12, 4, 2)
    with pytest.raises(ConfigError, match="use a multiple of 5"):
        check_batches(12, 1, 5)
    assert [default_micro_batch(n) for n in (1, 7, 11, 32, 36)] == [1, 7, 1, 8, 6]


@pytest.mark.parametrize(("text", "value"), [("2B", 2 * 10**9), ("500m", 5 * 10**8), ("1.5k", 1500), ("4_096", 4096)])
def test_parse_count(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "0", "-1", "B", "1.5", "2 billion", "nan"])
def test_parse_count_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a count"):
        parse_count(text)
