"""What people see in a terminal."""

import io
import json

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


@pytest.mark.parametrize("width", [60, 100])
def test_a_bar_tells_the_remaining_time_on_a_narrow_terminal_too(width: int) -> None:
    """400 steps, of which 80 took 20 seconds: 80 more are left to do. What is cut off is the end of the note."""
    console = Console(typer.Context(get_command(app)), json=False, quiet=False)
    drawn = io.StringIO()
    console._progress = RichConsole(file=drawn, force_terminal=True, width=width)  # type: ignore[assignment]
    now = [1000.0]
    console._progress.get_time = lambda: now[0]
    with console.progress() as report:
        report("train", 0, 400)
        for done in range(1, 81):
            now[0] += 0.25
            report("train", done, 400, "loss 3.881  mri 0.62  6315 tok/s  lr 9.2e-04")
        report("validate", 1, 2)
        report("validate", 2, 2)
        seen = drawn.getvalue()
    lines = [line for line in drawn.getvalue().replace("\r", "\n").splitlines() if "80/400" in line]
    assert "0:01:20 left" in lines[-1]
    assert "loss 3.881  mri 0.62" in lines[-1]
    assert ("0:00:20" in lines[-1], "lr 9.2e-04" in lines[-1]) == (width == 100, width == 100)
    # A bar that has ended is put away.
    assert "validate" in seen
    assert "validate" not in seen[seen.rindex("80/400") :]


def test_an_event_is_one_line_between_bars_of_a_narrow_terminal_too() -> None:
    console = Console(typer.Context(get_command(app)), json=True, quiet=False)
    drawn = io.StringIO()
    console._progress = RichConsole(file=drawn, force_terminal=True, width=40)  # type: ignore[assignment]
    with console.progress() as report:
        report("train", 1, 2)
        console.event("warning", "the router of layer 0 has collapsed [bold] :smile: at step 20", step=20)
    (line,) = (line for line in drawn.getvalue().splitlines() if "event" in line)
    found = json.loads(line[line.index("{") :])
    assert found == {
        "event": "warning",
        "step": 20,
        "text": "the router of layer 0 has collapsed [bold] :smile: at step 20",
    }
