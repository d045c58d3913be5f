"""`moetool average`: the weighted mean of checkpoints of one model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moetool.average.recipe import AverageRecipe
from moetool.commands.console import Console
from moetool.commands.options import Output
from moetool.commands.plan_table import describe_files, file_rows, two_columns
from moetool.commands.proof import Writing, carry_out, closing
from moetool.lineage import lineage_entries
from moetool.option import option
from moetool.values import parse_size

if TYPE_CHECKING:
    from rich.table import Table

    from moetool.surgery.plan import Plan
    from moetool.surgery.sources import Sources


@dataclass(frozen=True)
class Checkpoints:
    """The folder that is written, and the checkpoints that are read."""

    out: Path = option("The folder to write.", positional=True, metavar="OUT")
    checkpoint: Sequence[str] = option(
        "Checkpoints of one model: folders, or owner/name\\[@revision]. The folder of a moetool cpt run stands for all"
        " its snapshots (--keep-weights) or, without snapshots, its step folders.",
        positional=True, metavar="CHECKPOINT...",
    )  # fmt: skip
    last: int | None = option(
        "Use only the last N snapshots or step folders of each run.", None, shown="all", min=1, metavar="N"
    )


def average(
    context: typer.Context, models: Checkpoints, options: AverageRecipe, writing: Writing, output: Output
) -> dict[str, Any]:
    """Average checkpoints of one model.

    Averaging the last checkpoints of a run replaces most of a learning-rate decay. The fp32 weights of step
    folders are used; sums are computed in fp64 and rounded once. The result is a standard Hugging Face
    checkpoint, written with bounded memory. A killed run leaves nothing that loads, and the same command
    finishes it.
    """
    from moetool.average.checkpoints import expand, in_order
    from moetool.average.plan import OPERATION, plan_average
    from moetool.surgery.sources import open_sources

    console = Console(context, output.json, output.quiet)
    started = time.perf_counter()
    names = expand(models.checkpoint, models.last)
    opened = context.with_resource(open_sources(names, models.out, writing.plan, reader=OPERATION.reader({})))
    sources, recipe = in_order(opened, options)
    plan = plan_average(sources.readers, recipe, parse_size(writing.max_shard_size))
    document = describe(plan, sources, recipe, models.out, writing.num_workers)
    if len(sources.readers) == 1:
        console.warn(f"only {sources.names[0]} is averaged, so the result is a copy of it; give more checkpoints")
    elif not all(lineage_entries(reader.folder) for reader in sources.readers):
        console.warn(
            "no moetool.json says that these checkpoints come from one model; a mean of different models is not usable"
        )
    if writing.plan:
        console.result(document, table(document))
        return document
    carry_out(plan, sources, models.out, writing, started, document, context, console)
    console.result(document, table(document), closing(document))
    return document


def describe(plan: Plan, sources: Sources, recipe: AverageRecipe, out: Path, workers: int) -> dict[str, Any]:
    """The plan as `--json` gives it."""
    from moetool.average.checkpoints import tokens_trained
    from moetool.average.recipe import coefficients

    weights = coefficients(recipe.weights, len(sources.readers))
    return {
        "out": str(out),
        "family": plan.config.get("model_type"),
        "recipe": dict(plan.recipe),
        "checkpoints": [
            {
                "name": name,
                "tokens": tokens_trained(lineage_entries(reader.folder)),
                "weight": weight / sum(weights),
                "fp32": bool(getattr(reader, "masters", None)),
            }
            for name, reader, weight in zip(sources.names, sources.readers, weights, strict=True)
        ],
        **describe_files(plan, out, workers),
    }


def table(document: dict[str, Any]) -> Table:
    """The plan for people."""
    found = document["checkpoints"]
    shown = [f"{one['name']} x {one['weight']:.3f}" for one in found]
    exact = sum(one["fp32"] for one in found)
    rows = {
        "family": str(document["family"]),
        "mean of": ", ".join(shown if len(shown) <= 12 else [*shown[:5], f"... {len(shown) - 10} more", *shown[-5:]]),
        "from": f"fp32 weights of {exact} step folders" if exact else "the saved weights",
    }
    if 0 < exact < len(found):
        rows["from"] += f", saved weights of {len(found) - exact} others"
    return two_columns(rows | file_rows(document))
