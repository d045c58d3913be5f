"""`moetool cpt`: continue the pretraining of a dense model or a Mixture of Experts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from moetool.commands.console import Console, count, escape, size
from moetool.commands.memory_estimate import estimated
from moetool.commands.options import Output, write_options
from moetool.launch import is_first
from moetool.train.config import TrainConfig

if TYPE_CHECKING:
    from moetool.train.run_plan import RunPlan


def cpt(context: typer.Context, config: TrainConfig, output: Output) -> dict[str, Any]:
    """Continue a model's pretraining on new text, with earlier text as replay.

    Trains dense models and Mixtures of Experts with AdamW, keeps the routers balanced, and validates
    each domain. OUT becomes a standard Hugging Face checkpoint. After an interruption, the same command
    continues from the step folders in OUT/checkpoints; on a CPU, the result is the same bit for bit.
    """
    from moetool.checkpoint.hub import resolve_model
    from moetool.train.open import open_run

    console = Console(context, output.json and is_first(), output.quiet or not is_first())
    config = replace(config, model=resolve_model(str(config.model)))
    with ExitStack() as stack:
        with console.progress() as progress:
            opened = stack.enter_context(open_run(config, progress))
        summary = opened.summary if opened.plan is None else _train(context, console, opened.plan)
    document = {"out": str(config.out), "already_finished": opened.plan is None, **summary}
    if opened.plan:
        document |= {name: opened.plan.values[name] for name in ("memory", "loading_memory", "saving_memory")}
    if is_first():
        console.result(document, *_result_text(document))
    return document


def _train(context: typer.Context, console: Console, plan: RunPlan) -> dict[str, Any]:
    """Print the plan before the weights are loaded, then train; returns the summary."""
    from moetool.train.build import build_run
    from moetool.train.state import saved_steps

    out = plan.config.out
    console.say(_plan_text(plan.values))
    for warning in plan.warnings:
        console.warn(warning)
    with estimated(_memory_text(plan.values)):
        with console.progress() as progress:
            progress("load the model", 0, 1)
            run = build_run(plan)
        for warning in run.warnings:
            console.warn(warning)
        run.claim()
        if is_first():
            write_options(context, out)
        try:
            with console.progress() as progress:
                return run.train(progress)
        except (KeyboardInterrupt, SystemExit):
            saved = saved_steps(out)
            where = f"the checkpoint of step {saved[-1]}" if saved else "the beginning, because no checkpoint is saved"
            console.warn(f"stopped after step {run.step}; the same command continues from {where}")
            raise


def _plan_text(plan: Mapping[str, Any]) -> str:
    active = plan["num_active_parameters"]
    sparse = f" ({count(active)} active)" if active != plan["num_parameters"] else ""
    balance = ", ".join(f"{name} {value:g}" if value else name for name, value in plan["balance"].items())
    start = f" from step {plan['step']}" if plan["step"] else ""
    lines = [
        f"[bold]{count(plan['num_parameters'])}[/bold] parameters{sparse} on {escape(plan['device'])}"
        f"{' x ' + str(plan['num_processes']) if plan['num_processes'] > 1 else ''}"
        f"{' (' + plan['mesh'] + ')' if plan['mesh'] else ''} in {plan['precision']}"
        f"{', balance ' + escape(balance) if balance else ''};"
        f" {plan['steps']} steps{start} x {plan['global_batch_size']} sequences x {plan['seq_len']} tokens"
        f" = {count(plan['tokens'])} tokens"
    ]
    for name, source in plan["sources"].items():
        lines.append(
            f"  {'replay' if source['replay'] else 'train '} {escape(name)}: {count(source['tokens'])} tokens,"
            f" {source['epochs']:.2g} epochs of {count(source['available_tokens'])}"
        )
    lines += [f"  val    {escape(name)}: {count(tokens)} tokens" for name, tokens in plan["val"].items()]
    return "\n".join([*lines, f"  {_memory_text(plan)}"])


def _memory_text(plan: Mapping[str, Any]) -> str:
    need = plan["memory"]
    parts = ", ".join(f"{name} {size(need[name])}" for name in ("weights", "gradients", "optimizer", "activations"))
    each = " in each process" if plan["num_processes"] > 1 else ""
    host = f", master weights and moments {size(need['host'])}{each}" if need["host"] else ""
    return (
        f"memory about {size(need['total'])}{each}: {parts}; of host memory, loading needs"
        f" {size(plan['loading_memory'])}{each}{host} and saving {size(plan['saving_memory'])}"
    )


def _result_text(summary: dict[str, Any]) -> list[Any]:
    parts: list[Any] = []
    if summary["val"]:
        table = Table("domain", title="validation loss", title_justify="left")
        routed = summary.get("mri", {})
        for name in ("before", "after", "change", *(["mri before", "mri after"] if routed else [])):
            table.add_column(name, justify="right")
        table.add_column("")
        for name, value in summary["val"].items():
            before, after = value["before"], value["after"]
            cells = [f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"]
            if routed:
                cells += [f"{max(routed[name][when]):.2f}" for when in ("before", "after")]
            table.add_row(escape(name), *cells, "adaptation" if name in summary["adaptation"] else "forgetting")
        parts.append(table)
    table = Table("source", title="training text", title_justify="left")
    for name in ("tokens", "epochs"):
        table.add_column(name, justify="right")
    for name, entry in summary["ledger"].items():
        table.add_row(escape(name), count(entry["tokens"]), f"{entry['epochs']:.2g}")
    parts.append(table)
    done = "already finished, with the same options: " if summary["already_finished"] else ""
    # Unknown where metrics.jsonl was deleted before the last step folder became the result.
    speed = f", {count(summary['tokens_per_second'])} tokens/s" if summary["tokens_per_second"] else ""
    parts.append(
        f"{done}{summary['steps']} steps, {count(summary['tokens'])} tokens{speed};"
        f" the checkpoint is in {escape(summary['out'])}"
    )
    return parts
