"""Placeholder until the command is written."""

import typer


def tokenize(context: typer.Context) -> None:
    """Not written yet."""
    raise NotImplementedError
