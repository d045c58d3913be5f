"""`moetool grow`: more experts, as copies of existing ones."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moetool.commands.console import Console, size
from moetool.commands.memory_estimate import estimated, tell_calibration
from moetool.commands.options import Output
from moetool.commands.plan_table import describe_files, file_rows, loss_rows, two_columns
from moetool.commands.proof import Folders, Writing, carry_out, closing
from moetool.errors import ConfigError
from moetool.grow.recipe import GrowRecipe, GrowTexts
from moetool.values import parse_size

if TYPE_CHECKING:
    from rich.table import Table

    from moetool.checkpoint.reader import CheckpointReader
    from moetool.grow.plan import Growth


@dataclass(frozen=True)
class Measured:
    """Measurements on the texts; empty without texts.

    Attributes:
        utilities: layer -> of each expert.
        experts: layer -> the expert before of each expert after; None: they are copied in turn.
        data: SHA-256 of each text that they were chosen on.
        losses: before growing, of each --val.
        estimate: of the memory that it took.
    """

    utilities: Mapping[int, Sequence[float]] = field(default_factory=dict)
    experts: Mapping[int, Sequence[int]] | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    estimate: str = ""


def grow(
    context: typer.Context, models: Folders, options: GrowRecipe, run: GrowTexts, writing: Writing, output: Output
) -> dict[str, Any]:
    """Add experts to a Mixture of Experts, as copies of existing ones with their router rows.

    With --start double-k or sleeping, the result computes exactly what the model does. With sleeping and twins,
    training makes the copies diverge. If MODEL is a step folder of moetool cpt, the optimizer's moments are kept
    for cpt --keep-optimizer. The result is a standard Hugging Face checkpoint, written with bounded memory. A
    killed run leaves nothing that loads, and the same command finishes it.
    """
    from moetool.checkpoint.step_folder import TrainingReader
    from moetool.grow.plan import plan_growth
    from moetool.surgery.sources import open_sources

    if bool(run.data) != (options.utility != "none"):
        raise typer.BadParameter(
            "--data has no effect without --utility frequency, gate or gradient"
            if run.data
            else f"--utility {options.utility} needs a text to measure the experts on: give --data NAME=PATH"
        )
    console = Console(context, output.json, output.quiet)
    started, texts = time.perf_counter(), bool(run.data or run.val)
    headers_only = writing.plan and not texts
    sources = context.with_resource(open_sources([models.model], models.out, headers_only, reader=TrainingReader))
    measured = _measure(sources.readers[0], models.out, options, run, writing, console) if texts else Measured()
    max_size = parse_size(writing.max_shard_size)
    growth = plan_growth(sources.readers, options, max_size, measured.experts, measured.data)
    document = describe(growth, measured, models.out, writing.num_workers)
    for warning in warnings(growth):
        console.warn(warning)
    if writing.plan:
        console.result(document, table(document))
        return document
    if isinstance(sources.readers[0], TrainingReader):
        sources.readers[0].check_state()
    carry_out(growth.plan, sources, models.out, writing, started, document, context, console)
    for name, loss in _losses(models.out, run, measured, console).items():
        document["val"][name]["after"] = loss
    console.result(document, table(document), closing(document))
    return document


def _measure(
    reader: CheckpointReader, out: Path, options: GrowRecipe, run: GrowTexts, writing: Writing, console: Console
) -> Measured:
    """Run the texts through the model, once all that can be known before is found to be right."""
    from moetool.calibration.measure import load, losses, read_texts
    from moetool.checkpoint.writer import check_out
    from moetool.grow.plan import settle
    from moetool.grow.utility import most_useful, utilities
    from moetool.surgery.experts import open_moe
    from moetool.surgery.lineage import recorded

    source = open_moe(reader, "grown")
    settle(source, options)
    if not writing.plan and not writing.overwrite:
        check_out(out, "grow")
    if options.utility == "gradient" and run.stream:
        raise ConfigError("--utility gradient needs the whole model in memory; leave --stream out")
    estimate = tell_calibration(console, reader.folder, run)
    if options.utility == "gradient":
        estimate += f", and {size(4 * source.num_routed)} for gradients"
        console.say(f"[dim]gradients of the experts take {size(4 * source.num_routed)} more[/dim]")
    with console.progress() as progress, estimated(estimate):
        known = recorded(out)
        texts, validation = (read_texts(named, reader.folder, run, progress, known) for named in (run.data, run.val))
        model = load(reader.folder, run)
        found = utilities(options.utility, model, reader.folder, texts, run, progress) if texts else {}
        before = losses(model, validation, run, progress)
    return Measured(
        {layer: utility_E.tolist() for layer, utility_E in found.items()},
        {layer: most_useful(utility_E, options.num_experts) for layer, utility_E in found.items()},
        {name: text.manifest["sha256"] for name, text in texts.items()},
        before,
        estimate,
    )


def _losses(out: Path, run: GrowTexts, measured: Measured, console: Console) -> dict[str, float]:
    """The losses of the result on each --val."""
    from moetool.calibration.measure import load, losses, read_texts

    if not run.val:
        return {}
    with console.progress() as progress, estimated(measured.estimate):
        return losses(load(out, run), read_texts(run.val, out, run, progress), run, progress)


def describe(growth: Growth, measured: Measured, out: Path, workers: int) -> dict[str, Any]:
    """The plan as `--json` gives it."""
    plan, source, recipe = growth.plan, growth.source, growth.recipe
    rows = [
        {"layer": layer, "utility": list(utility), "copies": [chosen.count(e) - 1 for e in range(source.num_experts)]}
        for layer, utility in measured.utilities.items()
        if (chosen := list(growth.experts[layer]))
    ]
    return {
        "out": str(out),
        "family": plan.config.get("model_type"),
        "recipe": {key: value for key, value in plan.recipe.items() if key not in ("experts", "training_state")},
        "num_experts": {"before": source.num_experts, "after": recipe.num_experts},
        "top_k": {"before": source.top_k, "after": recipe.top_k},
        "experts_used": {"before": growth.used[0], "after": growth.used[1]},
        "exact": recipe.start != "twins",
        "training_state": plan.recipe["training_state"],
        "layers": rows,
        "val": {name: {"before": loss, "after": None} for name, loss in measured.losses.items()},
        **describe_files(plan, out, workers),
    }


def warnings(growth: Growth) -> list[str]:
    """The cost of the start, and state that is not kept."""
    from moetool.checkpoint.step_folder import TrainingReader

    told, reader = [], growth.source.reader
    if growth.recipe.start == "twins":
        before, after = growth.used
        told.append(
            f"--start twins changes what the model computes: a token's {growth.recipe.top_k} experts may be copies of"
            f" only {after} of the {before} before, so the loss rises until training lowers it"
        )
    if growth.recipe.top_k == growth.recipe.num_experts:
        told.append(f"--top-k {growth.recipe.top_k} sends every token to all experts; lower it to route")
    if growth.recipe.start == "double-k":
        told.append(
            "--start double-k gives copies the same tokens and weights, so training keeps them equal; use sleeping or"
            " twins unless something else separates them"
        )
    if isinstance(reader, TrainingReader) and reader.eight_bit:
        told.append(
            f"the moments of {reader.folder} are blocks of 8 bits that may span experts, so the result has no"
            " training state; train it without --keep-optimizer"
        )
    return told


def table(document: dict[str, Any]) -> Table:
    """The plan for people."""
    experts, top_k, recipe = document["num_experts"], document["top_k"], document["recipe"]
    same = "computes the same as the model" if document["exact"] else "does not compute the same as the model"
    asleep = f", copies sleep for {recipe['wake_after']} steps of loss-free" if recipe["wake_after"] else ""
    rows = {
        "family": str(document["family"]),
        "experts": f"{experts['before']} -> {experts['after']} per layer,"
        f" top-{top_k['before']} -> top-{top_k['after']}",
        "start": f"{recipe['start']}{asleep}; {same}",
    }
    if document["layers"]:
        numbers = [number for row in document["layers"] for number in row["copies"]]
        rows["copies"] = f"{min(numbers)} to {max(numbers)} of each expert, by {recipe['utility']}"
    if document["training_state"]:
        rows["optimizer"] = "moments kept for cpt --keep-optimizer"
    return two_columns(rows | loss_rows(document) | file_rows(document))
