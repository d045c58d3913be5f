"""Continuing a run by its own command, which may give it more steps.

Everything that an update depends on, besides the state before it, is a function of the step. A longer run may go on
from steps that a shorter one made if these functions are the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moetool.checkpoint.step_folder import step_folders
from moetool.errors import ConfigError
from moetool.option import flag, options
from moetool.outside import fits
from moetool.train import schedules, weights
from moetool.train.config import TrainConfig
from moetool.train.differences import differences


def by_step(config: TrainConfig) -> dict[str, Callable[[int], Any]]:
    """The functions of the step on which a resolved run's updates depend, by their names in errors."""
    sources = {name: config.weight.get(name, 1) for name in (*config.train, *config.replay)}
    moves = round(config.balance_end * config.max_steps) if "loss-free" in config.balance else 0
    return {
        "learning rate": schedules.build(config.schedule, config.max_steps, vars(config)),
        "weights of the sources": weights.by_step(sources),
        "selection bias": lambda step: step < moves,
    }


def first_length(before: Mapping[str, Any]) -> int | None:
    """The steps that shares are of in a run with that identity: those it began with."""
    found = before.get("shares-of", before.get("max-steps"))
    return found if fits(found, int) else None


def check_going_on(config: TrainConfig, before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> list[str]:
    """Refuse to continue the run in OUT with other options, or as a longer one whose past steps would differ.

    Args:
        config: resolved.
        before: identity of the run in OUT.
        now: identity of `config`.
        step: updates that it has made.

    Returns:
        The options that a longer run has changed for the steps to come, in words, besides its length.

    Raises:
        ConfigError: says what is different, and what to do.
    """
    out, before = config.out, {"shares-of": before.get("max-steps"), **before}
    changed = differences(before, now)
    if not changed:
        return []
    chosen = differences(_chosen(before), _chosen(now))
    if not (fits(before, {"max-steps": int, "weight": {"*": (float, str)}}) and now["max-steps"] > before["max-steps"]):
        old, new = before.get("max-steps"), now["max-steps"]
        raise _other(out, changed if old == new else [*chosen, f"--max-steps ({old} before, {new} now)"])
    free = _by_step_options()
    if differences({n: v for n, v in before.items() if n not in free}, {n: v for n, v in now.items() if n not in free}):
        raise _other(out, chosen)
    recorded: dict[str, Any] = {name.replace("-", "_"): before.get(name) for name in free}
    longer = by_step(config)
    try:
        earlier = by_step(replace(config, **recorded))
        others = [(name, _first_other(value, earlier[name], step)) for name, value in longer.items()]
    except (ArithmeticError, ConfigError, KeyError, TypeError, ValueError):  # an identity that was changed by hand
        raise _other(out, changed) from None
    for name, other in others:
        if other is not None:
            raise _other(out, chosen) if chosen else _decayed(config, before, step, name, other)
    return chosen


def _first_other(one: Callable[[int], Any], other: Callable[[int], Any], steps: int) -> int | None:
    """The first of some steps in which two functions differ; None if they agree."""
    return next((step for step in range(steps) if one(step) != other(step)), None)


def _by_step_options() -> set[str]:
    """The options, as an identity names them, that `by_step` reads: all that a longer run may change."""
    rates = {flag(name)[2:] for name, one in options(TrainConfig).items() if one.needs and one.needs[0] == "schedule"}
    return {"schedule", "max-steps", "shares-of", "weight", "balance-end"} | (rates - {"warmup-ratio"})


def _chosen(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without what follows from its length."""
    return {name: value for name, value in identity.items() if name not in ("max-steps", "shares-of", "cooldown-end")}


def _other(out: Path, changed: list[str]) -> ConfigError:
    return ConfigError(
        f"{out} holds a run with other options: {'; '.join(changed)}. Repeat its options to continue it,"
        " use --no-resume to delete it and start again, or choose another OUT"
    )


def _decayed(config: TrainConfig, before: Mapping[str, Any], step: int, name: str, other: int) -> ConfigError:
    """That a run cannot be longer, since `name` would have been another from the update after step `other` on."""
    out, folders = config.out, step_folders(config.out)
    newest = out if (out / "config.json").exists() else folders[step]
    ways = f"from {newest} with a new warm-up"
    if early := [folder for there, folder in folders.items() if there <= other]:
        flags = "--keep-optimizer --warmup-steps 0"
        flags += " --cooldown-end 0" * ("cooldown_end" in schedules.parameters(config.schedule))
        ways = f"from {early[-1]}, the last step folder before that, with {flags}; or {ways}"
    return ConfigError(
        f"{out} cannot continue to {config.max_steps} steps. It has made {step} of {before['max-steps']} steps, and"
        f" in a longer run their {name} would differ from step {other + 1} on. Start a run in another OUT {ways}"
    )
