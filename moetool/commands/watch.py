"""`moetool watch`: a page of training runs that lives while they train."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from moetool.commands.console import Console, escape, size
from moetool.commands.options import Output
from moetool.errors import ConfigError
from moetool.option import option


def _paths(texts: Sequence[str], flag: str) -> list[Path]:
    return [Path(text) for text in texts]


@dataclass(frozen=True)
class WatchOptions:
    """The options of `moetool watch`."""

    runs: Sequence[Path] = option(
        "The OUT of a moetool cpt run (repeatable).", positional=True, metavar="RUN", make=_paths
    )
    port: int | None = option(
        "Port on this machine.", None, shown="the first free one from 8130", min=1, max=65535, metavar="N"
    )
    open_: bool = option("Open the page in the browser.", False, flag="--open")
    html: Path | None = option(
        "Write the page of this moment to a file, which opens offline, and end.", None, metavar="FILE"
    )
    scores: Sequence[Path] = option(
        "More scores of the runs' checkpoints: the --out DIR of moetool eval (repeatable).",
        (), flag="--eval", metavar="DIR", make=_paths,
    )  # fmt: skip

    def check(self, typed: Collection[str]) -> None:
        """Refuse options without effect.

        Raises:
            ConfigError: names them.
        """
        for name in ("port", "open_"):
            if self.html is not None and name in typed:
                raise ConfigError(f"--{name.rstrip('_')} has no effect with --html, which serves nothing")


def watch(context: typer.Context, options: WatchOptions, output: Output) -> dict[str, Any]:
    """Show training runs on a page that updates itself while they train.

    Serves the page to this machine alone, at http://127.0.0.1. It reads what moetool cpt writes into each RUN, and
    changes nothing there. --json prints the numbers of this moment and ends.
    """
    from moetool.watch.open import open_runs
    from moetool.watch.page import collect, render
    from moetool.watch.scores import read_scores
    from moetool.watch.server import Watcher, serve

    if output.json and (options.port is not None or options.open_):
        raise typer.BadParameter("--json prints the numbers and ends; leave out --port and --open")
    console = Console(context, output.json, output.quiet)
    runs = open_runs(options.runs)
    if output.json or options.html is not None:
        with console.progress() as progress:
            for i, run in enumerate(runs):
                progress("read", i, len(runs), run.name)
                run.refresh()
            progress("read", len(runs), len(runs))
        document = collect(runs, *read_scores(options.scores, runs))
        for problem in document["problems"]:
            console.warn(problem)
        written = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
        if options.html is not None:
            num_bytes = _write(options.html, render(document))
            written += f": {options.html}, {size(num_bytes)}; it opens offline"
        console.result(document, escape(written))
        return document

    def ready(address: str) -> None:
        console.say(f"[bold]{address}[/bold]  shows {escape(', '.join(run.name for run in runs))}; Ctrl-C ends it")
        if options.open_:
            import webbrowser

            webbrowser.open(address)

    read_scores(options.scores, runs)  # what is wrong is said before the page is served
    serve(Watcher(runs, lambda: read_scores(options.scores, runs, strict=False)), options.port, ready)
    return {}


def _write(path: Path, page: str) -> int:
    from moetool.checkpoint.folder import write_file

    if path.is_dir():
        raise ConfigError(f"--html {path} is a folder; give a file, such as {path / 'run.html'}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--html {path}: {path.absolute().parent} is no folder; make it first")
    data = page.encode("utf-8", "replace")
    write_file(path.absolute(), data)
    return len(data)
