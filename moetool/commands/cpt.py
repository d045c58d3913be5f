"""Placeholder until the command is written."""

import typer


def cpt(context: typer.Context) -> None:
    """Not written yet."""
    raise NotImplementedError
