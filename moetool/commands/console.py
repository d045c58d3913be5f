"""The printed output: tables and messages for people, one JSON document for machines."""

from __future__ import annotations

import gc
import json as jsonlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.markup import escape as escape_markup
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from moetool.amounts import count, size
from moetool.outside import finite, printable, printable_json
from moetool.progress import Progress as ProgressCallback
from moetool.progress import silent

__all__ = ["Console", "count", "escape", "size"]


def escape(text: str) -> str:
    """Untrusted text as rich markup: markup and control characters in it have no effect."""
    return escape_markup(printable(text))


_WIDE = 80  # columns of a terminal from which on a bar shows the elapsed time, too
# Replacements of the same width, for terminals without Unicode.
_ASCII = str.maketrans({"±": "~", "↑": "^", "↓": "v", "█": "#", "→": ">", "…": "."})


class _Rich(RichConsole):
    """rich's console, except that cli.run hears of a closed pipe, instead of an exit with code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(text if self.encoding.startswith("utf") else text.translate(_ASCII), **options)


class _Remaining(TimeRemainingColumn):
    """The remaining time, told from the elapsed one by a word."""

    def render(self, task: Task) -> Text:
        return super().render(task).append(" left")


class _Note(TextColumn):
    """The column that a narrow terminal cuts off first."""

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class Console:
    """The output of a command, given its `--json` and `--quiet`; a command makes it when its imports are done.

    Inside `moetool quickstart` (context.obj["step"] is set) a command shows progress but leaves the
    printing of its result to the quickstart.
    """

    def __init__(self, context: typer.Context, json: bool, quiet: bool) -> None:
        step = bool((context.find_root().obj or {}).get("step"))
        self.json = json
        self.quiet = quiet
        self._result_hidden = quiet or step
        self._messages = _Rich(stderr=json, highlight=False)
        # On a terminal, lines wrap between words; in a file or a pipe, they do not wrap.
        self._messages.soft_wrap = not self._messages.is_terminal
        self._progress = _Rich(stderr=True)
        self._bars_shown = False
        if not gc.isenabled():  # since the process began (__main__.py): what is there now is code, and stays
            gc.freeze()
            gc.enable()

    def say(self, message: RenderableType, whole: bool = False) -> None:
        """Print a message for people (rich markup; `escape` untrusted text).

        Args:
            message: what to print.
            whole: do not wrap lines, so that a command can be copied from the terminal.
        """
        if not self._result_hidden:
            # Bars redraw their lines, so only output through their own console stays readable between them.
            console = self._progress if self._bars_shown and self._messages.is_terminal else self._messages
            with _unheard() if self.json else _naming_stdout():
                console.print(message, soft_wrap=whole or None, highlight=False)

    def warn(self, message: str) -> None:
        """Print a warning on stderr (plain text)."""
        if not self.quiet:
            wrap = not self._progress.is_terminal
            with _unheard():
                self._progress.print(f"[yellow]warning:[/yellow] {escape(message)}", highlight=False, soft_wrap=wrap)

    def event(self, event: str, text: str = "", **values: Any) -> None:
        """Tell machines something with `--json`, as a line of JSON on stderr; tell people the text as a warning."""
        if not self.json:
            self.warn(text)
        elif not self.quiet:
            line = jsonlib.dumps(finite({"event": event, **values, **({"text": text} if text else {})}))
            with _unheard():
                self._progress.print(line, soft_wrap=True, markup=False, emoji=False, highlight=False)

    def result(self, document: dict[str, Any], *renderables: RenderableType) -> None:
        """Print a command's outcome: the document with `--json`, else the renderables."""
        if self.json:
            text = jsonlib.dumps(finite(document), indent=2, ensure_ascii=False, default=str)
            with _naming_stdout():
                sys.stdout.write(printable_json(text) + "\n")
                sys.stdout.flush()
        else:
            for renderable in renderables:
                self.say(renderable)

    @contextmanager
    def progress(self) -> Iterator[ProgressCallback]:
        """Progress bars with the remaining time on stderr, on a terminal only; gives the callback for domain code."""
        if self.quiet or not self._progress.is_terminal:
            yield silent
            return
        width = self._progress.width
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=width // 7),
            TextColumn("{task.fields[amount]}", justify="right"),
            *([TimeElapsedColumn()] if width >= _WIDE else []),
            _Remaining(),
            _Note("{task.fields[note]}", style="dim", table_column=Column(no_wrap=False)),
        )
        with Progress(*columns, console=self._progress, transient=True) as bars:
            tasks: dict[str, TaskID] = {}

            def report(task: str, done: float, total: float, note: str = "") -> None:
                if task not in tasks:
                    tasks[task] = bars.add_task(escape(task), total=total, note="", amount="")
                amount = f"{done:.0f}/{total:.0f}" if total < 100_000 else f"{done / total:.0%}"
                bars.update(tasks[task], completed=done, total=total, note=escape(note), amount=amount)
                if done >= total:
                    bars.remove_task(tasks.pop(task))
                    bars.refresh()  # at once: a message that still counts its line would leave a torn one behind

            self._bars_shown = True
            try:
                yield report
            finally:
                self._bars_shown = False


@contextmanager
def _unheard() -> Iterator[None]:
    """Continue if standard error cannot be written: days of work must not end for a message that no one reads."""
    try:
        yield
    except OSError:
        # The rest of the stream must have somewhere to go, or Python exits with code 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


@contextmanager
def _naming_stdout() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise BrokenPipeError from None  # without errno, on which Typer exits with 1
    except OSError as error:
        error.filename = "standard output"
        raise
