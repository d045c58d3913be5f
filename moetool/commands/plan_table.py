"""The plan as a table, for every command that rewrites checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetool.commands.console import count, escape, size

if TYPE_CHECKING:
    from rich.table import Table

    from moetool.surgery.plan import Plan


def describe_files(plan: Plan, out: Path, workers: int) -> dict[str, Any]:
    """The files that would be written, and the resources needed, as `--json` gives them."""
    from moetool.surgery.fill import peak_memory
    from moetool.surgery.plan import free_disk

    dtypes: dict[str, int] = {}
    for tensor in plan.model_tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return {
        "parameters": plan.num_parameters,
        "dtypes": dtypes,
        "num_tensors": len(plan.model_tensors),
        "num_bytes": plan.num_bytes,
        "num_shards": len(plan.shards),
        "free_disk_bytes": free_disk(out),
        "workers": workers,
        "peak_memory_bytes": peak_memory(plan.fills, workers),
    }


def file_rows(document: Mapping[str, Any]) -> dict[str, str]:
    """Files and resources, for people."""
    weights = ", ".join(f"{dtype} ({count(number)})" for dtype, number in document["dtypes"].items())
    return {"weights": weights, **resource_rows(document)}


def resource_rows(document: Mapping[str, Any]) -> dict[str, str]:
    """The disk and the memory that writing takes, for people."""
    too_large = "; it does not fit" if document["num_bytes"] > document["free_disk_bytes"] else ""
    return {
        "on disk": f"{size(document['num_bytes'])} in {document['num_shards']} file{'s' * (document['num_shards'] > 1)}"
        f" ({size(document['free_disk_bytes'])} free{too_large})",
        "memory": f"about {size(document['peak_memory_bytes'])}, with {document['workers']} workers",
    }


def loss_rows(document: Mapping[str, Any]) -> dict[str, str]:
    """The losses before and after, for people; after is unknown while nothing is written."""
    rows = {}
    for name, loss in document["val"].items():
        after = "" if loss["after"] is None else f" -> {loss['after']:.4f}"
        rows[f"loss on {name}"] = f"{loss['before']:.4f}{after} nats"
    return rows


def two_columns(rows: Mapping[str, str]) -> Table:
    """A table of labels and values."""
    from rich.table import Table

    made = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for label, value in rows.items():
        made.add_row(label, escape(value))
    return made


def narrow(title: str, *columns: str) -> Table:
    """A table that takes as few columns of a terminal as it can."""
    from rich.box import SIMPLE
    from rich.table import Table

    return Table(
        *columns, title=title, title_justify="left", box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )


def numbers(title: str, *columns: str) -> Table:
    """A table whose columns but the first are numbers, which are never cut."""
    table = narrow(title)
    table.add_column(columns[0], overflow="fold")
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table
