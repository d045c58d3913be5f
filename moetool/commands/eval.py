"""`moetool eval`: checkpoints on tasks and texts, side by side."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from moetool import registry
from moetool.commands.console import Console, escape
from moetool.commands.eval_table import score_table
from moetool.commands.memory_estimate import estimated, tell_weights
from moetool.commands.options import Output, write_options
from moetool.errors import ConfigError, EvaluationError
from moetool.evaluate.settings import Settings
from moetool.launch import is_first
from moetool.mesh import mesh_of
from moetool.option import document_option, option, text_field_option
from moetool.progress import Progress
from moetool.values import named

if TYPE_CHECKING:
    from moetool.evaluate.suites import Suite
    from moetool.evaluate.tasks import Tasks


@dataclass(frozen=True)
class EvalOptions:
    """The options of `moetool eval`, except those on how the models are run."""

    models: Sequence[str] = option(
        "Checkpoints: folders, or owner/name\\[@revision].", positional=True, metavar="MODEL"
    )
    tasks: str | None = option("lm-eval tasks, groups, patterns or YAML files.", None, metavar="A,B")
    suite: str | None = option(
        f"A paper's task list: {', '.join(registry.names('suite'))}.", None, kind="suite", metavar="NAME"
    )
    text: Mapping[str, str] = option(
        "Local text, scored in bits per byte (repeatable): a file, folder, glob, or hf:...",
        dict, metavar="NAME=PATH", make=named,
    )  # fmt: skip
    include_path: Path | None = option("Folder with YAML files that define more tasks.", None, metavar="DIR")
    num_fewshot: int | None = option(
        "Number of examples in the prompt.", None, shown="the task's own", min=0, metavar="N"
    )
    baseline: str | None = option(
        "Also report each model's difference to this one.", None, metavar="MODEL", after="batch_size"
    )
    offline: bool = option(
        "Use no network, and report missing data sets at the start.", False, flag="--offline", after="routing"
    )
    text_field: str = text_field_option(whose="the text of --text", after="allow_code_execution")
    document: Literal["file", "line", "paragraph"] = document_option(after="text_field")
    out: Path | None = option(
        "Folder for results. The same command continues an interrupted run.", None, metavar="DIR", after="device_map"
    )

    def check(self, typed: Collection[str]) -> None:
        """Raise ConfigError if there is nothing to evaluate on."""
        if not (self.tasks or self.suite or self.text):
            raise ConfigError("nothing to evaluate on: give --tasks, --suite or --text NAME=PATH")
        if "num_fewshot" in typed and not (self.tasks or self.suite):
            raise ConfigError("--num-fewshot has no effect without --tasks or --suite, because --text has no prompt")


def evaluate(context: typer.Context, options: EvalOptions, settings: Settings, output: Output) -> dict[str, Any]:
    """Score and compare checkpoints on lm-eval tasks and local text.

    Scores are identical to those of lm-evaluation-harness on the same checkpoint and task.
    """
    out = options.out
    if settings.log_samples and out is None:
        raise typer.BadParameter("--log-samples needs a folder to write to: --out DIR")
    chosen = registry.load("suite", options.suite) if options.suite else None

    from moetool.evaluate.quiet import hushed

    # With several processes, only the first prints.
    console = Console(context, output.json, output.quiet or not is_first())
    with console.progress() as progress, hushed():
        progress("start", 0, 1, "lm-eval")
        from moetool.checkpoint.model import pick_device
        from moetool.evaluate import evaluation
        from moetool.evaluate.tasks import network

        hardware = pick_device(settings.device)
        with network(allowed=not options.offline):
            folders = _distinct([options.baseline, *options.models] if options.baseline else options.models)
            evaluation.check_models(folders)
    place = settings.dtype, hardware, settings.device_map, mesh_of(settings)
    estimate = tell_weights(console, folders.values(), *place)
    with ExitStack() as stack, console.progress() as progress, hushed(), estimated(estimate):
        from moetool.checkpoint.folder import FolderLock
        from moetool.evaluate.process_group import joined
        from moetool.evaluate.results import build_document, write_results
        from moetool.evaluate.tasks import code_execution

        with network(allowed=not options.offline), code_execution(settings.allow_code_execution):
            loaded = _load_tasks(options, settings, chosen, progress)
            if out is not None and is_first():
                stack.enter_context(FolderLock(out))
                write_options(context, out)
            with joined(hardware, settings.device_map) as device:
                settings = replace(settings, device=device)
                evaluated = evaluation.evaluate(folders, loaded, settings, out, progress)
        if not is_first():
            return {}
        base = next(iter(folders)) if options.baseline else None
        suites = {options.suite: chosen} if options.suite and chosen else {}
        result = build_document(folders, loaded, evaluated, base, suites)
        if out is not None:
            from moetool.evaluate.score_plots import write_plots  # matplotlib

            shown = {b.task: b.metric for b in chosen.benchmarks if b.task} if chosen else {}
            result |= {"out": str(out), "plots": write_plots(result, shown, out / "plots")}
            write_results(out, result, loaded, evaluated, settings)
    _warn(console, result, chosen, settings.routing)
    table = [score_table(result, chosen)] if any(result["results"].values()) else []
    console.result(result, *table, *_places(result))
    if result["failed"]:
        raise EvaluationError(_failures(result["failed"]))
    return result


def _load_tasks(options: EvalOptions, settings: Settings, suite: Suite | None, progress: Progress) -> Tasks:
    """The tasks of a suite, of --tasks and of --text."""
    from moetool.data.text import TextSource
    from moetool.evaluate.tasks import load_tasks, text_task

    shots: dict[str, int | None] = {b.task: b.shots for b in suite.benchmarks if b.task} if suite else {}
    if options.num_fewshot is not None:
        shots = dict.fromkeys(shots, options.num_fewshot)
    shots |= {name.strip(): options.num_fewshot for name in (options.tasks or "").split(",") if name.strip()}
    loaded = load_tasks(shots, options.include_path, settings.allow_code_execution, progress)
    for name, path in options.text.items():
        if name in loaded.tasks:
            raise typer.BadParameter(f"--text {name}: a task has the same name; choose another name")
        source = TextSource(path, options.text_field, options.document)
        loaded.tasks[name] = text_task(name, source, settings.limit, progress)
        loaded.texts[name] = path
    return loaded


def _distinct(models: Sequence[str]) -> dict[str, Path]:
    """A short name for each folder: its last part, after as many parts as make it unique."""
    from moetool.checkpoint.hub import resolve_model

    found: dict[tuple[str, ...], Path] = {}
    for model in models:
        folder = resolve_model(model)
        if folder.resolve() not in {other.resolve() for other in found.values()}:
            # A hub model is in a cache folder, so it is named as it was typed.
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
        f"; plots of {len(result['plots'])} task{'s' * (len(result['plots']) > 1)} over training in plots/"
        if result["plots"]
        else ""
    )
    kept = f"; {result['num_kept']} scores kept from an earlier run" if result["num_kept"] else ""
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
            console.warn(f"{name} has no router, so --routing counts nothing for it")
