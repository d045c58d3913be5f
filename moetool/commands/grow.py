"""`moetool grow`: more experts, copies of those that a model has."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moetool.commands.console import Console
from moetool.commands.options import Output
from moetool.commands.plan_table import describe_files, file_rows, two_columns
from moetool.commands.proof import Folders, Writing, carry_out, closing
from moetool.grow.recipe import GrowRecipe
from moetool.values import parse_size

if TYPE_CHECKING:
    from rich.table import Table

    from moetool.grow.plan import Growth


def grow(
    context: typer.Context, models: Folders, asked: GrowRecipe, writing: Writing, output: Output
) -> dict[str, Any]:
    """Give a Mixture of Experts more experts: copies of those that it has, with their router rows.

    With --start double-k and sleeping, the result computes exactly what the model does. Training makes the
    copies of sleeping and twins different. The result is a standard Hugging Face checkpoint, written with
    bounded memory. A killed run leaves nothing that loads, and the same command finishes it.
    """
    from moetool.grow.plan import plan_growth
    from moetool.surgery.sources import open_sources

    console = Console(context, output.json, output.quiet)
    started = time.perf_counter()
    sources = context.with_resource(open_sources([models.model], models.out, writing.plan))
    growth = plan_growth(sources.readers, asked, parse_size(writing.max_shard_size))
    document = describe(growth, models.out, writing.num_workers)
    if asked.start == "twins":
        before, after = growth.used
        console.warn(
            f"--start twins changes what the model computes: a copy has the score of its original, so a token's"
            f" {growth.recipe.top_k} experts are copies of as few as {after} of those that it went to ({before}); the"
            " loss rises at once, and training must bring it back"
        )
    if asked.start == "double-k":
        console.warn(
            "with --start double-k, copies are chosen for the same tokens with the same weights, so training keeps"
            " them the same; use sleeping or twins unless something else parts them"
        )
    if writing.plan:
        console.result(document, table(document))
        return document
    carry_out(growth.plan, sources, models.out, writing, started, document, context, console)
    console.result(document, table(document), closing(document))
    return document


def describe(growth: Growth, out: Path, workers: int) -> dict[str, Any]:
    """The plan as `--json` gives it."""
    plan, source, recipe = growth.plan, growth.source, growth.recipe
    return {
        "out": str(out),
        "family": plan.config.get("model_type"),
        "recipe": {key: value for key, value in plan.recipe.items() if key != "experts"},
        "num_experts": {"before": source.num_experts, "after": recipe.num_experts},
        "top_k": {"before": source.top_k, "after": recipe.top_k},
        "experts_used": {"before": growth.used[0], "after": growth.used[1]},
        "exact": recipe.start != "twins",
        **describe_files(plan, out, workers),
    }


def table(document: dict[str, Any]) -> Table:
    """The plan for people."""
    experts, top_k, recipe = document["num_experts"], document["top_k"], document["recipe"]
    same = "computes what the model does" if document["exact"] else "computes something else than the model"
    asleep = f", copies sleep for {recipe['wake_after']} steps of loss-free" if recipe["wake_after"] else ""
    rows = {
        "family": str(document["family"]),
        "experts": f"{experts['before']} -> {experts['after']} per layer,"
        f" top-{top_k['before']} -> top-{top_k['after']}",
        "start": f"{recipe['start']}{asleep}; {same}",
    }
    return two_columns(rows | file_rows(document))
