"""`moetool analyze-routing`: what the routers of a Mixture of Experts do with some texts."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moetool import registry
from moetool.commands.analyze_routing_checks import MEASURES, apply, check_asked_for, parse_check
from moetool.commands.analyze_routing_table import summary, table
from moetool.commands.console import Console, escape
from moetool.commands.memory_estimate import estimated, tell_weights
from moetool.commands.options import (
    ConfigFlag,
    Dtype,
    JsonFlag,
    QuietFlag,
    completing,
    long_dtype,
    named_paths,
    parse_count,
    write_options,
)
from moetool.errors import ConfigError

_COMPARE, _RUN = "Comparison and tokens", "How the texts run"


def analyze_routing(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A Mixture of Experts: a folder, or owner/name\\[@revision].",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="NAME=PATH",
            help="A domain: text, JSONL, Parquet or tokens; a file, folder, glob or hf:owner/name. Repeatable.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for the report.", show_default=False)
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            metavar="CHECK",
            help="Exit with 3 if a layer has, say, 'mri>0.6'. Measures: "
            f"{', '.join(name for kind in MEASURES for name in registry.names(kind))}.",
            autocompletion=completing([name for kind in MEASURES for name in registry.names(kind)]),
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option("--max-tokens", metavar="N", help="Tokens of each domain, such as 1M.", parser=parse_count),
    ] = 204_800,
    text_field: Annotated[
        str, typer.Option("--text-field", metavar="NAME", help="Field or column that holds the text.")
    ] = "text",
    document: Annotated[
        Literal["file", "line", "paragraph"],
        typer.Option("--document", help="What one document of a plain-text file is (elsewhere it is a row)."),
    ] = "file",
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="MODEL2",
            help="Another checkpoint of the same shape: the same tokens go through it.",
            show_default=False,
            rich_help_panel=_COMPARE,
        ),
    ] = None,
    vocabulary_layers: Annotated[
        str,
        typer.Option(
            "--vocabulary-layers",
            metavar="LAYERS",
            help="Layers whose tokens are counted by expert: auto (what fits 1 GB), all, none, or 0,8,16-23.",
            rich_help_panel=_COMPARE,
        ),
    ] = "auto",
    counts: Annotated[
        Path | None,
        typer.Option(
            "--counts",
            metavar="FILE",
            help="Instead of MODEL: routes that another engine counted, {domain: {layer: \\[count per expert]}}.",
            show_default=False,
            rich_help_panel=_COMPARE,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            metavar="K",
            min=1,
            help="Experts a token, for --counts.",
            show_default=False,
            rich_help_panel=_COMPARE,
        ),
    ] = None,
    unit_use: Annotated[
        bool,
        typer.Option(
            "--unit-use/--no-unit-use",
            help="In a model that moetool upcycled, measure how much its redrawn units do, on 8192 tokens a domain.",
            rich_help_panel=_COMPARE,
        ),
    ] = True,
    seq_len: Annotated[
        int | None,
        typer.Option(
            "--seq-len",
            min=1,
            help="Tokens a window.  \\[default: 2048, or what the model allows]",
            show_default=False,
            rich_help_panel=_RUN,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Windows a forward.", rich_help_panel=_RUN)
    ] = 8,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=_RUN)
    ] = "auto",
    dtype: Annotated[
        Dtype,
        typer.Option(
            "--dtype", help="Of the weights in memory; auto: as saved.", callback=long_dtype, rich_help_panel=_RUN
        ),
    ] = "auto",
    device_map: Annotated[
        str | None,
        typer.Option(
            "--device-map",
            metavar="MAP",
            help="Spread a model over devices, such as auto.",
            show_default=False,
            rich_help_panel=_RUN,
        ),
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    config: ConfigFlag = None,
) -> dict[str, Any]:
    """Show what a model's routers do: is the load balanced, where, on which text, and what changed.

    Writes report.json, report.html (one file that opens offline) and plots to --out.
    """
    checks = [parse_check(text) for text in fail_if or []]
    texts = named_paths(data or [], "--data")
    if out is None:
        raise typer.BadParameter("give a folder for the report: --out DIR")
    if device_map and device != "auto":
        raise typer.BadParameter("--device and --device-map exclude each other")
    layers = _parse_layers(vocabulary_layers)
    if counts is not None:
        if model or texts or compare:
            raise typer.BadParameter("--counts takes no MODEL, --data or --compare: it is all there is to know")
        if top_k is None:
            raise typer.BadParameter("--counts needs --top-k, the number of experts a token")
    elif not model or not texts:
        missing = "a MODEL" if not model else "a text: --data NAME=PATH"
        raise typer.BadParameter(f"give {missing} (or --counts FILE)")
    elif top_k is not None:
        raise typer.BadParameter("--top-k belongs to --counts; a MODEL knows its own")

    check_asked_for(checks, bool(compare), unit_use)

    from moetool.checkpoint.folder import FolderLock

    _check_writable(out)
    console = Console(context, json, quiet)
    with FolderLock(out), console.progress() as progress:
        if counts is not None:
            from moetool.routing.counts import read_counts
            from moetool.routing.report import build_report

            report = build_report(counts.name, read_counts(counts, top_k or 1))
        else:
            from moetool.checkpoint.hub import resolve_model
            from moetool.checkpoint.model import pick_device
            from moetool.data.text import TextSource
            from moetool.data.tokens import tokenized, tokenizer_sha256
            from moetool.routing.analysis import Settings, analyze

            models = [(name, resolve_model(name)) for name in (model, compare) if name]
            if compare and len({tokenizer_sha256(folder) for _, folder in models}) > 1:
                raise ConfigError(
                    f"--compare: {compare} has another tokenizer than {model}; the tokens must be the same"
                )
            estimate = tell_weights(console, [folder for _, folder in models], dtype, pick_device(device), device_map)
            settings = Settings(max_tokens, seq_len, batch_size, device, dtype, device_map, layers, unit_use)
            streams = {
                name: tokenized(TextSource(path, text_field, document), models[0][1], progress)
                for name, path in texts.items()
            }
            with estimated(estimate):
                report = analyze(
                    models[0],
                    streams,
                    settings,
                    compare=models[1] if compare else None,
                    scratch=out,
                    notice=lambda message: console.say(f"[dim]{escape(message)}[/dim]"),
                    progress=progress,
                )
        from moetool.routing.report import write_report

        files = write_report(report, out)
        write_options(context, out)
    result = report | {"files": files}
    console.result(result, table(report, shutil.get_terminal_size().columns), summary(report, files["html"]))
    apply(checks, report)
    return result


def _check_writable(out: Path) -> None:
    """Say before the work, not after it, that the report cannot be written."""
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ConfigError(f"--out {out}: {place} is a file; choose a folder")
    if not os.access(place, os.W_OK):
        raise ConfigError(f"--out {out}: {place} cannot be written; choose another folder")


def _parse_layers(text: str) -> tuple[int, ...] | str:
    """`0,8,16-23` as layer numbers; `auto` and `all` as they are, `none` as no layer."""
    if text in ("auto", "all"):
        return text
    if text == "none":
        return ()
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise typer.BadParameter(
                f"--vocabulary-layers '{text}': write auto, all, none, or layers such as 0,8,16-23"
            )
        layers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(layers))
