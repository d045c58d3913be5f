"""PNG figures for papers, drawn only from report.json."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moetool.checkpoint.folder import UNFINISHED
from moetool.routing.html import visible
from moetool.routing.upcycling_page import changed_units, similarity_series, use_series

_DPI = 200
_SOMETIMES = ("saturation.png", "expert-similarity.png", "dense-similarity.png", "unit-use.png")
_STYLE: dict[str, Any] = {"linewidth": 1.6, "markersize": 3, "marker": "o"}


def draw_plots(report: dict[str, Any]) -> dict[str, bytes]:
    """Draw `mri.png`, `entropy.png` and one `load-<domain>.png` per domain.

    With a comparison also `saturation.png`; of an upcycled model `expert-similarity.png`,
    `dense-similarity.png` and `unit-use.png`, as far as they are known.

    Args:
        report: as `report.build_report` gives it.

    Returns:
        File name -> PNG.
    """
    with warnings.catch_warnings():
        # A name in a script that matplotlib's font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        return _draw(report)


def remove_stale(folder: Path, plots: Collection[str]) -> None:
    """Delete figures of an earlier report that are not in `plots`, and leftovers of a killed run."""
    for stale in (
        *folder.glob("load-*.png"),
        *(folder / name for name in _SOMETIMES),
        *folder.glob("*.png" + UNFINISHED),
    ):
        if stale.name not in plots:
            stale.unlink(missing_ok=True)


def _draw(report: dict[str, Any]) -> dict[str, bytes]:
    domains = report["domains"]
    layers = [row["layer"] for row in next(iter(domains.values()))["layers"]]
    balanced = report["top_k"] / report["num_experts"]
    plots = {
        "mri.png": _lines(layers, _columns(domains, "mri"), "MRI", balanced, (0, 1.03)),
        "entropy.png": _lines(layers, _columns(domains, "entropy"), "Entropy of the load", 1.0, (0, 1.03)),
    }
    for name, file_name in _file_names(domains).items():
        plots[f"load-{file_name}.png"] = _load(layers, domains[name]["layers"], name)
    if report["comparison"]:
        compared = report["comparison"]["domains"]
        series = _columns(compared, "saturation")
        plots["saturation.png"] = _lines(layers, series, "Router saturation", None, (0, 1.03))
    return plots | _upcycling(report, layers)


def _upcycling(report: dict[str, Any], layers: Sequence[int]) -> dict[str, bytes]:
    """What is known of the experts of an upcycled model; a model compared with is drawn solid, the first dashed."""
    first, second = report["upcycling"], (report["comparison"] or {}).get("upcycling")
    if not first:
        return {}
    plots = {}
    if first["layers"]:
        at = [row["layer"] for row in first["layers"]]
        sides = {"between_experts": ("expert-similarity.png", "Cosine of two experts")}
        if first["layers"][0]["with_dense"]:
            sides["with_dense"] = ("dense-similarity.png", "Cosine with the dense FFN")
        for side, (file, label) in sides.items():
            series, dashed = similarity_series(first, second, side)
            known = [value for line in series.values() for value in line if value is not None]
            if known:
                low = min(0.0, 1.1 * min(known))
                plots[file] = _lines(at, series, label, None, (low, 1.03), dashed)
    if first["unit_use"]:
        series, dashed = use_series(first, second)
        most = max((value for line in series.values() for value in line if value is not None), default=1.0)
        label = f"Use of the {changed_units(first)}"
        limits = (0, 1.06 * max(most, 1))
        plots["unit-use.png"] = _lines(layers, series, label, 1.0, limits, dashed, "as the kept units")
    return plots


def _columns(domains: Mapping[str, Any], measure: str) -> dict[str, list[float | None]]:
    return {name: [row[measure] for row in domain["layers"]] for name, domain in domains.items()}


def _file_names(domains: Mapping[str, Any]) -> dict[str, str]:
    """Domain -> a file name without characters that mean something in a path, unique in any case."""
    names: dict[str, str] = {}
    for domain in domains:
        plain = re.sub(r"[^\w.-]+", "_", domain).strip("._")[:60] or "domain"
        taken = {name.lower() for name in names.values()}
        numbered = (f"{plain}-{i}" for i in count(2))
        names[domain] = next(name for name in chain([plain], numbered) if name.lower() not in taken)
    return names


def plain_text(label: str) -> str:
    """A label as it is: a dollar sign would start a formula."""
    return visible(label).replace("$", r"\$")


def png(figure: Figure, dpi: int) -> bytes:
    """A figure as the bytes of a PNG, so that its file can be written whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, dpi=dpi, format="png")
    return image.getvalue()


def _new(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _lines(
    layers: Sequence[int],
    series: Mapping[str, Sequence[float | None]],
    label: str,
    reference: float | None,
    limits: tuple[float, float],
    dashed: Sequence[str] = (),
    reference_name: str = "balanced",
) -> bytes:
    """A figure of lines by layer; a dashed one has the colour of the one before it."""
    columns = 2 if dashed else 3
    rows = -(-(len(series) + (reference is not None)) // columns)
    figure, axes = _new(4.6, 2.6 + 0.18 * rows)  # the legend takes no height from the axes
    color = -1
    for name, values in series.items():
        color += name not in dashed
        points = [np.nan if value is None else value for value in values]
        style = "--" if name in dashed else "-"
        axes.plot(layers, points, style, color=f"C{color % 10}", label=plain_text(name), **_STYLE)
    if reference is not None:
        axes.axhline(reference, color="0.35", linewidth=1, linestyle=(0, (4, 3)), label=reference_name)
    axes.set(xlabel="Layer", ylabel=label, ylim=limits)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=8)
    return png(figure, _DPI)


def _load(layers: Sequence[int], rows: Sequence[Mapping[str, Any]], name: str) -> bytes:
    ratio_LE = np.array([row["load"] for row in rows]) * len(rows[0]["load"])
    L, E = ratio_LE.shape
    figure, axes = _new(min(max(2.6, 1.6 + 0.26 * E), 8), min(max(1.6, 1.1 + 0.17 * L), 8))
    image = axes.imshow(
        np.clip(ratio_LE, 1 / 8, 8), cmap="RdBu_r", norm=LogNorm(1 / 8, 8), aspect="auto", interpolation="nearest"
    )
    every = max(1, L // 12)
    axes.set_yticks(range(0, L, every), [str(layer) for layer in layers[::every]])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(E, 9)))
    axes.set(xlabel="Expert", ylabel="Layer", title=plain_text(name))
    axes.title.set_fontsize(10)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, ticks=[1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], pad=0.02)
    bar.ax.set_yticklabels(["≤1/8", "1/4", "1/2", "1", "2", "4", "≥8"], fontsize=8)
    bar.ax.minorticks_off()
    bar.set_label("Load / balanced load", fontsize=8)
    return png(figure, _DPI)
