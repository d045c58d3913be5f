"""Placeholder until the command is written."""

import typer


def analyze_routing(context: typer.Context) -> None:
    """Not written yet."""
    raise NotImplementedError
