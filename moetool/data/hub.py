"""Text of data sets on the hub, by `datasets` streaming."""

from __future__ import annotations

import re
from collections.abc import Iterator

from moetool.data.readers import check_column, no_field, text_of
from moetool.errors import DataError, in_one_line

_HUB = re.compile(
    r"hf:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^#]+))?(#(?P<config>[^/]*)(/(?P<split>.+))?)?", re.ASCII
)


def _hub_name(path: str) -> dict[str, str | None]:
    match = _HUB.fullmatch(path)
    if not match:
        raise DataError(f"{path}: write a hub dataset as hf:owner/name[@revision][#config/split]")
    return match.groupdict()


def _hub_failed(path: str, error: Exception) -> DataError:
    return DataError(
        f"{path}: the hub did not provide it ({type(error).__name__}: {in_one_line(error)});"
        " check the spelling and the network, or run `hf auth login`"
    )


def read_hub(path: str, field: str) -> Iterator[str]:
    """Stream the texts of a hub dataset, `hf:owner/name[@revision][#config/split]`.

    Raises:
        DataError: the hub does not provide it, or it has no such column.
    """
    import datasets

    name = _hub_name(path)
    try:
        rows = datasets.load_dataset(
            name["name"],
            name=name["config"] or None,
            revision=name["revision"],
            split=name["split"] or "train",
            streaming=True,
        )
        if rows.column_names is not None:
            check_column(path, field, rows.column_names)
            rows = rows.select_columns([field])
        for number, row in enumerate(rows, 1):
            where = f"{path}, row {number}"
            if field not in row:
                raise DataError(f"{where}: {no_field(field, list(row))}")
            yield text_of(row[field], field, where)
    except DataError:
        raise
    except Exception as error:  # the client's errors have no common base class: network, HTTP, builder, cache
        raise _hub_failed(path, error) from None


def hub_commit(path: str) -> str:
    """The commit that the revision of a hub dataset currently points to.

    Raises:
        DataError: the hub does not answer.
    """
    name = _hub_name(path)
    if name["revision"] and re.fullmatch(r"[0-9a-f]{40}", name["revision"]):
        return name["revision"]
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(str(name["name"]), revision=name["revision"]).sha)
    except Exception as error:
        raise _hub_failed(path, error) from None
