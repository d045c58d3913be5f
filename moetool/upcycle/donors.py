"""Donors as they are typed: a model, or MODEL=WEIGHT."""

from __future__ import annotations

import os
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from moetool.errors import ConfigError
from moetool.recipe import UpcycleRecipe
from moetool.values import ratio


def read_donors(texts: Sequence[str]) -> tuple[list[str], list[Decimal | None]]:
    """The models, and the weight of each, None where it has none.

    A weight is a number behind the last `=`. A folder of the whole name is a model without a weight, whatever its name.

    Raises:
        ConfigError: a weight is not between 0 and 1.
    """
    names: list[str] = []
    weights: list[Decimal | None] = []
    for text in texts:
        name, _, weight = text.rpartition("=")
        if name and _is_number(weight) and not Path(os.path.expanduser(text)).is_dir():
            try:
                weights.append(ratio(weight))
            except ConfigError as error:
                raise ConfigError(f"--donor {text}: {error}; a weight is the donor's share of a mean") from None
            names.append(name)
        else:
            names.append(text)
            weights.append(None)
    return names, weights


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_weights(recipe: UpcycleRecipe) -> None:
    """Check the weights of a recipe's donors.

    Raises:
        ConfigError: one is not between 0 and 1, or they sum to more than 1.
    """
    weights = [weight for weight in recipe.donor_weights if weight is not None]
    for weight in weights:
        if not 0 <= weight <= 1:
            raise ConfigError(f"donor weight {weight} is not between 0 and 1")
    if (total := sum(weights)) > 1:
        raise ConfigError(
            f"the weights of --donor sum to {total}, but may sum to at most 1; lower them, or leave some out, because"
            f" models without a weight share the rest"
        )
