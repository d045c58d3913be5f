"""Placeholder until the command is written."""

import typer


def verify(context: typer.Context) -> None:
    """Not written yet."""
    raise NotImplementedError
