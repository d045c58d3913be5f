"""What helps a run that does not go well: an option that has an effect beside the run's other options.

The options that define a run stay what they are when it goes on. So advice is for a new run, whose MODEL may be a step
folder of this one. It is the same on the page of `moetool watch` and in the warnings of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

LAYERED = ("aux", "global-aux", "adaptive-aux")  # losses that balance each layer, and more so with a larger coefficient


class _Has(NamedTuple):
    """What advice depends on, of the options of a run."""

    balance: Mapping[str, float]
    frozen: str  # as in TrainConfig.frozen_routers
    balance_end: float
    router_lr: float
    replay: bool
    replay_ratio: float
    held_out: bool  # whether a replayed source is validated
    routers_alone: bool
    teacher: str  # the sequences that have one
    teacher_weight: float
    rate: str  # the option of the highest learning rate
    lr: float
    grad_clip: float
    warmup_steps: float

    def flags(self, *more: str) -> str:
        """The `--balance` options of a run: whoever gives one has to give them all."""
        named = [*more, *(f"{name}={value:g}" if value else name for name, value in self.balance.items())]
        return " ".join(f"--balance {one}" for one in named)


def advice(trouble: str, options: Mapping[str, Any]) -> str:
    """What helps.

    Args:
        trouble: one of TABLE.
        options: of the run by the names of TrainConfig's fields, resolved, or as they lie in moetool.yaml. An option
            that is absent has its default.

    Returns:
        A clause that begins with a small letter and ends without a full stop.
    """
    run = _read(options)
    text = next(text for holds, text in TABLE[trouble] if holds(run))
    return text(run) if callable(text) else text


def _raise_loss_free(run: _Has) -> str:
    end = f", and leave --balance-end {run.balance_end:g} out" if run.balance_end < 1 else ""
    return f"in a new run, raise the coefficient of loss-free in {run.flags()}{end}"


def _raise_layered(run: _Has) -> str:
    name = next(name for name in LAYERED if name in run.balance)
    slow = f", or --router-lr ({run.router_lr:g})" if run.router_lr < 1 else ""
    return f"in a new run, raise the coefficient of {name} in {run.flags()}{slow}"


def _lower(run: _Has) -> str:
    return f"lower {run.rate} ({run.lr:g})" if run.lr else f"lower {run.rate}"


def _hold(run: _Has) -> str:
    how = [f"raise --replay-ratio ({run.replay_ratio:g})"] if run.replay and run.replay_ratio < 1 else []
    how += [] if run.replay else ["give --replay NAME=PATH with text of the old kind"]
    how += [f"raise --teacher-weight ({run.teacher_weight:g})"] if run.teacher and run.teacher_weight < 1 else []
    how += [] if run.replay or run.teacher else ["--teacher MODEL --teacher-on all with the model before training"]
    return f"in a new run, {', '.join(how)}{', ' if how else ''}{'or ' if how else ''}{_lower(run)}"


def _calm(run: _Has) -> str:
    clip = f"lower --grad-clip ({run.grad_clip:g})" if run.grad_clip else "give --grad-clip 1"
    return f"if it does not come down again, in a new run {_lower(run)}, {clip}, or raise --warmup-steps{_warmup(run)}"


def _warmup(run: _Has) -> str:
    return f" ({run.warmup_steps:g})" if run.warmup_steps else ""


_Rule = tuple[Callable[[_Has], Any], str | Callable[[_Has], str]]


def _always(run: _Has) -> bool:
    return True


# Trouble -> what the run has, and what then helps; the first line that holds.
TABLE: Mapping[str, tuple[_Rule, ...]] = {
    "unbalanced": (
        (lambda run: "loss-free" in run.balance, _raise_loss_free),
        (lambda run: run.frozen, lambda run: f"in a new run, give --balance aux=0.01 in place of {run.frozen}"),
        (lambda run: not run.balance, "in a new run, leave --balance none out; the default balances each layer"),
        (lambda run: any(name in run.balance for name in LAYERED), _raise_layered),
        (lambda run: "pooled-aux" in run.balance,
         "in a new run, give --balance aux=0.01 in place of pooled-aux, which does not see a single layer"),
        (_always, lambda run: f"in a new run, give {run.flags('aux=0.01')}, because aux balances each layer"),
    ),
    "forgotten": ((_always, _hold),),
    "forgetting not measured": (
        (lambda run: run.held_out and not run.replay,
         "in a new run, give --val NAME=PATH with text of another kind, or --replay, to see it"),
        (_always, "in a new run, give --val NAME=PATH with text of another kind to see it"),
    ),
    "not learned": (
        (lambda run: run.teacher == "all" and run.teacher_weight >= 1,
         "in a new run, lower --teacher-weight (1), which leaves no weight to the new text"),
        (lambda run: run.routers_alone, lambda run: "check the data; in a new run, leave --train-only routers out,"
         f" because routers alone learn little, or raise {run.rate}"),
        (_always, lambda run: f"check the data; in a new run, raise {run.rate}"),
    ),
    "unlearned": (
        (_always, lambda run: f"in a new run, {_lower(run)} or raise --warmup-steps{_warmup(run)}"),
    ),
    "spike": ((_always, _calm),),
    "slow": ((_always, "see what else uses the machine, its GPU's clock and the file system of the data"),),
}  # fmt: skip


def _read(options: Mapping[str, Any]) -> _Has:
    def number(name: str, default: float) -> float:
        try:
            return float(options[name])
        except (KeyError, TypeError, ValueError, OverflowError):
            return default

    frozen = "--freeze-router" if options.get("freeze_router") in (True, "true") else ""
    if options.get("train_only") == "experts":
        frozen = "--train-only experts"
    replay = bool(options.get("replay"))
    teacher_on = str(options.get("teacher_on", "replay")) if options.get("teacher") else ""
    constant = options.get("schedule") == "infinite" and number("cooldown_end", 0.7) == 0  # --lr is never reached
    return _Has(
        balance=_balance(options.get("balance"), frozen),
        frozen=frozen,
        balance_end=number("balance_end", 1.0),
        router_lr=number("router_lr", 1.0),
        replay=replay,
        replay_ratio=number("replay_ratio", 0.3),
        held_out=number("val_fraction", 0.01) > 0,
        routers_alone=options.get("train_only") == "routers",
        teacher=teacher_on,
        teacher_weight=number("teacher_weight", 0.5),
        rate="--constant-lr" if constant else "--lr",
        lr=number("constant_lr", 0.0) if constant else number("lr", 0.0),
        grad_clip=number("grad_clip", 1.0),
        warmup_steps=number("warmup_steps", 0.0),
    )


def _balance(value: Any, frozen: str) -> dict[str, float]:
    """Strategy -> coefficient, 0 where that is not known."""
    if value is None:
        return {} if frozen else {"aux": 0.01, "z-loss": 0.001}
    named = value.items() if isinstance(value, dict) else (str(one).split("=") for one in _listed(value))
    found = {}
    for name, *rest in named:
        try:
            found[str(name)] = float(rest[0]) if rest else 0.0
        except (TypeError, ValueError, OverflowError):
            found[str(name)] = 0.0
    return {name: coefficient for name, coefficient in found.items() if name != "none"}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
