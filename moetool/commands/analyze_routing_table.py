"""The output of analyze-routing: a table of layers, and the verdict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table
from rich.text import Text

from moetool.commands.console import escape
from moetool.routing.lined_up import how_lined_up

_TONE = {"balanced": "green", "skewed": "yellow", "collapsed": "red"}


def table(report: dict[str, Any], width: int) -> Table:
    """One row per layer, for the domain with its largest mri; narrow terminals get fewer columns."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "mri": lambda row: f"{row['mri']:.3f}",
        "x bal.": lambda row: f"{row['mri_normalized']:.2f}",
        "entropy": lambda row: f"{row['entropy']:.3f}",
        "dead": lambda row: str(len(row["dead_experts"])),
    }
    if width < 50:
        del columns["x bal."]
    many = len(report["domains"]) > 1
    shown = Table(box=None, pad_edge=False, header_style="dim")
    shown.add_column("layer", justify="right", no_wrap=True)
    if many:
        shown.add_column("worst on", no_wrap=True, overflow="ellipsis", max_width=max(8, width - 48))
    for title in columns:
        shown.add_column(title, justify="right", no_wrap=True)
    if width >= 60:
        shown.add_column("", no_wrap=True)
    for place, level in enumerate(report["verdict"]["layers"]):
        rows = [(name, domain["layers"][place]) for name, domain in report["domains"].items()]
        name, row = max(rows, key=lambda pair: pair[1]["mri"])
        cells: list[str | Text] = [
            str(row["layer"]),
            *([escape(name)] if many else []),
            *(cell(row) for cell in columns.values()),
        ]
        if width >= 60:
            cells.append(f"[{_TONE[level]}]{'█' * max(1, round(row['mri'] * 12))}[/]")
        shown.add_row(*cells)
    return shown


def summary(report: dict[str, Any], page: str) -> str:
    """The verdict and other findings, in sentences, and the path of the report page."""
    verdict = report["verdict"]
    head, colon, rest = verdict["title"].partition(":")
    lines = [f"\n[bold {_TONE[verdict['level']]}]{head}[/]{colon}{escape(rest)}", *map(escape, verdict["findings"])]
    if report["comparison"]:
        rows = [row for domain in report["comparison"]["domains"].values() for row in domain["layers"]]
        kept = sum(row["saturation"] for row in rows) / len(rows)
        lines.append(f"{kept:.0%} of the expert choices are the same in {escape(report['comparison']['model'])}.")
        if report["comparison"]["experts"]:
            lines.append(escape(" ".join(how_lined_up(report))))
    if report["upcycling"]:
        lines.append(escape(_experts(report)))
    return "\n".join([*lines, f"The report is in {escape(page)}"])


def _experts(report: dict[str, Any]) -> str:
    """The measurements on the experts of an upcycled model, in one or two sentences."""
    from moetool.routing.upcycling_page import change, changed_units

    first, second = report["upcycling"], (report["comparison"] or {}).get("upcycling")
    alike = change(first, second, "between_experts", "all")
    dense, kept = (change(first, second, "with_dense", part) for part in ("all", "kept"))
    use, idle = change(first, second, "use"), change(first, second, "idle", share=True)
    said = [
        f"Similarity: {alike} between experts" if alike else None,
        f"{dense} with the dense model" if dense else None,
        f"{kept} in the kept units" if dense and kept and first["num_redrawn"] else None,
    ]
    sentences = [", ".join(part for part in said if part)] if alike else []
    if use:
        sentences.append(f"Use of the {changed_units(first)} (1: like the kept units): {use}; {idle} are nearly idle")
    return " ".join(f"{sentence}." for sentence in [*sentences, *([] if sentences else first["notes"])])
