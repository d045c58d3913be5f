"""Learning rates as pure functions of the step.

`step` counts the optimizer updates made so far: the value at step s is used for update s + 1, which
makes the model of step s + 1. A schedule's keyword parameters are the options that it takes; the
command line refuses an option that the chosen schedule has no use for.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from moetool import registry
from moetool.errors import ConfigError


def cosine(step: int, total_steps: int, *, lr: float, min_lr: float, warmup_steps: int) -> float:
    """Linear re-warming from 0 to `lr`, then cosine re-decaying to `min_lr` at the last update.

    Update u = step + 1 has lr * u / W while u <= W = warmup_steps, then
    min_lr + (lr - min_lr) * (1 + cos(pi * (u - W) / (N - W))) / 2 with N = total_steps: update W has
    exactly `lr`, update N exactly `min_lr`. Re-warming and re-decaying in continual pretraining:
    Ibrahim et al. 2024 (arXiv 2403.08763), section 4.1.
    """
    update = step + 1
    if update <= warmup_steps:
        return lr * update / warmup_steps
    share = (update - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * min(1.0, share))) / 2


def constant(step: int, total_steps: int, *, lr: float, warmup_steps: int) -> float:
    """Linear re-warming from 0 to `lr` as in `cosine`, then `lr`."""
    return lr * min(1.0, (step + 1) / warmup_steps) if warmup_steps else lr


def wsd(step: int, total_steps: int, *, lr: float, min_lr: float, warmup_steps: int, constant_end: float) -> float:
    """Warm-up, stable, decay: as `constant` up to update round(constant_end * N), then linearly to `min_lr`.

    Hu et al. 2024 (MiniCPM, arXiv 2404.06395), section 4; the linear decay as in Haegele et al. 2024
    (arXiv 2405.18392), section 3.
    """
    update, end = step + 1, round(constant_end * total_steps)
    if update <= end:
        return constant(step, total_steps, lr=lr, warmup_steps=warmup_steps)
    return lr + (min_lr - lr) * min(1.0, (update - end) / (total_steps - end))


def infinite(
    step: int,
    total_steps: int,
    *,
    lr: float,
    min_lr: float,
    constant_lr: float,
    warmup_steps: int,
    cooldown_end: float,
    constant_end: float,
) -> float:
    """Warm-up to `lr`, cosine cooldown to `constant_lr`, that rate for as long as one likes, annealing.

    Of N updates, u <= W = warmup_steps have lr * u / W; u <= C = round(cooldown_end * N) have
    constant_lr + (lr - constant_lr) * (1 + cos(pi * (u - W) / (C - W))) / 2; u <= A =
    round(constant_end * N) have constant_lr; the rest constant_lr * (min_lr / constant_lr) **
    ((u - A) / (N - A)): update N has exactly `min_lr`. With `cooldown_end` 0, for a run that leaves
    from the constant phase of another, the warm-up rises to `constant_lr` and there is no cooldown.
    Ibrahim et al. 2024 (arXiv 2403.08763), section 7.4, with the cosine cooldown of arXiv 2503.02844, equation 1.
    """
    update = step + 1
    cooled, annealed = round(cooldown_end * total_steps), round(constant_end * total_steps)
    if update <= warmup_steps:
        return (lr if cooled else constant_lr) * update / warmup_steps
    if update <= cooled:
        share = (update - warmup_steps) / (cooled - warmup_steps)
        return constant_lr + (lr - constant_lr) * (1 + math.cos(math.pi * share)) / 2
    if update <= annealed:
        return constant_lr
    share = min(1.0, (update - annealed) / (total_steps - annealed))
    return float(constant_lr * (min_lr / constant_lr) ** share)


def parameters(name: str) -> list[str]:
    """The options that a schedule takes, such as `lr` and `warmup_steps`."""
    every = inspect.signature(registry.load("schedule", name)).parameters.values()
    return [p.name for p in every if p.kind is inspect.Parameter.KEYWORD_ONLY]


def build(name: str, total_steps: int, options: dict[str, Any]) -> Callable[[int], float]:
    """A schedule of the registry as step -> learning rate.

    Args:
        name: of the schedule.
        total_steps: updates of the whole run.
        options: values by name; those that the schedule does not take are left out.

    Raises:
        ConfigError: its phases do not follow one another, or its rates are out of order.
    """
    taken = {key: options[key] for key in parameters(name)}
    warmup = taken.get("warmup_steps", 0)
    if warmup > total_steps:
        raise ConfigError(
            f"{warmup} warm-up steps do not fit into {total_steps} steps; lower --warmup-steps or --warmup-ratio"
        )
    _check_phases(taken, total_steps)
    _check_rates(taken)
    return partial(registry.load("schedule", name), total_steps=total_steps, **taken)


def _check_phases(taken: dict[str, Any], total_steps: int) -> None:
    """Refuse end points that do not ascend: warm-up, cooldown, constant."""
    before, before_end = f"{taken.get('warmup_steps', 0)} warm-up steps", taken.get("warmup_steps", 0)
    for name in ("cooldown_end", "constant_end"):
        if name not in taken or (name == "cooldown_end" and taken[name] == 0):
            continue
        end = round(taken[name] * total_steps)
        # A cooldown needs an update of its own; a constant phase may be empty.
        if end < before_end or (name == "cooldown_end" and end == before_end):
            raise ConfigError(
                f"--{name.replace('_', '-')} {taken[name]:g} is update {end} of {total_steps}, not after {before};"
                " give a later end point"
            )
        before, before_end = f"--{name.replace('_', '-')} {taken[name]:g} (update {end})", end


def _check_rates(taken: dict[str, Any]) -> None:
    """Refuse a rate that rises where the schedule falls, and annealing to 0, which no power reaches."""
    names = [name for name in ("lr", "constant_lr", "min_lr") if name in taken]
    if taken.get("cooldown_end") == 0:
        names.remove("lr")  # no warm-up reaches it
    if taken.get("constant_end") == 1:
        names.remove("min_lr")  # nothing anneals
    for above, below in pairwise(names):
        if taken[below] > taken[above]:
            raise ConfigError(
                f"--{below.replace('_', '-')} {taken[below]:g} is above --{above.replace('_', '-')}"
                f" {taken[above]:g}, but the learning rate must fall from the second to the first"
            )
    if "constant_lr" in taken and not (taken["constant_lr"] > 0 and ("min_lr" not in names or taken["min_lr"] > 0)):
        raise ConfigError(
            "--schedule infinite anneals by --constant-lr x (--min-lr / --constant-lr)^t, which needs rates above 0"
        )
