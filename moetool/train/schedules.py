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
        ConfigError: the warm-up is longer than the run.
    """
    if options.get("warmup_steps", 0) > total_steps:
        raise ConfigError(
            f"{options['warmup_steps']} warm-up steps do not fit into {total_steps} steps;"
            " lower --warmup-steps or --warmup-ratio"
        )
    taken = {key: options[key] for key in parameters(name)}
    return partial(registry.load("schedule", name), total_steps=total_steps, **taken)
