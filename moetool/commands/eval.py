"""Placeholder until the command is written."""

import typer


def evaluate(context: typer.Context) -> None:
    """Not written yet."""
    raise NotImplementedError
