"""The predicted loads of fitted routers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moetool.upcycle.plan import Upcycling

ROUGH = 0.02  # spread of a predicted load above which more text is texts_read for


def spread(halves: Iterable[float]) -> float:
    """How far loads on other text of the same kind may be from the predicted ones.

    The mean of two halves is off by half of what they differ by, if they are independent.

    Args:
        halves: differences between the loads of two halves of the held-out tokens.
    """
    return max(halves) / 2


def rough(upcycling: Upcycling) -> dict[str, float]:
    """Texts that are too short, or of too few documents, for what is predicted, and the spread of their loads."""
    halves = upcycling.measured.halves.values()
    spreads = {name: spread(one[name] for one in halves) for name in next(iter(halves), {})}
    return {name: found for name, found in spreads.items() if found > ROUGH}


def fitted(upcycling: Upcycling) -> dict[str, Any] | None:
    """The predicted loads as `--json` gives them; None where no router was fitted."""
    recipe, measured = upcycling.recipe, upcycling.measured
    if not measured.loads:
        return None
    layers: list[dict[str, Any]] = []
    for layer, loads in measured.loads.items():
        row: dict[str, Any] = {"layer": layer, "load": loads, "halves": measured.halves.get(layer, {})}
        if recipe.router == "ridge":
            row["to_donor"] = {
                name: sum(share for expert, share in enumerate(load) if recipe.donor(expert) == donor)
                for donor, (name, load) in enumerate(loads.items())
            }
        layers.append(row)
    return {"router": recipe.router, "texts": list(measured.texts_read["texts"]), "layers": layers}
