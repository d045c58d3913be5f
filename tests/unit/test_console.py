"""What people see in a terminal."""

import io

import pytest
import typer
from rich.console import Console as RichConsole
from typer.main import get_command

from moetool.cli import app
from moetool.commands.console import Console


@pytest.mark.parametrize("terminal", [True, False])
def test_a_message_between_bars_does_not_break_into_their_lines(terminal: bool) -> None:
    console = Console(typer.Context(get_command(app)), json=False, quiet=False)
    bars, messages = io.StringIO(), io.StringIO()
    console._progress = RichConsole(file=bars, force_terminal=True, width=60)  # type: ignore[assignment]
    console._messages = RichConsole(file=messages, force_terminal=terminal, width=60)  # type: ignore[assignment]
    with console.progress() as report:
        report("read", 1, 2)
        console.say("told meanwhile")
    console.say("told after")
    # Where the result goes to a file it stays whole; on a terminal the bars make room for it.
    assert ("told meanwhile" in bars.getvalue()) == terminal
    assert ("told meanwhile" in messages.getvalue()) != terminal
    assert "told after" in messages.getvalue()
