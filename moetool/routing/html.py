"""report.html: one file that opens offline, drawn only from report.json.

Names and tokens come from outside: the template escapes every value (autoescape), control characters
are written out, and the embedded JSON cannot close its element.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moetool import __version__
from moetool.layers import evenly
from moetool.outside import safe_json, templates
from moetool.routing.coactivation import MATRIX_EXPERTS
from moetool.routing.levels import DEAD_LOAD
from moetool.routing.lined_up import copies_in_words, how_lined_up, listed
from moetool.routing.upcycling_page import beginning, changed_units, notes, similarity_series, tiles, use_series

# The page shows the tokens of so many experts at most; report.json has all.
_TOKEN_CELLS = 400
# So many experts of a text have colours (report.css) that everyone can tell apart.
TEXT_COLOURS = 8


def render(report: dict[str, Any]) -> str:
    """Draw the page.

    Args:
        report: as `report.build_report` gives it, or as read back from report.json.
    """
    from markupsafe import Markup

    environment = templates(Path(__file__).parent / "templates")
    environment.policies["json.dumps_kwargs"] = {}  # keys in their order
    environment.filters |= {"visible": visible, "percent": percent, "number": number, "heat": heat}
    environment.globals |= {"line_chart": line_chart, "bars": bars, "column": column, "drift_series": drift_series}
    environment.globals |= {"upcycling_tiles": tiles, "similarity_series": similarity_series, "use_series": use_series}
    environment.globals |= {"how_lined_up": how_lined_up, "copies_in_words": copies_in_words, "listed": listed}
    environment.globals |= {"beginning": beginning, "chart_notes": notes, "changed_units": changed_units}
    drawn = report["coactivation"] and report["num_experts"] <= MATRIX_EXPERTS
    matrices = list(report["coactivation"].values()) if drawn else None  # in the order of the picker
    return environment.get_template("report.html.j2").render(
        report=report,
        version=__version__,
        dead_load=DEAD_LOAD,
        layers=[row["layer"] for row in next(iter(report["domains"].values()))["layers"]],
        balanced_load=1 / report["num_experts"],
        balanced_mri=report["top_k"] / report["num_experts"],
        full=min(max(report["num_experts"] / report["top_k"], 2), 8),
        bar_height=_largest_load(report),
        label_every=1 if report["num_experts"] <= 24 else report["num_experts"] // 8,
        coactivation_json=Markup(safe_json(matrices)),
        text_colours=TEXT_COLOURS,
        text_json=Markup(safe_json(_visible_text(report.get("text")))),
        shown_tokens=max(
            (len(one["tokens"]) for one in report.get("text", {"domains": {}})["domains"].values()), default=0
        ),
        token_layers=_token_layers(report),
    )


def visible(text: Any) -> str:
    """Text with its control characters, direction marks and surrounding spaces made visible."""
    shown = "".join(_visible_character(character) for character in str(text))
    return shown if shown.strip() == shown else shown.replace(" ", "␣")


def _visible_character(character: str) -> str:
    if character in "\n\t\r":
        return {"\n": "↵", "\t": "⇥", "\r": "␍"}[character]
    if unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"):
        return f"\\u{ord(character):04x}"
    return character


def _visible_text(text: dict[str, Any] | None) -> dict[str, Any] | None:
    """The report's `text` as the page shows it."""
    if text is None:
        return None
    domains = {
        visible(name): {**domain, "tokens": [visible(token) for token in domain["tokens"]]}
        for name, domain in text["domains"].items()
    }
    return {**text, "domains": domains}


def percent(value: float | None) -> str:
    """`42 %`, with a decimal below twenty where there is one: `12.5 %`."""
    if value is None:
        return "–"
    digits = 0 if value >= 0.2 or round(value * 1000) % 10 == 0 else 1
    return f"{value * 100:.{digits}f}\u00a0%"  # one that does not break


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def heat(ratio: float, full: float) -> str:
    """Class and strength of a heatmap cell: `hot` above 1, `cold` below, strongest at a factor of `full`."""
    strength = min(abs(math.log(max(ratio, 1e-9))) / math.log(full), 1)
    strong = " strong" if strength > 0.6 else ""
    return f'class="{"hot" if ratio >= 1 else "cold"}{strong}" style="--p:{strength * 100:.0f}%"'


def column(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """One measure of all layers."""
    return [row[name] for row in rows]


def drift_series(drift: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The layers whose drift is known, and the lines of the chart."""
    rows = [row for row in drift if row["router"] is not None and None not in row["experts"]]
    return {
        "layers": column(rows, "layer"),
        "series": {
            "router": column(rows, "router"),
            "experts, mean": [sum(row["experts"]) / len(row["experts"]) for row in rows],
            "expert that moved most": [max(row["experts"]) for row in rows],
        },
    }


# The inside of a line chart in the units of its viewBox; labels lie around it.
_LEFT, _TOP, _WIDTH, _HEIGHT = 38, 12, 432, 150


def line_chart(
    layers: Sequence[int],
    series: Mapping[str, Sequence[float | None]],
    low: float,
    high: float | None = None,
    reference: float | None = None,
) -> dict[str, Any]:
    """Geometry of a chart of measures by layer.

    Args:
        layers: layer indices, along x.
        series: name -> one value per layer; None leaves a gap.
        low: the axis' lower end.
        high: its upper end; None takes the largest value, rounded up.
        reference: a value that the axis has to reach, too.
    """
    values = [value for line in series.values() for value in line if value is not None]
    top = high if high is not None else _round_up(max([*values, low + 1e-3, reference or low]), low)
    step: float = _WIDTH / max(len(layers) - 1, 1)

    def x(i: int) -> float:
        return round(_LEFT + (i * step if len(layers) > 1 else _WIDTH / 2), 1)

    def y(value: float) -> float:
        return round(_TOP + _HEIGHT * (1 - (min(max(value, low), top) - low) / (top - low)), 1)

    lines = [
        {
            "name": name,
            "points": " ".join(f"{x(i)},{y(value)}" for i, value in enumerate(line) if value is not None),
            "dots": [
                {"x": x(i), "y": y(value), "layer": layers[i], "value": value}
                for i, value in enumerate(line)
                if value is not None
            ],
        }
        for name, line in series.items()
    ]
    every = max(1, math.ceil(len(layers) / 12))
    return {
        "left": _LEFT,
        "right": _LEFT + _WIDTH,
        "bottom": _TOP + _HEIGHT,
        "lines": lines,
        "y": y,
        "x_ticks": [{"x": x(i), "label": layer} for i, layer in enumerate(layers) if i % every == 0],
        "y_ticks": [{"y": y(v), "label": f"{v:.3g}"} for v in (low + (top - low) * part / 4 for part in range(5))],
    }


def _round_up(value: float, low: float) -> float:
    span = max(value - low, 1e-3)
    unit = 10 ** math.floor(math.log10(span))
    return low + next(float(unit * step) for step in (1, 1.2, 1.6, 2, 3, 4, 6, 8, 10) if unit * step >= span * 0.999)


def bars(loads: Sequence[Sequence[float]], top: float, width: float = 240, height: float = 72) -> list[str]:
    """SVG paths of a layer's load bars, one path per domain, the domains of an expert side by side."""
    E, D = len(loads[0]), len(loads)
    slot = width / E
    bar = slot * (0.8 if E <= 64 else 1) / D
    return [
        "".join(
            f"M{e * slot + d * bar:.2f} {height}v{-height * min(value / top, 1):.2f}h{bar:.2f}V{height}z"
            for e, value in enumerate(load_E)
        )
        for d, load_E in enumerate(loads)
    ]


def _largest_load(report: dict[str, Any]) -> float:
    loads = [max(row["load"]) for domain in report["domains"].values() for row in domain["layers"]]
    return float(max(*loads, 1.5 / report["num_experts"]))


def _token_layers(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers whose tokens are shown: all, or as many as fit, evenly spread."""
    if not report["vocabulary_specialization"]:
        return []
    rows = report["vocabulary_specialization"]["layers"]
    return evenly(rows, max(1, _TOKEN_CELLS // report["num_experts"]))
