"""`moetool cpt`: continue the pretraining of a dense model or a Mixture of Experts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moetool.commands.console import Console, count, escape, size
from moetool.commands.memory_estimate import estimated
from moetool.commands.options import Output, write_options
from moetool.commands.plan_table import numbers
from moetool.errors import ConfigError
from moetool.launch import is_first
from moetool.train.config import TrainConfig
from moetool.values import parse_size

if TYPE_CHECKING:
    from moetool.progress import Progress
    from moetool.train.loop import Run
    from moetool.train.run_plan import RunPlan
    from moetool.train.signs import Seen, Sign

EVENTS = 10.0  # seconds between two lines of progress on stderr, with --json


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
    if config.teacher is not None:
        config = replace(config, teacher=resolve_model(str(config.teacher)))
    with ExitStack() as stack:
        with console.progress() as progress:
            opened = stack.enter_context(open_run(config, progress))
        summary = opened.summary if opened.plan is None else _train(context, console, opened.plan)
    averaged = len(summary.get("average", {}).get("steps", ()))
    if opened.plan is None and config.average_last not in (None, averaged):
        console.warn(
            f"the run is finished, so --average-last has no effect; use moetool average NEW {config.out} --last"
            f" {config.average_last}"
        )
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
            longer = plan.config.shares_of != plan.config.max_steps
            write_options(context, out, **({"shares_of": plan.config.shares_of} if longer else {}))
        try:
            with console.progress() as progress:
                run.train(progress, _telling(console, plan.config.max_steps))
        except ConfigError:  # the loss is not finite
            _leave_page(console, out)
            raise
        except (KeyboardInterrupt, SystemExit):
            _leave_page(console, out)
            saved = saved_steps(out)
            where = (
                f"the checkpoint of step {saved[-1]}"
                if saved
                else "the beginning, because no checkpoint has been saved"
            )
            console.warn(f"stopped after step {run.step}; the same command continues from {where}")
            raise
        with console.progress() as progress:
            more = {"average": _average(run, plan.config.average_last, progress)} if plan.config.average_last else {}
            summary = run.finish(more)
    _leave_page(console, out)
    return summary


def _telling(console: Console, steps: int) -> Seen:
    """A function that reports on training rows: signs of trouble and, with `--json`, progress."""
    began, told, done = time.monotonic(), time.monotonic(), 0

    def seen(row: Mapping[str, Any], signs: Sequence[Sign]) -> None:
        nonlocal told, done
        done += 1
        for sign in signs:
            console.event("warning", sign.text, kind=sign.kind, step=sign.step, layer=sign.layer)
        now = time.monotonic()
        if console.json and now - told >= EVENTS:
            told = now
            left = (now - began) / done * (steps - row["step"])
            worst = {"mri": max(row["mri"])} if "mri" in row else {}
            console.event(
                "progress", step=row["step"], steps=steps, loss=row["loss"], **worst, seconds_left=round(left, 1)
            )

    return seen


def _leave_page(console: Console, out: Path) -> None:
    """Write OUT/run.html, the page of `moetool watch` as the run ends; no run fails for it."""
    if not is_first():
        return
    from moetool.checkpoint.folder import write_file
    from moetool.checkpoint.step_folder import PAGE
    from moetool.watch.page import collect, render
    from moetool.watch.problem import in_words
    from moetool.watch.run import WatchedRun

    try:
        run = WatchedRun(out, out.resolve().name, ended=True)
        run.refresh()
        document = collect([run])
        for problem in document["problems"]:
            console.warn(f"{out / PAGE}: {problem}")
        write_file(out / PAGE, render(document).encode("utf-8", "replace"))
    except Exception as error:
        why = (isinstance(error, OSError) and error.strerror) or in_words(error)
        console.warn(f"{out / PAGE} is not written ({why}); moetool watch {out} --html FILE makes it")


def _average(run: Run, last: int, progress: Progress) -> dict[str, Any]:
    """Write the mean of a run's last snapshots, and validate it; all processes must call."""
    from moetool.average.checkpoints import expand, in_order
    from moetool.average.plan import OPERATION, plan_average
    from moetool.average.recipe import AverageRecipe
    from moetool.checkpoint.step_folder import AVERAGE, WEIGHTS, step_folders
    from moetool.commands.proof import Writing
    from moetool.surgery.apply import prove, write_out
    from moetool.surgery.sources import open_sources
    from moetool.train.build import validate_other

    out, writing = run.plan.config.out / AVERAGE, Writing()

    def write() -> None:
        names = expand([str(run.plan.config.out)], last)
        with open_sources(names, out, reader=OPERATION.reader({})) as opened:
            sources, recipe = in_order(opened, AverageRecipe())
            plan = plan_average(sources.readers, recipe, parse_size(writing.max_shard_size))
            write_out(plan, sources, out, writing.num_workers, {}, False, progress)
            prove(plan, sources, out, writing.verify, writing.num_workers, progress)

    run.saver.ranks.together(lambda: write() if is_first() else None)
    return {"steps": [*step_folders(out.parent, WEIGHTS)][-last:], "val": validate_other(run, out, progress)}


def _plan_text(plan: Mapping[str, Any]) -> str:
    active = plan["num_active_parameters"]
    sparse = f" ({count(active)} active)" if active != plan["num_parameters"] else ""
    balance = ", ".join(f"{name} {value:g}" if value else name for name, value in plan["balance"].items())
    start = f" from step {plan['step']}" if plan["step"] else ""
    trained = f", of which {plan['trained']} train ({count(plan['num_trained_parameters'])})"
    lines = [
        f"[bold]{count(plan['num_parameters'])}[/bold] parameters{sparse}"
        f"{trained if plan['trained'] != 'everything' else ''} on {escape(plan['device'])}"
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
            + (f", weight {source['weight']} (from step)" if isinstance(source["weight"], str) else "")
        )
    if teacher := plan.get("teacher"):
        sequences = "all sequences" if teacher["share"] == 1 else f"replayed sequences ({teacher['share']:.0%})"
        lines.append(
            f"  teacher {escape(teacher['model'])}: {count(teacher['num_parameters'])} parameters on {sequences},"
            f" weight {teacher['weight']:g}, temperature {teacher['temperature']:g};"
            f" {teacher['operations']:.0%} more operations"
        )
    for name, tokens in plan["val"].items():
        source = ", the last part of its only document" if name in plan["val_from_end"] else ""
        lines.append(f"  val    {escape(name)}: {count(tokens)} tokens{source}")
    gradient = plan["router_gradient"]
    if gradient["kind"] != "sparse":
        lines.append(f"  router gradient {gradient['kind']}: {gradient['operations']:.1%} more operations")
    return "\n".join([*lines, f"  {_memory_text(plan)}"])


def _memory_text(plan: Mapping[str, Any]) -> str:
    need = plan["memory"]
    names = [name for name in need if name not in ("total", "host")]
    parts = ", ".join(f"{name} {size(need[name])}" for name in names)
    each = " in each process" if plan["num_processes"] > 1 else ""
    host = f", master weights and moments {size(need['host'])}{each}" if need["host"] else ""
    return (
        f"memory about {size(need['total'])}{each}: {parts}; of host memory, loading needs"
        f" {size(plan['loading_memory'])}{each}{host} and saving {size(plan['saving_memory'])}"
    )


def _result_text(summary: dict[str, Any]) -> list[Any]:
    parts: list[Any] = []
    average = summary.get("average")
    if summary["val"]:
        routed = summary.get("mri", {})
        more = [*(["average"] if average else []), *(["mri\nbefore", "mri\nafter"] if routed else [])]
        table = numbers("validation loss", "domain", "before", "after", "change", *more)
        table.add_column("")
        for name, value in summary["val"].items():
            before, after = value["before"], value["after"]
            cells = [f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"]
            if average:
                cells.append(f"{average['val'][name]:.4f}")
            if routed:
                cells += [f"{max(routed[name][when]):.2f}" for when in ("before", "after")]
            table.add_row(escape(name), *cells, "adaptation" if name in summary["adaptation"] else "forgetting")
        parts.append(table)
    table = numbers("training text", "source", "tokens", "epochs")
    for name, entry in summary["ledger"].items():
        table.add_row(escape(name), count(entry["tokens"]), f"{entry['epochs']:.2g}")
    parts.append(table)
    if teacher := summary.get("teacher"):
        parts.append(
            f"divergence from the teacher (KL per token): {teacher['before']:.4f} in the first step,"
            f" {teacher['after']:.4f} in the last"
        )
    done = "already finished: " if summary["already_finished"] else ""
    # Unknown where metrics.jsonl was deleted before the last step folder became the result.
    speed = f", {count(summary['tokens_per_second'])} tokens/s" if summary["tokens_per_second"] else ""
    parts.append(
        f"{done}{summary['steps']} steps, {count(summary['tokens'])} tokens{speed};"
        f" the checkpoint is in {escape(summary['out'])}"
        + (
            f", the average of steps {', '.join(map(str, average['steps']))} is in {escape(summary['out'])}/average"
            if average
            else ""
        )
    )
    return parts
