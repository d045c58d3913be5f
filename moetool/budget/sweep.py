"""Plans for each of several values of some options, to be compared."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

from moetool.budget.options import PlanOptions, values_of
from moetool.budget.report import document, make_plan, summary
from moetool.checkpoint.reader import CheckpointReader
from moetool.errors import MoetoolError, in_one_line
from moetool.option import flag


def swept(options: PlanOptions, reader: CheckpointReader) -> list[dict[str, Any]]:
    """A row for each combination: its settings and the figures of its plan, or why there is none.

    Args:
        options: with `sweep`.
        reader: of DENSE.

    Raises:
        ConfigError: see `values_of`.
    """
    values = values_of(options.sweep)
    rows = []
    for combination in product(*values.values()):
        settings = dict(zip(values, combination, strict=True))
        row: dict[str, Any] = {"settings": {flag(name)[2:]: _plain(value) for name, value in settings.items()}}
        try:
            changed = replace(options, **settings)
            changed.check(())
            found = document(make_plan(changed, reader))
            row |= {**summary(found), "error": None, "outside": found["law"]["reasons"]}
        except MoetoolError as error:
            row["error"] = in_one_line(error, 200)
        rows.append(row)
    return rows


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, str)) else str(value)
