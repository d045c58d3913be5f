"""Placeholder until the command is written."""

import typer


def quickstart(context: typer.Context) -> None:
    """Not written yet."""
    raise NotImplementedError
