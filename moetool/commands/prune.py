"""`moetool prune`: fewer experts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moetool.calibration.options import CalibrationOptions
from moetool.commands.console import Console
from moetool.commands.memory_estimate import estimated, tell_calibration
from moetool.commands.options import Output
from moetool.commands.plan_table import describe_files, file_rows, loss_rows, two_columns
from moetool.commands.proof import Folders, Writing, carry_out, closing, healing, open_model
from moetool.prune.recipe import PruneOptions
from moetool.values import parse_size

if TYPE_CHECKING:
    from rich.table import Table

    from moetool.data.tokens import TokenStream
    from moetool.prune.choose import Choice
    from moetool.surgery.plan import Plan


def prune(
    context: typer.Context,
    models: Folders,
    options: PruneOptions,
    run: CalibrationOptions,
    writing: Writing,
    output: Output,
) -> dict[str, Any]:
    """Remove the experts of a Mixture of Experts that contribute least on a text.

    The model runs on --data once. Every layer keeps the same number of experts, with their router rows and
    selection biases. The others are removed or, with --merge ream, merged into the kept ones. Everything else is
    unchanged. The result is a standard Hugging Face checkpoint. A killed run leaves nothing that loads, and the
    same command finishes it.
    """
    from moetool.calibration.experts import layers_with_experts
    from moetool.calibration.measure import calibration_of, load, losses, read_texts
    from moetool.prune.align import unit_orders
    from moetool.prune.choose import choose
    from moetool.prune.merge import merge
    from moetool.prune.plan import check_numbers, plan_pruning
    from moetool.surgery.experts import open_moe
    from moetool.surgery.lineage import recorded

    console = Console(context, output.json, output.quiet)
    started = time.perf_counter()
    sources = open_model(context, models, writing, "prune")
    folder, source = sources.readers[0].folder, open_moe(sources.readers[0], "pruned")
    order = unit_orders(source)
    groups, keep = check_numbers(source, options.keep_experts), options.keep_experts
    estimate = tell_calibration(console, folder, run)
    with console.progress() as progress, estimated(estimate):
        known = recorded(models.out)
        texts, validation = (read_texts(named, folder, run, progress, known) for named in (run.data, run.val))
        model = load(folder, run)
        measured = calibration_of(model, folder, texts, run, progress)
        found = layers_with_experts(model)
        choice = choose(found, measured, options.score, keep, groups, options.protect_super, options.seed, progress)
        if options.merge == "ream":
            choice = merge(found, measured, choice, groups, order, progress)
        before = losses(model, validation, run, progress)
        del model, found
    recipe, size = recipe_of(options, choice, texts), parse_size(writing.max_shard_size)
    plan = plan_pruning(sources.readers, recipe, choice.kept, size, choice.groups, order)
    document = describe(plan, choice, source.num_experts, before, models.out, writing.num_workers)
    for warning in warnings(document, plan):
        console.warn(warning)
    if writing.plan:
        console.result(document, table(document))
        return document
    carry_out(plan, sources, models.out, writing, started, document, context, console)
    with console.progress() as progress, estimated(estimate):
        for name, loss in losses(load(models.out, run), validation, run, progress).items() if validation else ():
            document["val"][name]["after"] = loss
    console.result(document, table(document), closing(document), healing(models.out, run.data))
    return document


def recipe_of(options: PruneOptions, choice: Choice, texts: Mapping[str, TokenStream]) -> dict[str, Any]:
    """The recipe as the lineage records it; without a merge, nothing about one."""
    recipe = {"keep_experts": options.keep_experts, "score": choice.score, "protect_super": options.protect_super}
    recipe |= {"merge": options.merge} if choice.groups else {}
    recipe |= {"seed": options.seed} if choice.score == "random" else {}
    return recipe | {"data": {name: text.manifest["sha256"] for name, text in texts.items()}}


def describe(
    plan: Plan, choice: Choice, num_experts: int, losses: Mapping[str, float], out: Path, workers: int
) -> dict[str, Any]:
    """The plan as `--json` gives it."""
    return {
        "out": str(out),
        "family": plan.config.get("model_type"),
        "num_experts": {"before": num_experts, "after": plan.recipe["keep_experts"]},
        "score": choice.score,
        "errors": dict(choice.errors),
        "held_out_tokens": choice.held_out,
        "merge": describe_merge(choice, plan, num_experts),
        "layers": list(choice.layers),
        "val": {name: {"before": loss, "after": None} for name, loss in losses.items()},
        **describe_files(plan, out, workers),
    }


def describe_merge(choice: Choice, plan: Plan, num_experts: int) -> dict[str, Any] | None:
    """The merges, and the error of layers' outputs without and with them (mean over layers); None without any."""
    if choice.groups is None:
        return None
    groups = [group for those in choice.groups.values() for group in those]
    errors = {"none": [row["error"] for row in choice.layers], "ream": [row["merged_error"] for row in choice.layers]}
    merged = sum(len(group.experts) - 1 for group in groups)
    dropped = (num_experts - plan.recipe["keep_experts"]) * len(choice.layers)
    return {
        "method": plan.recipe["merge"],
        "merged": merged,
        "into": len(groups),
        "left_out": dropped - merged,
        "errors": {name: sum(those) / len(those) for name, those in errors.items()},
    }


def warnings(document: Mapping[str, Any], plan: Plan) -> list[str]:
    """Experts that the calibration could not rank, and changes outside the experts."""
    from moetool.arch.moe_source import experts_and_top_k
    from moetool.arch.spec import detect

    dropped = document["num_experts"]["before"] - document["num_experts"]["after"]
    rows = [row for row in document["layers"] if len(row["unused"]) > dropped]
    told = [
        f"layer {row['layer']} has {len(row['unused'])} experts without a token, but only {dropped} are removed; keep"
        " fewer, or give more text"
        for row in rows[:3]
    ]
    keep, top_k = experts_and_top_k(plan.config) or (0, 1)
    if keep == top_k:
        told.append(f"--keep-experts {keep} sends every token to all experts that are left; keep more to route")
    if not document["held_out_tokens"]:
        told.append(
            "the texts are too short to hold tokens out, so errors are measured on the scored tokens; give 4 windows"
            " (--seq-len) or more of a text"
        )
    if plan.config.get("norm_topk_prob") is False and plan.config.get("scoring_func", "softmax") == "softmax":
        told.append(
            "weights are a softmax over all experts (norm_topk_prob is false), so the kept ones get more weight for"
            " every token"
        )
    spec = detect(plan.config)
    if spec and spec.selection_bias and spec.ranked_by == "softmax":
        told.append(
            "without some experts, the softmax over all is larger and the selection bias counts less, so choices among"
            " the others may change"
        )
    if (merge := document["merge"]) and merge["errors"]["ream"] > merge["errors"]["none"]:
        told.append(
            f"merged experts change the layers' outputs more ({merge['errors']['ream']:.4f}) than leaving experts out"
            f" does ({merge['errors']['none']:.4f}); leave --merge out"
        )
    return told


def merge_rows(document: Mapping[str, Any]) -> dict[str, str]:
    """The merges, for people."""
    if not (merge := document["merge"]):
        return {}
    groups = [group for row in document["layers"] for group in row["groups"]]
    largest = max((len(group["experts"]) for group in groups), default=0)
    alone = f"; {merge['left_out']} left out" if merge["left_out"] else ""
    told = f"{merge['merged']} experts into {merge['into']}, {largest} in the largest group{alone}"
    errors = ", ".join(f"{name} {error:.4f}" for name, error in merge["errors"].items())
    return {"merged": f"{told} ({merge['method']}, all layers)", "error by merge": f"{errors} (on the same tokens)"}


def table(document: dict[str, Any]) -> Table:
    """The plan for people."""
    experts, layers, errors = document["num_experts"], document["layers"], document["errors"]
    masses, largest = [row["mass_kept"] for row in layers], [max(row["load"]) for row in layers]
    shown = ", ".join(f"{name} {error:.4f}" for name, error in sorted(errors.items(), key=lambda one: one[1]))
    held_out = document["held_out_tokens"]
    compared = f"{held_out} held-out tokens" if held_out else "the tokens of the scores"
    rows = {
        "family": str(document["family"]),
        "experts": f"{experts['before']} -> {experts['after']} in each of {len(layers)} layers, by {document['score']}",
        "output error": f"{shown} (of layers, relative, squared, on {compared})",
        "weight kept": f"{min(masses):.1%} to {max(masses):.1%} of the routing weights",
        "largest load": f"{max(largest):.1%} of the routes of a layer, after pruning",
    }
    return two_columns(rows | merge_rows(document) | loss_rows(document) | file_rows(document))
