"""Write docs/cli.md from the commands' --help; `--check` only says whether it is up to date."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# The width and the look of the page must not depend on the terminal that makes it.
os.environ.update(COLUMNS="100", TERMINAL_WIDTH="100", NO_COLOR="1", TERM="dumb", _TYPER_FORCE_DISABLE_TERMINAL="1")

import contextlib
import io

from moetool.cli import app, run

PAGE = Path(__file__).parent / "cli.md"


def help_of(*arguments: str) -> str:
    """What `moetool ARGUMENTS --help` prints, without trailing blanks."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run([*arguments, "--help"])
    return "\n".join(line.rstrip() for line in printed.getvalue().strip("\n").splitlines())


def page() -> str:
    """The whole of docs/cli.md."""
    parts = [
        "# Command line\n",
        "Made from `--help` by `make docs`; do not edit.\n",
        f"```text\n{help_of()}\n```\n",
    ]
    for command in app.registered_commands:
        parts.append(f"## moetool {command.name}\n\n```text\n{help_of(str(command.name))}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == page() else "docs/cli.md is out of date: run `make docs`")
    PAGE.write_text(page(), encoding="utf-8")
