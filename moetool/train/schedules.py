"""Learning rates as pure functions of the step.

`step` counts the optimizer updates made so far: the value at step s is used for update s + 1, which
makes the model of step s + 1. A schedule's keyword parameters are the options that it takes; the
command line refuses an option that the chosen schedule has no use for.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

from moetool import registry
from moetool.errors import ConfigError
from moetool.option import flag


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


def wsd(
    step: int,
    total_steps: int,
    *,
    lr: float,
    min_lr: float,
    warmup_steps: int,
    constant_end: float,
    decay_shape: str = "linear",
) -> float:
    """Warm-up, stable, decay: as `constant` up to update A = round(constant_end * N), then `decay` to `min_lr`.

    Hu et al. 2024 (MiniCPM, arXiv 2404.06395), section 4; the linear decay as in Haegele et al. 2024
    (arXiv 2405.18392), section 3.
    """
    update, end = step + 1, round(constant_end * total_steps)
    if update <= end:
        return constant(step, total_steps, lr=lr, warmup_steps=warmup_steps)
    return decay(min(1.0, (update - end) / (total_steps - end)), lr, min_lr, decay_shape)


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
    decay_shape: str = "exponential",
) -> float:
    """Warm-up to `lr`, cosine cooldown to `constant_lr`, that rate for as long as one likes, annealing.

    Of N updates, u <= W = warmup_steps have lr * u / W; u <= C = round(cooldown_end * N) have
    constant_lr + (lr - constant_lr) * (1 + cos(pi * (u - W) / (C - W))) / 2; u <= A =
    round(constant_end * N) have constant_lr; the rest `decay` from it to `min_lr`, by default exponentially.
    With `cooldown_end` 0, for a run that leaves from the constant phase of another, the warm-up rises to
    `constant_lr` and there is no cooldown.
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
    return decay(min(1.0, (update - annealed) / (total_steps - annealed)), constant_lr, min_lr, decay_shape)


def decay(share: float, above: float, below: float, shape: str) -> float:
    """The rate after a share of the decay from `above` (share 0) to `below` (share 1).

    `linear` is above + (below - above) * share; `minus-sqrt` has sqrt(share) in its place, so it falls fast at first
    (the 1-sqrt cooldown of Haegele et al. 2024, arXiv 2405.18392, section 3); `exponential` is
    above * (below / above) ** share.
    """
    if shape == "exponential":
        return float(above * (below / above) ** share)
    return above + (below - above) * (math.sqrt(share) if shape == "minus-sqrt" else share)


def parameters(name: str) -> list[str]:
    """The options that a schedule takes, such as `lr` and `warmup_steps`."""
    every = inspect.signature(registry.load("schedule", name)).parameters.values()
    return [p.name for p in every if p.kind is inspect.Parameter.KEYWORD_ONLY]


def default_shape(name: str) -> str | None:
    """The decay of a schedule if none is asked for; None if it has no decay."""
    found = inspect.signature(registry.load("schedule", name)).parameters.get("decay_shape")
    return found.default if found else None


def build(name: str, total_steps: int, options: dict[str, Any]) -> Callable[[int], float]:
    """A schedule of the registry as step -> learning rate.

    Args:
        name: of the schedule.
        total_steps: updates of the whole run.
        options: values by name; those that the schedule does not take are left out, and None is its own default.

    Raises:
        ConfigError: its phases do not follow one another, or its rates are out of order.
    """
    taken = {key: options[key] for key in parameters(name) if options.get(key) is not None}
    warmup = taken.get("warmup_steps", 0)
    if warmup > total_steps:
        raise ConfigError(
            f"{warmup} warm-up steps do not fit into {total_steps} steps; lower --warmup-steps or --warmup-ratio"
        )
    _check_phases(taken, total_steps)
    _check_rates(name, {"decay_shape": default_shape(name)} | taken)
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
                f"{flag(name)} {taken[name]:g} is update {end} of {total_steps}, not after {before};"
                " give a later end point"
            )
        before, before_end = f"{flag(name)} {taken[name]:g} (update {end})", end


def _check_rates(name: str, taken: dict[str, Any]) -> None:
    """Refuse a rate that rises where the schedule falls, and an exponential decay to 0, which no power reaches."""
    names = [name for name in ("lr", "constant_lr", "min_lr") if name in taken]
    if taken.get("cooldown_end") == 0:
        names.remove("lr")  # no warm-up reaches it
    if taken.get("constant_end") == 1:
        names.remove("min_lr")  # nothing anneals
    for above, below in pairwise(names):
        if taken[below] > taken[above]:
            raise ConfigError(
                f"{flag(below)} {taken[below]:g} is above {flag(above)} {taken[above]:g}, but the learning rate must"
                " fall from the second to the first"
            )
    if taken["decay_shape"] == "exponential" and "min_lr" in names and not taken["min_lr"] > 0:
        raise ConfigError(
            f"--min-lr {taken['min_lr']:g}: the decay of --schedule {name} is exponential and needs rates above 0; give"
            " --min-lr above 0 or --decay-shape linear"
        )
    if "constant_lr" in taken and not taken["constant_lr"] > 0:
        raise ConfigError(f"--constant-lr {taken['constant_lr']:g}: --schedule {name} needs one above 0")


def phases(name: str, total_steps: int, options: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """The phases of a schedule as (name, first update - 1, last update); those without an update are left out.

    Args:
        name: of the schedule.
        total_steps: updates of the whole run.
        options: of a run, resolved.
    """
    ends = {"warm-up": options["warmup_steps"]}
    if name == "infinite":
        ends["cooldown"] = round(options["cooldown_end"] * total_steps)
    if name in ("infinite", "wsd"):
        ends["constant"] = round(options["constant_end"] * total_steps)
    ends["constant" if name == "constant" else "decay"] = total_steps
    found, begin = [], 0
    for phase, end in ends.items():
        if end > begin:
            found.append((phase, begin, end))
            begin = end
    return found
