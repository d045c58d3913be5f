"""`moetool analyze-routing`: the routing of a Mixture of Experts on texts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import typer

from moetool import registry
from moetool.commands.analyze_routing_checks import apply, check_asked_for, parse_check
from moetool.commands.analyze_routing_table import summary, table
from moetool.commands.console import Console, escape
from moetool.commands.memory_estimate import estimated, tell_weights
from moetool.commands.options import Output, write_options
from moetool.errors import ConfigError
from moetool.launch import is_first
from moetool.mesh import mesh_of
from moetool.option import document_option, option, text_field_option
from moetool.progress import Progress
from moetool.routing.settings import COMPARE, Settings
from moetool.values import named


@dataclass(frozen=True)
class AnalyzeOptions:
    """The options of `moetool analyze-routing`, except those on how the texts are run."""

    model: str | None = option(
        "A Mixture of Experts: a folder, or owner/name\\[@revision].", None, positional=True, metavar="MODEL"
    )
    data: Mapping[str, str] = option(
        "Text, JSONL, Parquet or tokens of one domain (repeatable): a file, folder, glob or hf:owner/name.",
        dict, metavar="NAME=PATH", make=named,
    )  # fmt: skip
    out: Path | None = option("Folder for the report.", None, metavar="DIR")
    fail_if: Sequence[str] = option(
        "Exit with code 3 if a layer meets a condition such as 'mri>0.6' (repeatable)."
        f" Metrics: {', '.join(registry.names('metric'))}.",
        (), metavar="CHECK", completed=registry.names("metric"),
    )  # fmt: skip
    text_field: str = text_field_option()
    document: Literal["file", "line", "paragraph"] = document_option()
    compare: str | None = option(
        "Second checkpoint to run on the same tokens, of the same shape or related to MODEL through prune or grow.",
        None,
        panel=COMPARE,
        metavar="MODEL2",
    )
    counts: Path | None = option(
        "Route counts from another engine, instead of MODEL: {domain: {layer: \\[count per expert]}}.",
        None, panel=COMPARE, metavar="FILE", after="vocabulary_layers",
    )  # fmt: skip
    top_k: int | None = option(
        "Experts per token, for --counts.", None, panel=COMPARE, metavar="K", min=1, after="counts"
    )

    def check(self, typed: Collection[str]) -> None:
        """Refuse options that contradict each other.

        Raises:
            ConfigError: names them.
        """
        if self.out is None:
            raise ConfigError("give a folder for the report: --out DIR")
        if self.counts is not None:
            if self.model or self.data or self.compare:
                raise ConfigError("--counts replaces a MODEL and its texts; leave out MODEL, --data and --compare")
            if self.top_k is None:
                raise ConfigError("--counts needs --top-k, the number of experts per token")
        elif not self.model or not self.data:
            missing = "a MODEL" if not self.model else "a text: --data NAME=PATH"
            raise ConfigError(f"give {missing} (or --counts FILE)")
        elif self.top_k is not None:
            raise ConfigError("--top-k is only for --counts, because a MODEL has its own top-k; leave it out")


def analyze_routing(
    context: typer.Context, options: AnalyzeOptions, settings: Settings, output: Output
) -> dict[str, Any]:
    """Analyse a model's routing: load balance per layer and text, dead experts, changes.

    Writes report.json, report.html (one file that opens offline) and plots to --out.
    """
    checks = [parse_check(text) for text in options.fail_if]
    check_asked_for(checks, bool(options.compare), settings.unit_use)
    if settings.show_text and options.counts is not None:
        raise typer.BadParameter("--show-text has no effect with --counts, which holds no text")
    out = options.out or Path()  # `check` has made sure that there is one

    from moetool.checkpoint.folder import FolderLock

    _check_writable(out)
    console = Console(context, output.json and is_first(), output.quiet or not is_first())
    with ExitStack() as stack:
        progress = stack.enter_context(console.progress())
        if is_first():
            stack.enter_context(FolderLock(out))
        if options.counts is not None:
            from moetool.routing.counts_file import read_counts
            from moetool.routing.report import build_report

            report = build_report(options.counts.name, read_counts(options.counts, options.top_k or 1))
        else:
            scratch = out if is_first() else Path(stack.enter_context(TemporaryDirectory()))
            report = _measured(options, settings, scratch, console, progress)
        if not is_first():  # it has counted what the first has
            return report
        from moetool.routing.report import write_report

        files = write_report(report, out)
        write_options(context, out)
    result = report | {"files": files}
    console.result(result, table(report, shutil.get_terminal_size().columns), summary(report, files["html"]))
    apply(checks, report)
    return result


def _measured(
    options: AnalyzeOptions, settings: Settings, scratch: Path, console: Console, progress: Progress
) -> dict[str, Any]:
    """Run the texts through the models, with files that are deleted again in the folder `scratch`."""
    from moetool.checkpoint.hub import resolve_model
    from moetool.checkpoint.model import pick_device, tokenizer_sha256
    from moetool.data.make_tokens import tokenized
    from moetool.data.text import TextSource
    from moetool.routing.analysis import analyze

    models = [(name, resolve_model(name)) for name in (options.model, options.compare) if name]
    if options.compare and len({tokenizer_sha256(folder) for _, folder in models}) > 1:
        raise ConfigError(
            f"--compare: {options.compare} and {options.model} have different tokenizers; compare models with one"
        )
    place = settings.dtype, pick_device(settings.device), settings.device_map, mesh_of(settings)
    estimate = tell_weights(console, [folder for _, folder in models], *place)
    streams = {
        name: tokenized(
            TextSource(path, options.text_field, options.document), models[0][1], progress, settings.max_tokens
        )
        for name, path in options.data.items()
    }
    with estimated(estimate):
        return analyze(
            models[0],
            streams,
            settings,
            compare=models[1] if options.compare else None,
            scratch=scratch,
            notice=lambda message: console.say(f"[dim]{escape(message)}[/dim]"),
            progress=progress,
        )


def _check_writable(out: Path) -> None:
    """Fail before the work, not after it, if the report cannot be written."""
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ConfigError(f"--out {out}: {place} is a file; choose a folder")
    if not os.access(place, os.W_OK):
        raise ConfigError(f"--out {out}: {place} cannot be written; choose another folder")
