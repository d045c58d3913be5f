"""Weights of sources as functions of the step: a number, or phases such as `0.2@0,0.6@50%`.

Phases are recorded as text, so that every weight is a plain value. Those of a resolved run begin at steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise

from moetool.errors import ConfigError
from moetool.values import decimal, named, named_numbers

Weight = float | str


def parse(values: Sequence[str], flag: str) -> dict[str, Weight]:
    """Split repeated NAME=W values; W is a number above 0, or phases, whose numbers may be 0.

    Raises:
        ConfigError: a value without a name, a number or a start; phases of which the first does not begin at 0.
    """
    weights: dict[str, Weight] = {}
    for name, text in named(values, flag, "W", "0.5").items():
        typed = f"{name}={text}"
        weights[name] = _phased(text, f"{flag} {typed}") if "@" in text else named_numbers([typed], flag)[name]
    return weights


def _phased(text: str, typed: str) -> Weight:
    numbers, starts = [], []
    for phase in text.split(","):
        number, _, start = (part.strip() for part in phase.partition("@"))
        if not (_is_weight(number) and _is_start(start)):
            raise ConfigError(
                f"{typed}: '{phase}' is not a phase; write WEIGHT@START, where START is a step or a share of the run,"
                f" such"
                " as 0.2@0,0.6@1000 or 0.2@0,0.6@50%"
            )
        numbers.append(float(number))
        starts.append(start)
    if Fraction(starts[0].rstrip("%")) != 0:
        raise ConfigError(f"{typed}: the first phase must begin at 0, such as 1@0,{text}")
    if not any(numbers):
        raise ConfigError(f"{typed}: the weight is 0 in all phases; leave the source out")
    return _text(zip(starts, numbers, strict=True)) if len(numbers) > 1 else numbers[0]


def _is_weight(text: str) -> bool:
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False


def _is_start(text: str) -> bool:
    if text.isascii() and text.isdecimal():
        return True
    try:
        return text.endswith("%") and decimal(text[:-1]) <= 100
    except ConfigError:
        return False


def _step(start: str, base: int) -> int:
    return round(Fraction(start[:-1]) / 100 * base) if start.endswith("%") else int(start)


def _text(pairs: Iterable[tuple[str | int, float]]) -> str:
    return ",".join(f"{str(number).removesuffix('.0')}@{start}" for start, number in pairs)


def _pairs(weight: str) -> list[tuple[str, float]]:
    return [(start, float(number)) for number, _, start in (phase.partition("@") for phase in weight.split(","))]


def has_shares(weight: Weight) -> bool:
    """Whether a phase begins at a share of the run."""
    return isinstance(weight, str) and "%" in weight


def in_steps(name: str, weight: Weight, base: int, total_steps: int) -> Weight:
    """The same weight with phases that begin at steps.

    Args:
        name: of the source.
        weight: see `parse`.
        base: steps that shares are of.
        total_steps: of the run.

    Raises:
        ConfigError: in a run of that length the phases do not follow one another, or are not all reached.
    """
    if not isinstance(weight, str):
        return weight
    pairs = _pairs(weight)
    steps = [_step(start, base) for start, _ in pairs]
    told = [
        f"@{start}" + f" (step {step})" * start.endswith("%") for (start, _), step in zip(pairs, steps, strict=True)
    ]
    for i, (before, after) in enumerate(pairwise(steps)):
        if after <= before:
            raise ConfigError(
                f"--weight {name}={weight}: {told[i + 1]} is not after {told[i]}; give starts in ascending order"
            )
    if steps[-1] >= total_steps:
        raise ConfigError(
            f"--weight {name}={weight}: a run of {total_steps} steps does not reach {told[-1]}; give an earlier start,"
            " or leave that phase out"
        )
    return _text(zip(steps, (number for _, number in pairs), strict=True))


def phases(weight: Weight) -> dict[int, float]:
    """The weight of a source from each step on, ascending from step 0; of a resolved weight."""
    return {int(start): number for start, number in _pairs(weight)} if isinstance(weight, str) else {0: weight}


def by_step(weights: Mapping[str, Weight]) -> Callable[[int], dict[str, float]]:
    """The weights of all sources as a function of the step; of resolved weights."""
    found = {name: phases(weight) for name, weight in weights.items()}
    starts = sorted({start for one in found.values() for start in one})
    every = [{name: one[max(s for s in one if s <= start)] for name, one in found.items()} for start in starts]
    return lambda step: every[bisect_right(starts, step) - 1]
