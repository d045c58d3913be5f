"""Placeholder until the command is written."""

import typer


def upcycle(context: typer.Context) -> None:
    """Not written yet."""
    raise NotImplementedError
