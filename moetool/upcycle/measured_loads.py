"""The predicted loads of fitted routers."""

from __future__ import annotations

from typing import Any

from moetool.upcycle.plan import Upcycling


def fitted(upcycling: Upcycling) -> dict[str, Any] | None:
    """The predicted loads as `--json` gives them; None where no router was fitted."""
    recipe, measured = upcycling.recipe, upcycling.measured
    if not measured.loads:
        return None
    layers: list[dict[str, Any]] = []
    for layer, loads in measured.loads.items():
        row: dict[str, Any] = {"layer": layer, "load": loads}
        if recipe.router == "ridge":
            row["to_donor"] = {
                name: sum(share for expert, share in enumerate(load) if recipe.donor(expert) == donor)
                for donor, (name, load) in enumerate(loads.items())
            }
        layers.append(row)
    return {"router": recipe.router, "texts": list(measured.asked["texts"]), "layers": layers}
