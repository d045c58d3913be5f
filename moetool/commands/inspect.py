"""Placeholder until the command is written."""

import typer


def inspect(context: typer.Context) -> None:
    """Not written yet."""
    raise NotImplementedError
