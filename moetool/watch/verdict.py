"""A run's numbers in plain words: is it learning, forgetting, balanced, slower than before, and how long will it take.

Pure functions of columns. The bounds are where this tool draws the line, not laws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from moetool.amounts import count
from moetool.routing.levels import level
from moetool.train.advice import advice
from moetool.train.signs import BLOCK, NOISE, SLOW, SPIKE

SAME = 0.005  # nats: a validation loss that changed by less has not changed
LITTLE, MUCH = 0.01, 0.1  # nats of forgetting
SLOWER = 0.9  # of the speed before
MAX_MARKS = 200
Column = Any  # of numbers: a list, an array or numpy's
Val = Mapping[str, tuple[Sequence[int], Sequence[float]]]
Options = Mapping[str, Any]  # of a run, on which advice depends (see train/advice.py)
DEFAULTS: Options = MappingProxyType({})


class Answer(NamedTuple):
    """The answer to one question about a run.

    Attributes:
        question: in a few words.
        answer: in one or two.
        level: good, warn, bad or none.
        text: the numbers behind it, and what helps, in sentences.
    """

    question: str
    answer: str
    level: str
    text: str


def learning(val: Val, trained: Sequence[str], loss: Sequence[float], options: Options = DEFAULTS) -> Answer:
    """Whether the text in training is learned.

    Args:
        val: domain -> (steps, validation losses).
        trained: the domains in training.
        loss: of the training steps.
        options: of the run.
    """
    ask = "Learning?"
    known = {name: val[name] for name in trained if name in val and len(val[name][0]) > 1}
    if known:
        changes = {name: losses[-1] - losses[0] for name, (_, losses) in known.items()}
        said = ", ".join(f"{name} {losses[0]:.3f} → {losses[-1]:.3f}" for name, (_, losses) in known.items())
        said = f"Validation loss since the start: {said}."
        better = [name for name, change in changes.items() if change < -SAME]
        if not better:
            trouble = "unlearned" if min(changes.values()) > SAME else "not learned"
            return Answer(ask, "No", "bad", f"{said} {_helps(trouble, options)}")
        if len(better) < len(known):
            rest = " and ".join(name for name in known if name not in better)
            return Answer(ask, "Partly", "warn", f"{said} In a new run, raise the --weight of {rest}.")
        for name, (steps, losses) in known.items():
            best = min(range(len(losses)), key=losses.__getitem__)
            if losses[-1] > losses[best] + 2 * LITTLE:
                return Answer(
                    ask, "Not any more", "warn",
                    f"{said} {name} was better at step {steps[best]} ({losses[best]:.3f}): the text may have been read"
                    " too often, or the learning rate is too high.",
                )  # fmt: skip
        return Answer(ask, "Yes", "good", said)
    if len(loss) < 2 * BLOCK:
        return Answer(ask, "Too early to say", "none", f"{len(loss)} training steps so far.")
    first, last = np.asarray(loss[:BLOCK]), np.asarray(loss[-BLOCK:])
    change = float(last.mean() - first.mean())
    noise = 3 * math.sqrt(float(first.var(ddof=1) + last.var(ddof=1)) / BLOCK)
    said = f"Training loss {first.mean():.3f} over the first {BLOCK} steps, {last.mean():.3f} over the last {BLOCK}."
    if change < -noise:
        return Answer(ask, "Yes", "good", said)
    if change > noise:
        return Answer(ask, "No", "bad", f"{said} {_helps('unlearned', options)}")
    return Answer(ask, "Not visibly", "warn", f"{said} The difference is within its noise.")


def forgetting(val: Val, trained: Sequence[str], options: Options = DEFAULTS) -> Answer:
    """Whether domains outside the new text get worse: those replayed, or validated only."""
    ask = "Forgetting?"
    others = {name: pair for name, pair in val.items() if name not in trained}
    if not others:
        return Answer(ask, "Not measured", "none", _helps("forgetting not measured", options))
    changes = {name: losses[-1] - losses[0] for name, (_, losses) in others.items() if len(losses) > 1}
    if not changes:
        return Answer(ask, "Too early to say", "none", "Validated once so far.")
    worst = max(changes, key=changes.__getitem__)
    said = ", ".join(f"{name} {change:+.3f}" for name, change in changes.items())
    said = f"Change of validation loss since the start: {said}."
    if changes[worst] <= LITTLE:
        return Answer(ask, "No", "good", said)
    how_much = ("A little", "warn") if changes[worst] <= MUCH else ("Yes", "bad")
    return Answer(ask, *how_much, f"{said} {_helps('forgotten', options)}")


def _helps(trouble: str, options: Options, when: str = "") -> str:
    """Advice as a sentence."""
    clause = when + advice(trouble, options)
    return f"{clause[0].upper()}{clause[1:]}."


def balanced(
    entropy_L: Sequence[float], mri_L: Sequence[float], dead_L: Sequence[int], layers: Sequence[str],
    shape: tuple[int, int] | None, steps: int = BLOCK, options: Options = DEFAULTS,
) -> Answer:  # fmt: skip
    """Whether the routers spread their tokens.

    Args:
        entropy_L: of each layer, lately.
        mri_L: likewise.
        dead_L: how many experts of each layer are dead in each of the steps.
        layers: what each is called.
        shape: experts and top-k; None where they are not known.
        steps: the last ones, of which all this is.
        options: of the run.
    """
    ask = "Balanced?"
    if not mri_L:
        return Answer(ask, "No routers", "none", "This is a dense model.")
    worst, dead = max(range(len(mri_L)), key=mri_L.__getitem__), sum(dead_L)
    over = f"Over the last {steps} steps" if steps > 1 else "In one step"
    said = f"{over}, the busiest expert gets {mri_L[worst]:.0%} of tokens (layer {layers[worst]})"
    throughout = " in each of them" if steps > 1 and dead else ""
    if shape is None:
        return Answer(
            ask, "See the numbers", "none",
            f"{said}, and {dead or 'no'} expert{' is' if dead <= 1 else 's are'} dead{throughout}. The run was begun"
            " with an earlier version of moetool: how many experts there are is known from its first checkpoint on.",
        )  # fmt: skip
    experts, top_k = shape
    said += f"; balance would be {top_k / experts:.0%}. "
    every = experts * len(mri_L)
    are = "is" if dead == 1 else "are"
    said += f"{dead} of {every} experts {are} dead{throughout}." if dead else "No expert is dead."
    levels = [
        level(entropy, mri, dead, experts, top_k)
        for entropy, mri, dead in zip(entropy_L, mri_L, dead_L, strict=True)
    ]  # fmt: skip
    for word, tone, when in (("collapsed", "bad", ""), ("skewed", "warn", "if it grows: ")):
        if number := levels.count(word):
            text = f"{number} of {len(levels)} layers {word}. {said} {_helps('unbalanced', options, when)}"
            return Answer(ask, word.capitalize(), tone, text)
    return Answer(ask, "Yes", "good", said)


def medians(speed: Column) -> Any:
    """The median of each full block of rows; the first block, in which kernels are compiled, is left out."""
    blocks = len(speed) // BLOCK
    return np.median(np.asarray(speed[: blocks * BLOCK]).reshape(blocks, BLOCK), axis=1)[1:]


def slower(speed: Column) -> Answer:
    """Whether training steps take longer than before.

    Args:
        speed: tokens per second of each step.
    """
    ask, blocks = "Slower than before?", medians(speed)
    if len(blocks) < 2:
        return Answer(ask, "Too early to say", "none", f"{len(speed)} training steps so far.")
    now, before = float(np.median(speed[-BLOCK:])), float(np.median(blocks[:-1]))
    said = f"{count(now)} tokens/s lately, {count(before)} before."
    if now >= SLOWER * before:
        return Answer(ask, "No", "good", said)
    tone = "bad" if now < SLOW * before else "warn"
    return Answer(ask, f"{1 - now / before:.0%} slower", tone, f"{said} {_helps('slow', DEFAULTS)}")


def seconds_left(step: int, steps: int | None, step_tokens: float, speed: Column) -> float | None:
    """Seconds that the training steps still take at the speed of the last rows; None where that is not known."""
    if steps is None or not len(speed) or not step_tokens:
        return None
    now = float(np.median(speed[-BLOCK:]))
    return max(0, steps - step) * step_tokens / now if now > 0 else None


def how_long(state: str, step: int, steps: int | None, left: float | None, took: float) -> Answer:
    """How long it will still take.

    Args:
        state: of the run, see run.py.
        step: that it is at.
        steps: that it will have.
        left: see `seconds_left`.
        took: seconds of its training steps.
    """
    ask = "How long still?"
    if state == "finished":
        return Answer(ask, "Done", "good", f"{step} steps; the training steps took {duration(took)}.")
    of = f"Step {step} of {steps}" if steps else f"Step {step}"
    if left is None:
        return Answer(ask, "Not known", "none", f"{of}.")
    more = f"{of}; validation and saving come on top."
    if state == "stopped":
        again = f"It is not running: the same command continues it. {more}"
        return Answer(ask, f"Stopped, {duration(left)} left", "bad", again)
    if state == "quiet":
        silent = f"No new row for a while: it validates, saves, waits or has stopped. {more}"
        return Answer(ask, f"{duration(left)} when it goes on", "warn", silent)
    return Answer(ask, duration(left), "good", more)


def duration(seconds: float) -> str:
    """`3 h 05 min`, `12 min`, `40 s`, `2 d 4 h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def marks(steps: Column, values: Column, name: str) -> dict[str, Any]:
    """The spikes of a column: rows above the bound of the block before them.

    Args:
        steps: of the rows.
        values: the column.
        name: loss or grad_norm.

    Returns:
        `x` and `y` of at most MAX_MARKS, the highest above their bounds.
    """
    column = np.asarray(values, dtype=np.float64)
    N = len(column)
    whole = N // BLOCK
    if whole == 0:
        return {"x": [], "y": []}
    blocks = column[: whole * BLOCK].reshape(whole, BLOCK)
    middle = np.median(blocks, axis=1)
    noise = np.median(np.abs(blocks - middle[:, None]), axis=1)
    bounds = middle + np.maximum(NOISE * noise, SPIKE[name] * np.abs(middle))
    over = column[BLOCK:] / np.repeat(bounds, BLOCK)[: N - BLOCK]
    found = np.flatnonzero(over > 1)
    found = np.sort(found[np.argsort(-over[found], kind="stable")[:MAX_MARKS]]) + BLOCK
    return {"x": np.asarray(steps)[found].tolist(), "y": column[found].tolist()}
