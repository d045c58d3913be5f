"""What a run's numbers say in words, and the signs of trouble that `cpt` tells."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetool.routing.levels import level, level_of_load, spread
from moetool.train.schedules import phases
from moetool.train.signs import BLOCK, SPIKE, Sign, Signs, spike_bound
from moetool.watch.verdict import (
    balanced,
    duration,
    forgetting,
    how_long,
    learning,
    marks,
    seconds_left,
    slower,
)


def test_learning_is_judged_by_validation_where_there_is_one() -> None:
    fallen = {"code": ([0, 10], [3.4, 2.4])}
    assert learning(fallen, ["code"], [])[1:3] == ("Yes", "good")
    assert "code 3.400 → 2.400" in learning(fallen, ["code"], []).text
    assert learning({"code": ([0, 10], [3.4, 3.396])}, ["code"], [])[1:3] == ("No", "bad")
    both = fallen | {"law": ([0, 10], [2.0, 2.1])}
    assert learning(both, ["code", "law"], [])[1:3] == ("Partly", "warn")
    again = learning({"code": ([0, 10, 20], [3.4, 2.4, 2.5])}, ["code"], [])
    assert again[1:3] == ("Not any more", "warn")
    risen = learning({"code": ([0, 10], [3.4, 3.5])}, ["code"], [], {"lr": 0.1})
    assert "In a new run, lower --lr (0.1)" in risen.text
    assert "raise the --weight of law." in learning(both, ["code", "law"], []).text
    assert "step 10 (2.400)" in again.text


def test_learning_without_validation_is_judged_by_the_training_loss() -> None:
    draw = random.Random(0)
    noise = [draw.gauss(0, 0.01) for _ in range(2 * BLOCK)]
    assert learning({}, ["a"], [2.0] * (2 * BLOCK - 1)).answer == "Too early to say"
    assert learning({}, ["a"], [2 + n - (i >= BLOCK) for i, n in enumerate(noise)]).answer == "Yes"
    assert learning({}, ["a"], [2 + n + (i >= BLOCK) for i, n in enumerate(noise)]).answer == "No"
    assert learning({}, ["a"], [2 + n for n in noise]).answer == "Not visibly"


@pytest.mark.parametrize(("change", "answer"), [(-0.2, "No"), (0.01, "No"), (0.05, "A little"), (0.3, "Yes")])
def test_forgetting_is_the_rise_of_the_worst_other_domain(change: float, answer: str) -> None:
    val = {"new": ([0, 5], [3.0, 9.0]), "prose": ([0, 5], [2.0, 2.0 + change - 1e-9]), "law": ([0, 5], [2.0, 1.9])}
    assert forgetting(val, ["new"]).answer == answer
    assert forgetting({"new": val["new"]}, ["new"]).answer == "Not measured"
    assert forgetting({"prose": ([0], [2.0])}, ["new"]).answer == "Too early to say"


def test_layers_are_judged_as_in_a_report() -> None:
    # Of 4 experts, top-1: log 1 / log 4 = 0, so spread is entropy; top-2 begins at log 2 / log 4 = 1/2.
    assert spread(0.75, 4, 1) == pytest.approx(0.75)
    assert spread(0.75, 4, 2) == pytest.approx(0.5)
    assert level(0.69, 0.5, 0, 4, 2) == "collapsed"  # spread 0.38
    assert level(0.71, 0.5, 0, 4, 2) == "skewed"  # 0.42
    assert level(1.0, 0.5, 0, 4, 2) == "balanced"
    assert level(1.0, 0.5, 1, 4, 2) == "skewed"
    assert level(0.3, 1.0, 0, 2, 2) == "balanced"
    assert level_of_load([0.25] * 4, 2) == "balanced"
    assert level_of_load([0.5, 0.5, 0, 0], 2) == "collapsed"


def test_balance_names_the_worst_layer() -> None:
    fine = balanced([0.99, 0.98], [0.26, 0.30], [0, 0], ["1", "2"], (8, 2))
    assert fine[1:3] == ("Yes", "good")
    assert (
        "steps, the busiest expert gets 30% of tokens (layer 2); balance would be 25%. No expert is dead" in fine.text
    )
    bad = balanced([0.5, 0.98], [0.9, 0.30], [3, 0], ["1", "2"], (8, 2))
    assert bad[1:3] == ("Collapsed", "bad")
    assert "1 of 2 layers collapsed" in bad.text
    assert "3 of 16 experts are dead in each of them. In a new run, raise the coefficient of aux in" in bad.text
    frozen = balanced([0.5], [0.9], [0], ["1"], (8, 2), 20, {"freeze_router": True})
    assert frozen.text.endswith("in place of --freeze-router.")
    assert balanced([0.9], [0.6], [0], ["0"], None).level == "none"
    assert balanced([], [], [], [], None).answer == "No routers"


def test_speed_is_compared_with_the_blocks_before_the_first_left_out() -> None:
    assert slower([1.0] * BLOCK + [100.0] * 2 * BLOCK)[1:3] == ("No", "good")
    assert slower([100.0] * 3 * BLOCK + [80.0] * BLOCK)[1:3] == ("20% slower", "warn")
    assert slower([100.0] * 3 * BLOCK + [40.0] * BLOCK)[1:3] == ("60% slower", "bad")
    assert slower([100.0] * 2 * BLOCK).answer == "Too early to say"


def test_the_time_left_is_that_of_the_steps() -> None:
    assert seconds_left(60, 100, 64, [640.0] * 5) == pytest.approx(4.0)
    assert seconds_left(60, None, 64, [640.0]) is None
    assert seconds_left(100, 100, 64, [640.0]) == 0
    assert [duration(s) for s in (4.2, 150, 3 * 3600 + 300, 100 * 3600)] == ["4 s", "2 min", "3 h 05 min", "4 d 4 h"]
    assert how_long("running", 60, 100, 4.0, 6.0).answer == "4 s"
    assert how_long("stopped", 60, 100, 4.0, 6.0).level == "bad"
    assert how_long("quiet", 60, 100, 4.0, 6.0).level == "warn"
    assert how_long("finished", 100, 100, 0, 10.0).answer == "Done"


def test_a_spike_exceeds_the_block_before_it() -> None:
    # Median 2, deviations 0.1: the bound is 2 + max(8 x 0.1, 0.1 x 2) = 2.8.
    assert spike_bound([1.9, 2.1] * 10, SPIKE["loss"]) == pytest.approx(2.8)
    assert spike_bound([2.0] * 20, SPIKE["loss"]) == pytest.approx(2.2)
    assert spike_bound([0.5] * 20, SPIKE["grad_norm"]) == pytest.approx(1.5)
    values = [9.0] + [2.0] * 39
    values[25] = 2.3
    assert marks(range(1, 41), values, "loss") == {"x": [26], "y": [2.3]}
    assert marks([1], [2.0], "loss") == {"x": [], "y": []}


def row(step: int, loss: float = 2.0, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": loss, "grad_norm": 0.5, "tokens_per_second": 100.0, **more}


@given(st.lists(st.sampled_from([2.0, 2.05, 1.95, 2.5, 7.0]), max_size=130))
def test_the_marks_of_the_page_are_the_warnings_of_the_run(losses: list[float]) -> None:
    signs = Signs()
    told: list[int] = []
    for step, loss in enumerate(losses, 1):
        told += [sign.step for sign in signs.see(row(step, loss))]
    marked = marks(range(1, len(losses) + 1), losses, "loss")["x"]
    first = [step for step in marked if step - 1 not in marked]  # told once until it is over
    assert told == first


def test_a_gradient_that_jumps_is_told_with_the_loss_alone() -> None:
    """Most runs that learn have such jumps early on; the page marks them."""
    signs = Signs()
    rows = [row(step) for step in range(1, BLOCK + 1)]
    rows += [row(BLOCK + 1) | {"grad_norm": 9.0}, row(BLOCK + 2, 7.0) | {"grad_norm": 9.0}]
    (sign,) = [sign for one in rows for sign in signs.see(one)]
    assert sign.step == BLOCK + 2
    assert "the loss jumped from 2 to 7 and the gradient norm jumped from 0.5 to 9" in sign.text


def test_a_collapse_is_told_once_with_the_option_that_helps() -> None:
    routed: dict[str, Any] = {
        "load": {"3": [0.5, 0.5, 0.0, 0.0]},
        "mri": [1.0],
        "entropy": [0.5],
        "dead_experts": [[2, 3]],
    }
    even: dict[str, Any] = {"mri": [0.5], "entropy": [1.0], "dead_experts": [[]]}
    signs = Signs()

    def block(number: int, **more: Any) -> list[Sign]:
        steps = range(BLOCK * number + 1, BLOCK * (number + 1) + 1)
        return [sign for step in steps for sign in signs.see(row(step, **more))]

    (sign,) = block(0, **routed)
    assert (sign.kind, sign.step, sign.layer) == ("collapse", BLOCK, "3")
    assert "one expert gets 100% of tokens, where balance would give 50%" in sign.text
    assert "--balance aux=" in sign.text
    assert block(1, **routed) == []
    assert block(2, **even) == []
    del routed["load"]
    assert [sign.kind for sign in block(3, **routed)] == ["collapse"]
    signs = Signs([row(1, **routed, load={"3": [0.5, 0.5, 0.0, 0.0]})], {"freeze_router": True})  # that goes on
    assert "in place of --freeze-router" in block(0, **routed)[0].text


def test_halved_speed_is_told() -> None:
    signs = Signs()
    speeds = [100.0] * BLOCK + [51.0] * BLOCK + [49.0] * 2 * BLOCK
    told = [s for step, v in enumerate(speeds, 1) for s in signs.see(row(step) | {"tokens_per_second": v})]
    assert [(sign.kind, sign.step) for sign in told] == [("slow", 60)]


def test_phases_follow_the_schedules() -> None:
    options = {"warmup_steps": 5, "cooldown_end": 0.7, "constant_end": 0.8}
    assert phases("cosine", 100, options) == [("warm-up", 0, 5), ("decay", 5, 100)]
    assert phases("infinite", 100, options) == [
        ("warm-up", 0, 5), ("cooldown", 5, 70), ("constant", 70, 80), ("decay", 80, 100)
    ]  # fmt: skip
    assert phases("infinite", 100, options | {"cooldown_end": 0, "constant_end": 1, "warmup_steps": 0}) == [
        ("constant", 0, 100)
    ]
    assert phases("wsd", 100, options)[1] == ("constant", 5, 80)
    assert phases("constant", 100, options) == [("warm-up", 0, 5), ("constant", 5, 100)]
