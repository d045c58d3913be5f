"""The numbers of the page's section "Experts and the dense model", from report.json's `upcycling`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.layers import by_layers

Measured = Mapping[str, Any]
OLDER = ", first model"


def changed_units(first: Measured) -> str:
    """The name of the units that are not the dense model's."""
    return "units given noise" if first["recipe"]["method"] == "noise" else "redrawn units"


def beginning(first: Measured) -> list[str]:
    """How the experts began, in sentences."""
    recipe, names = first["recipe"], [first["source"], *first["donors"]]
    if recipe["method"] == "scratch":
        return [f"moetool made this model in the shape of {names[0]}, but drew every tensor: no weight comes from it."]
    several, parts = len(names) > 1, recipe["granularity"]
    whole = "the feed-forward network of one of them" if several else "its feed-forward network"
    what = whole if parts == 1 else f"one of {parts} parts of {whole}"
    if first["num_redrawn"]:
        done = "noise added to" if recipe["method"] == "noise" else "redrawn"
        noise, each = done.startswith("noise"), " in each matrix" if recipe["drop_index"] == "per-matrix" else ""
        units = f"of {first['num_units']} units" + ("" if noise else f" {done}") + each
        redrawn = first["num_redrawn"] if isinstance(first["num_redrawn"], dict) else {"0": first["num_redrawn"]}
        numbers = by_layers([*redrawn.values()], [*map(int, redrawn)], units)
        what += f", with {f'{done} ' if noise else ''}{numbers} and the rest kept"
    said = [f"moetool made this model from {_listed(names)}: every expert began as {what}."]
    if whole := recipe.get("keep_experts_whole", 0):
        said.append(f"{whole} of {recipe['num_experts']} experts of each layer were kept whole, as plain copies.")
    if recipe["shared_experts"]:
        said.append("The shared expert is not included.")
    if parts > 1:
        said.append("Experts are compared with those of the same part: different parts share no units.")
    return said


def notes(first: Measured) -> dict[str, str]:
    """The note below each chart."""
    recipe, some = first["recipe"], bool(first["num_redrawn"])
    if recipe["method"] == "scratch":
        return {
            "between": "Mean over pairs of experts. They were drawn independently and begin near 0.",
            "dense": "",
            "use": "",
        }
    apart = " (those of two dense models: at the similarity of these)" if first["donors"] else ""
    noise = recipe["method"] == "noise"
    changed = "Units that one or both had changed begin" if noise else "Units that one or both had redrawn begin"
    lower = "below 1" if noise else "near 0, and stay there while experts learn different things"
    return {
        "between": "Mean over pairs of experts. "
        + (
            f"Units that both kept begin at 1{apart}, and training moves them apart. {changed} {lower}."
            if some
            else f"Copied experts begin at 1{apart}: only training can tell them apart."
        ),
        "dense": "Mean over experts. "
        + (
            "Kept units begin at 1; any drop below 1 is due to training. "
            + ("Units given noise begin below 1." if noise else "Redrawn units begin near 0, with no reason to return.")
            if some
            else "Copied experts begin at 1; any drop below 1 is due to training."
        ),
        "use": "Their share of what all units add to an expert's output, divided by their share of the units: 1 means"
        " as much as the kept units, 0 means nothing."
        + ("" if noise else " Newly redrawn units contribute little; successful training raises this."),
    }


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def change(first: Measured, second: Measured | None, *keys: str, share: bool = False) -> str | None:
    """A mean over layers, `0.28`, or with a second model `0.28 → 0.48`; None where it is not known."""
    values = [measured["mean"] for measured in (first, second) if measured]
    for key in keys:
        values = [value[key] for value in values]
    if values[0] is None:
        return None
    shown = [f"{100 * value:.0f} %" if share else f"{value:z.2f}" for value in values if value is not None]
    return " → ".join(shown)


def tiles(first: Measured, second: Measured | None) -> list[tuple[str, str]]:
    """(value, label) of each known figure."""
    redrawn, units = bool(first["num_redrawn"]), changed_units(first)
    found = [
        (change(first, second, "with_dense", "all"), "similarity of experts and the dense model"),
        (change(first, second, "with_dense", "kept") if redrawn else None, "the same, in the kept units only"),
        (change(first, second, "between_experts", "all"), "similarity of two experts"),
        (change(first, second, "use"), f"use of {units}; 1 is as much as the kept units"),
        (change(first, second, "idle", share=True), f"of {units} are nearly idle"),
    ]
    return [(value, label) for value, label in found if value is not None]


def similarity_series(
    first: Measured, second: Measured | None, side: str
) -> tuple[dict[str, list[float | None]], list[str]]:
    """Lines of a chart by layer, and which of them are dashed.

    Args:
        first: of the first model.
        second: of the second; its lines come first of each pair.
        side: `between_experts` or `with_dense`.
    """
    names = {"kept": "kept units", "all": "all weights", "redrawn": changed_units(first)}
    parts = names if first["num_redrawn"] else {"all": names["all"]}
    lines = {
        name: [[row[side][part] for row in model["layers"]] for model in _models(first, second, "layers")]
        for part, name in parts.items()
    }
    return _pairs(lines)


def use_series(first: Measured, second: Measured | None) -> tuple[dict[str, list[float | None]], list[str]]:
    """Lines of a chart of the use of changed units, one per domain, and which of them are dashed."""
    models = _models(first, second, "unit_use")
    lines = {name: [[row["use"] for row in model["unit_use"][name]] for model in models] for name in first["unit_use"]}
    return _pairs(lines)


def _models(first: Measured, second: Measured | None, key: str) -> list[Measured]:
    """The second model and the first, or the first alone."""
    return [second, first] if second and second[key] else [first]


def _pairs(lines: Mapping[str, list[list[float | None]]]) -> tuple[dict[str, list[float | None]], list[str]]:
    known = {name: pair for name, pair in lines.items() if any(value is not None for line in pair for value in line)}
    series = {name + (OLDER if i else ""): line for name, pair in known.items() for i, line in enumerate(pair)}
    return series, [name + OLDER for name, pair in known.items() if len(pair) > 1]
