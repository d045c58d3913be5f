"""`moetool eval`: checkpoints on tasks and texts, side by side."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moetool import registry
from moetool.commands.console import Console, escape
from moetool.commands.eval_table import score_table
from moetool.commands.memory_estimate import estimated, tell_weights
from moetool.commands.options import (
    ConfigFlag,
    Dtype,
    JsonFlag,
    QuietFlag,
    completing,
    long_dtype,
    named_paths,
    one_of,
    write_options,
)
from moetool.errors import EvaluationError
from moetool.launch import is_first


def _batch_size(value: str) -> str:
    number = value.removeprefix("auto:") if value.startswith("auto:") else value
    if value != "auto" and not (number.isdigit() and int(number) > 0):
        raise typer.BadParameter(f"'{value}': give a number, auto, or auto:N")
    return value


def _limit(value: float | None) -> float | None:
    if value is not None and (value <= 0 or (value > 1 and value != int(value)) or not math.isfinite(value)):
        raise typer.BadParameter(f"{value:g}: give a number of documents, or a share below 1")
    return value


def evaluate(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Checkpoints: folders, or owner/name\\[@revision].", show_default=False),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", metavar="A,B", help="lm-eval tasks, groups, patterns or YAML files.", show_default=False
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            metavar="NAME",
            help=f"A paper's list of tasks: {', '.join(registry.names('suite'))}.",
            callback=one_of("suite"),
            autocompletion=completing(registry.names("suite")),
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            metavar="NAME=PATH",
            help="Local text, scored in bits per byte: a file, folder, glob, or hf:... (repeatable).",
            show_default=False,
        ),
    ] = [],  # noqa: B006 (typer copies it)
    include_path: Annotated[
        Path | None,
        typer.Option("--include-path", metavar="DIR", help="Folder of YAML that defines more tasks."),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", min=0, metavar="N", help="Examples in the prompt (default: the task's own)."),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option("--limit", metavar="N", help="Documents a task, or a share below 1.", callback=_limit),
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option("--batch-size", metavar="N", help="A number, auto, or auto:N.", callback=_batch_size),
    ] = "1",
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", metavar="MODEL", help="Add each model's difference to this one.", show_default=False
        ),
    ] = None,
    routing: Annotated[
        bool, typer.Option("--routing", help="Count routes during each task: mri and load beside the score.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Use no network; say at once which data sets are not at hand.")
    ] = False,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Write each document's prompt and answer into --out.")
    ] = False,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the code that models write, for tasks that do.")
    ] = False,
    text_field: Annotated[
        str, typer.Option("--text-field", metavar="NAME", help="Field or column that holds the text of --text.")
    ] = "text",
    document: Annotated[
        Literal["file", "line", "paragraph"],
        typer.Option("--document", help="What one document of a plain-text file is (elsewhere it is a row)."),
    ] = "file",
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[
        Dtype,
        typer.Option("--dtype", help="Of the weights in memory; auto: as saved.", callback=long_dtype),
    ] = "auto",
    device_map: Annotated[
        str | None,
        typer.Option("--device-map", metavar="MAP", help="Spread a model over devices, such as auto."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for results; the same command continues an interrupted run."),
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    config: ConfigFlag = None,
) -> dict[str, Any]:
    """Score checkpoints on lm-eval tasks and local text, and compare them.

    The numbers are those of lm-evaluation-harness on the same checkpoint and task.
    """
    texts = named_paths(text, "--text")
    if not (tasks or suite or texts):
        raise typer.BadParameter("nothing to evaluate on: give --tasks, --suite or --text NAME=PATH")
    if log_samples and out is None:
        raise typer.BadParameter("--log-samples writes files: give --out DIR")
    if device_map and device != "auto":
        raise typer.BadParameter("--device and --device-map exclude each other")

    chosen = registry.load("suite", suite) if suite else None
    requested = {b.task: b.shots for b in chosen.benchmarks if b.task} if chosen else {}
    if num_fewshot is not None:
        requested = dict.fromkeys(requested, num_fewshot)
    requested |= {name.strip(): num_fewshot for name in (tasks or "").split(",") if name.strip()}

    from moetool.evaluate.quiet import hushed

    # Of several processes only the first is heard.
    console = Console(context, json, quiet or not is_first())
    with console.progress() as progress, hushed():
        progress("start", 0, 1, "lm-eval")
        from moetool.checkpoint.model import pick_device
        from moetool.evaluate import run
        from moetool.evaluate.tasks import network

        hardware = pick_device(device)
        with network(allowed=not offline):
            folders = _distinct([baseline, *models] if baseline else models)
            run.check_models(folders)
    estimate = tell_weights(console, folders.values(), dtype, hardware, device_map)
    with ExitStack() as stack, console.progress() as progress, hushed(), estimated(estimate):
        from moetool.checkpoint.folder import FolderLock
        from moetool.data.text import TextSource
        from moetool.evaluate.plots import write_plots
        from moetool.evaluate.process_group import joined
        from moetool.evaluate.results import build_document, write_results
        from moetool.evaluate.tasks import code_execution, load_tasks, text_task

        with network(allowed=not offline), code_execution(allow_code_execution):
            loaded = load_tasks(requested, include_path, allow_code_execution, progress)
            for name, path in texts.items():
                if name in loaded.tasks:
                    raise typer.BadParameter(f"--text {name}: a task has this name too; choose another")
                loaded.tasks[name] = text_task(name, TextSource(path, text_field, document), limit, progress)
                loaded.texts[name] = path
            if out is not None and is_first():
                stack.enter_context(FolderLock(out))
                write_options(context, out)
            with joined(hardware, device_map) as place:
                settings = run.Settings(
                    limit=limit,
                    batch_size=batch_size,
                    device=place,
                    dtype=dtype,
                    device_map=device_map,
                    routing=routing,
                    log_samples=log_samples,
                    allow_code_execution=allow_code_execution,
                )
                evaluation = run.evaluate(folders, loaded, settings, out, progress)
        if not is_first():
            return {}
        base = next(iter(folders)) if baseline else None
        result = build_document(folders, loaded, evaluation, base, {suite: chosen} if suite and chosen else {})
        if out is not None:
            shown = {b.task: b.metric for b in chosen.benchmarks if b.task} if chosen else {}
            result |= {"out": str(out), "plots": write_plots(result, shown, out / "plots")}
            write_results(out, result, loaded, evaluation, settings)
    _warn(console, result, chosen, routing)
    table = [score_table(result, chosen)] if any(result["results"].values()) else []
    console.result(result, *table, *_places(result))
    if result["failed"]:
        raise EvaluationError(_failures(result["failed"]))
    return result


def _distinct(models: list[str]) -> dict[str, Path]:
    """A short name for each folder: its last part, and as many parts before it as tell it apart."""
    from moetool.checkpoint.hub import resolve_model

    found: dict[tuple[str, ...], Path] = {}
    for model in models:
        folder = resolve_model(model)
        if folder.resolve() not in {other.resolve() for other in found.values()}:
            # A model of the hub lies in a cache folder: its name is what was typed.
            local = Path(model).expanduser().is_dir()
            found[folder.resolve().parts[1:] if local else tuple(model.split("/"))] = folder
    # RUN/checkpoints/step-000100 is RUN/step-000100 for short.
    short = {tuple(part for part in parts if part != "checkpoints"): folder for parts, folder in found.items()}
    found = short if len(short) == len(found) else found
    names = {}
    for parts, folder in found.items():
        lengths = (n for n in range(1, len(parts)) if all(p[-n:] != parts[-n:] for p in found if p != parts))
        names["/".join(parts[-next(lengths, len(parts)) :])] = folder
    return names


def _places(result: dict[str, Any]) -> list[str]:
    if "out" not in result:
        return []
    plots = (
        f"; plots over training of {len(result['plots'])} task{'s' * (len(result['plots']) > 1)} in plots/"
        if result["plots"]
        else ""
    )
    kept = f"; {result['num_kept']} scores are kept from an earlier run" if result["num_kept"] else ""
    return [f"results: {escape(result['out'])}{plots}{kept}"]


def _failures(failed: list[dict[str, str]]) -> str:
    first = failed[0]
    where = f"{first['task']} on {first['model']}" if first["model"] else first["task"]
    others = [f"{f['task']} on {f['model']}" if f["model"] else f["task"] for f in failed[1:]]
    more = f"; also failed: {', '.join(others)}" if others else ""
    return f"{where} failed: {first['reason']}{more}"


def _warn(console: Console, result: dict[str, Any], suite: Any, routing: bool) -> None:
    for benchmark in suite.benchmarks if suite else ():
        if benchmark.task is None:
            console.warn(f"{benchmark.name} is left out: {benchmark.note}")
    for name in result["models"]:
        if routing and not result["routing"].get(name):
            console.warn(f"{name} has no router: nothing to count")
