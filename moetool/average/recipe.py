"""The weights of averaged checkpoints, as an option of `moetool average` and as coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from moetool.errors import CheckpointError, ConfigError
from moetool.option import option
from moetool.values import decimal

SHAPES = ("mean", "minus-sqrt")


def parse_weights(text: str) -> str:
    """`mean`, `minus-sqrt`, or numbers above 0 with commas between them, as they are recorded.

    Raises:
        ConfigError: it is none of these.
    """
    if text in SHAPES:
        return text
    try:
        weights = [decimal(part.strip()) for part in text.split(",")]
    except ConfigError:
        weights = [Decimal(0)]
    if not all(0 < float(weight) < math.inf for weight in weights):
        raise ConfigError(f"--weights '{text}': write {', '.join(SHAPES)}, or numbers above 0 such as 0.5,0.3,0.2")
    return ",".join(map(str, weights))


@dataclass(frozen=True)
class AverageRecipe:
    """How checkpoints are averaged; with the sources, it determines every byte.

    Attributes:
        weights: as `parse_weights` gives it; numbers are in the order of the sources.
    """

    weights: str = option(
        "Weight of each checkpoint: equal weights, weights that imitate a 1 - sqrt(x) decay of the learning rate, or"
        " relative numbers in the order of the checkpoints.",
        "mean", metavar="mean|minus-sqrt|W,W,...", parse=parse_weights,
    )  # fmt: skip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AverageRecipe:
        """The inverse of `asdict`.

        Raises:
            CheckpointError: the field is missing, invalid, or not the only one.
        """
        try:
            if set(values) == set(asdict(cls())) and values["weights"] == parse_weights(values["weights"]):
                return cls(**values)
        except (ConfigError, AttributeError):
            pass
        raise CheckpointError(f"moetool.json: the recipe cannot be read ({str(dict(values))[:100]})")


def coefficients(weights: str, n: int) -> tuple[float, ...]:
    """The weight of each checkpoint, the oldest first. Only their ratios count: they are divided by their sum.

    `minus-sqrt`: the average of checkpoints of a constant learning rate resembles a decay by s(x) = 1 - sqrt(x) if
    an update counts as often as the checkpoints after it say (WSM, arXiv 2507.17634, section 3): with w_i = s(i / n),
    c_i = w_i - w_(i+1), and c_(n-1) = w_(n-1). Linear decay gives the mean.

    Args:
        weights: see `AverageRecipe`.
        n: number of checkpoints.

    Raises:
        ConfigError: there are not as many numbers as checkpoints.
    """
    if weights == "mean":
        return (1.0,) * n
    if weights == "minus-sqrt":
        w = [1 - math.sqrt(i / n) for i in range(n)] + [0.0]
        return tuple(w[i] - w[i + 1] for i in range(n))
    numbers = tuple(float(number) for number in weights.split(","))
    if len(numbers) != n:
        raise ConfigError(f"--weights has {len(numbers)} numbers, but there are {n} checkpoints; give one for each")
    return numbers
