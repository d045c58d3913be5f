"""The page of a plan: one file that opens offline, drawn only from its document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moetool import __version__
from moetool.amounts import amount, count, size
from moetool.budget.commands import LR
from moetool.outside import templates

# The inside of a chart in the units of its viewBox; labels lie around it.
LEFT, TOP, WIDTH, HEIGHT = 44, 16, 560, 220
BARS = 24  # at most
KINDS = ("weights", "gradients", "optimizer", "activations")
CURVES = {"dense": "dense model, trained further", "upcycled": "upcycled copies", "scratch": "from scratch"}


def render(found: Mapping[str, Any]) -> str:
    """Draw the page.

    Args:
        found: the document of a plan.
    """
    environment = templates(Path(__file__).parent / "templates")
    environment.filters |= {"count": count, "size": size, "amount": amount, "tokens": tokens}
    return environment.get_template("plan.html.j2").render(
        plan=found,
        version=__version__,
        chart=curves(found["law"], found["train_tokens"]) if found["law"]["inside"] else None,
        bars=memory_bars(found["dense_meshes"] or found["meshes"], found["cluster"]),
        meshes=found["dense_meshes"] or found["meshes"],
        disk=found["dense_disk"] if found["recommended"]["way"] == "dense" else found["disk"],
        kinds=KINDS,
        lr=LR,
        scatters=scatters(found["sweep"]),
    )


def tokens(number: float | None) -> str:
    """About how many tokens, or never."""
    if number is None:
        return "never"
    unit, divisor = next(((u, d) for u, d in (("T", 1e12), ("B", 1e9)) if number >= d), ("M", 1e6))
    return f"{float(f'{number / divisor:.2g}'):g} {unit}"


def curves(law: Mapping[str, Any], train_tokens: float) -> dict[str, Any]:
    """Geometry of the curves of the law: loss against training tokens, on a logarithmic axis.

    Args:
        law: of the document, inside its range.
        train_tokens: of the planned training.
    """
    found = law["curves"]
    start = law["verdict"]["start"]
    at = found["tokens"]
    low, high = math.log10(at[0]), math.log10(at[-1])
    values = [value for name in CURVES for value in found[name]]
    bottom, top = min(values) - 0.02, min(max(values), start + 0.8)

    def x(number: float) -> float:
        place = (math.log10(number) - low) / (high - low)
        return round(LEFT + WIDTH * min(max(place, 0.0), 1.0), 1)

    def y(value: float) -> float:
        return round(float(TOP + HEIGHT * (top - min(max(value, bottom), top)) / (top - bottom)), 1)

    fitted = law["range"]["train_tokens"]
    verdict = law["verdict"]
    marks = [
        ("copies pass the original dense model", verdict["break_even"], start),
        ("copies pass the dense model trained on as many tokens", verdict["beats_dense"], None),
        ("from scratch passes copies", verdict["scratch_wins"], None),
    ]
    crossings = []
    for name, number, value in marks:
        if number is not None and at[0] <= number <= at[-1]:
            between = _at(at, found["upcycled"], number) if value is None else value
            beyond = "" if number <= fitted[1] else ", which is outside the range"
            crossings.append({"x": x(number), "y": y(between), "name": name, "tokens": number, "beyond": beyond})
    return {
        "left": LEFT, "right": LEFT + WIDTH, "top": TOP, "bottom": TOP + HEIGHT,
        "lines": [
            {"name": title, "points": " ".join(f"{x(n)},{y(v)}" for n, v in zip(at, found[name], strict=True))}
            for name, title in CURVES.items()
        ],
        "start": y(start),
        "fitted": {"x": x(fitted[0]), "width": round(x(fitted[1]) - x(fitted[0]), 1)},
        "planned": x(train_tokens),
        "crossings": crossings,
        "x_ticks": [{"x": x(n), "label": tokens(n)} for n in (1e9, 1e10, 1e11, 1e12)],
        "y_ticks": [{"y": y(v), "label": f"{v:.2f}"} for v in (bottom + (top - bottom) * i / 4 for i in range(5))],
    }  # fmt: skip


def _at(places: Sequence[float], values: Sequence[float], number: float) -> float:
    """A curve between two of its points."""
    after = next(i for i, place in enumerate(places) if place >= number)
    if after == 0:
        return values[0]
    share = math.log(number / places[after - 1]) / math.log(places[after] / places[after - 1])
    return values[after - 1] + share * (values[after] - values[after - 1])


def memory_bars(meshes: Mapping[str, Any], cluster: Mapping[str, Any]) -> dict[str, Any]:
    """Bars of the memory that each mesh needs of a GPU, those that fit first.

    Args:
        meshes: of the document.
        cluster: of the document.
    """
    rows = [*meshes["fitting"], *meshes["others"]]
    shown = rows[:BARS]
    top = max([cluster["memory"], *(min(one["memory"]["total"], 2.5 * cluster["memory"]) for one in shown)])
    width = 420

    def across(number: float) -> float:
        return round(float(width * min(number / top, 1)), 1)

    bars = []
    for number, one in enumerate(shown):
        start, parts = 0.0, []
        for index, kind in enumerate(KINDS):
            end = start + one["memory"][kind]
            parts.append({"x": across(start), "width": round(across(end) - across(start), 1), "s": index})
            start = end
        total = one["memory"]["total"]
        label = f"{one['mesh']}, micro-batch {one['micro_batch_size']}"
        bars.append({"y": 22 * number, "label": label, "parts": parts, "total": total, "fits": one["fits"]})
    return {
        "bars": bars, "height": 22 * len(bars), "width": width, "room": across(cluster["room"]),
        "memory": across(cluster["memory"]), "left_out": len(rows) - len(shown),
    }  # fmt: skip


def scatters(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A sweep's plans as dots: GPU-hours against memory, and against the predicted loss where there is one.

    Args:
        rows: of the document.
    """
    made = []
    for name, title, scale in (("memory", "GB of a GPU", 1e9), ("loss", "predicted loss, nats", 1.0)):
        there = [row for row in rows if not row["error"] and row[name] is not None]
        if not there:
            continue
        xs, ys = [row["gpu_hours"] for row in there], [row[name] / scale for row in there]
        x, y = _axis(xs, LEFT, WIDTH), _axis(ys, TOP + HEIGHT, -HEIGHT)
        made.append({
            "title": title, "left": LEFT, "right": LEFT + WIDTH, "top": TOP, "bottom": TOP + HEIGHT,
            "dots": [
                {
                    "x": x(a),
                    "y": y(b),
                    "left": x(a) > LEFT + WIDTH / 2,
                    "fits": row["fits"],
                    "label": ", ".join(f"{k} {v}" for k, v in row["settings"].items()),
                }
                for row, a, b in zip(there, xs, ys, strict=True)
            ],
            "x_ticks": list({amount(v): {"x": x(v), "label": amount(v)} for v in (min(xs), max(xs))}.values()),
            "y_ticks": list({f"{v:.3g}": {"y": y(v), "label": f"{v:.3g}"} for v in (min(ys), max(ys))}.values()),
        })  # fmt: skip
    return made


def _axis(values: Sequence[float], start: float, length: float) -> Any:
    low, high = min(values), max(values)
    if high - low < 0.02 * high:  # as good as the same: in the middle
        low, high = low - 0.5, high + 0.5
    span = high - low

    def place(value: float) -> float:
        return round(start + length * (0.05 + 0.9 * (value - low) / span), 1)

    return place
