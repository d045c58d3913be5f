"""The table of `moetool eval`: models side by side, or one below the other if there are many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from moetool.commands.console import escape

SIDE_BY_SIDE = 3  # models that fit beside each other on 80 columns


def score_table(result: dict[str, Any], suite: Any) -> Table:
    """Scores with standard errors and, beside a baseline, the differences to it.

    Args:
        result: the document that `moetool eval` returns.
        suite: chooses the metric shown for each of its tasks; None shows all metrics of all tasks.
    """
    baseline, models = result["baseline"], list(result["models"])
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    many = len(models) > SIDE_BY_SIDE
    if many:
        for title in ("model", "score", f"- {baseline}")[: 2 if baseline is None else 3]:
            table.add_column(escape(title), justify="left" if title == "model" else "right", overflow="fold")
        for task, metric, scores in _rows(result, suite):
            for model in models:
                if score := scores.get(model):
                    difference = [] if baseline is None else [_number(score.get("difference"), signed=True)]
                    table.add_row(escape(task), escape(metric), escape(model), _number(score), *difference)
    else:
        for model in models:
            table.add_column(escape(model), justify="right", overflow="fold")
        for task, metric, scores in _rows(result, suite):
            table.add_row(escape(task), escape(metric), *(_cell(scores.get(model)) for model in models))
    if baseline is not None:
        where = "last column" if many else "second lines"
        table.caption = (
            f"{where}: difference from {escape(baseline)}, paired over the same documents;"
            " *: larger than two standard errors"
        )
        table.caption_justify = "left"
    return table


def _rows(result: dict[str, Any], suite: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Task, metric, and the score of each model that has one."""
    scores = result["results"]
    shown = {b.task: b.metric for b in suite.benchmarks} if suite else {}
    for task in dict.fromkeys(task for tasks in scores.values() for task in tasks):
        metrics = {model: tasks.get(task, {}) for model, tasks in scores.items()}
        for key in dict.fromkeys(key for found in metrics.values() for key in found):
            if shown.get(task, key) != key:
                continue
            cells = {model: found[key] for model, found in metrics.items() if key in found}
            name, _, filter_name = key.partition(",")
            arrow = {True: " ↑", False: " ↓"}.get(next(iter(cells.values()))["higher_is_better"], "")
            yield task, name + ("" if filter_name == "none" else f" ({filter_name})") + arrow, cells
        layers = {model: routed[task]["layers"] for model, routed in result["routing"].items() if task in routed}
        if layers:
            mean = {model: sum(row["mri"] for row in rows) / len(rows) for model, rows in layers.items()}
            yield task, "mri (mean)", {model: {"value": value, "stderr": None} for model, value in mean.items()}
    for name, averages in result["averages"].items():
        number = next((average["num_tasks"] for average in averages.values()), 0)
        yield f"average of {name}", f"{number} tasks", averages


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    return "\n".join([_number(score), *([_number(score["difference"], signed=True)] if "difference" in score else [])])


def _number(score: dict[str, Any] | None, signed: bool = False) -> str:
    if score is None:
        return "-"

    def plain(value: float, sign: str = "") -> str:
        return f"{value:{sign}.4f}" if abs(value) < 10_000 else f"{value:{sign}.4g}"

    error = "" if score["stderr"] is None else f"±{plain(score['stderr'])}"
    return plain(score["value"], "+" if signed else "") + error + (" *" if score.get("outside_noise") else "")
