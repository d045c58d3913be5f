"""Scores over training: one PNG per task, from checkpoints that record their training tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moetool.checkpoint.folder import write_file
from moetool.checkpoint.step_folder import STEPS, WEIGHTS
from moetool.lineage import last_entry
from moetool.routing.plots import plain_text, png


def training_tokens(folder: Path) -> tuple[str, int] | None:
    """The run that a checkpoint belongs to and the tokens it had seen; None if `cpt` did not make it.

    Args:
        folder: RUN, RUN/checkpoints/step-NNNNNN or RUN/weights/step-NNNNNN, with the lineage that `cpt` writes.
    """
    last = last_entry(folder)
    if last.get("command") != "cpt" or not isinstance(last.get("tokens"), int):
        return None
    resolved = folder.resolve()
    run = resolved.parent.parent if resolved.parent.name in (STEPS, WEIGHTS) else resolved
    return str(run), last["tokens"]


def write_plots(document: Mapping[str, Any], metrics: Mapping[str, str], folder: Path) -> list[str]:
    """Draw each task's score over training tokens, one line per run, the baseline dashed.

    Args:
        document: from `build_document`.
        metrics: task -> the metric to draw; by default the task's first.
        folder: created if there is anything to draw: two checkpoints of one run.

    Returns:
        The files.
    """
    runs: dict[str, list[tuple[int, str]]] = {}
    for model, path in document["models"].items():
        if (place := training_tokens(Path(path))) is not None:
            runs.setdefault(place[0], []).append((place[1], model))
    lines = {run: sorted(points) for run, points in runs.items() if len({tokens for tokens, _ in points}) > 1}
    files = []
    for task in dict.fromkeys(t for scores in document["results"].values() for t in scores) if lines else ():
        found = next(scores[task] for scores in document["results"].values() if task in scores)
        metric = metrics[task] if metrics.get(task) in found else next(iter(found))
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{task.replace('/', '__')}.png"
        write_file(file, png(_draw(document, lines, task, metric), 150))
        files.append(str(file))
    return files


def _draw(document: Mapping[str, Any], lines: Mapping[str, list[tuple[int, str]]], task: str, metric: str) -> Figure:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    names = [Path(run).name for run in lines]
    for run, points in lines.items():
        scores = [(tokens, document["results"][m].get(task, {}).get(metric)) for tokens, m in points]
        known = [(tokens, score) for tokens, score in scores if score]
        axes.errorbar(
            [tokens for tokens, _ in known],
            [score["value"] for _, score in known],
            yerr=[score["stderr"] or 0 for _, score in known],
            marker="o",
            capsize=2,
            label=plain_text("/".join(Path(run).parts[-1 if names.count(Path(run).name) == 1 else -2 :])),
        )
    base = document["results"].get(document["baseline"], {}).get(task, {}).get(metric)
    if base:
        axes.axhline(base["value"], linestyle="--", color="grey", label=plain_text(document["baseline"]))
    name, _, filter_name = metric.partition(",")
    label = name if filter_name == "none" else f"{name} ({filter_name})"
    axes.set(xlabel="tokens", ylabel=plain_text(label), title=plain_text(task))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
