"""Long series as a page can hold them: extremes stay, the rest is thinned.

Shapes: N values, B buckets of consecutive ones, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def known(x: Sequence[int] | Array, y: Sequence[float] | Array) -> tuple[Array, Array]:
    """The points with a finite value."""
    x, y = np.asarray(x), np.asarray(y, dtype=np.float64)
    there = np.isfinite(y)
    return x[there], y[there]


def thinned(x: Sequence[int] | Array, y: Sequence[float] | Array, most: int) -> dict[str, Any]:
    """A series of at most about `most` points, in which the extremes of every stretch are kept.

    Args:
        x: (N,), ascending.
        y: (N,); NaN where there is no value.
        most: points; with fewer, all are kept.

    Returns:
        `x` and `y`: the first point, the last, and the lowest and the highest of each of most / 2 buckets,
        as they were given. `mean`: {x, y} of the mean of each bucket, at its last x; null where all points are there.
    """
    x, y = known(x, y)
    N = len(y)
    if most >= N:
        return {"x": x.tolist(), "y": y.tolist(), "mean": None}
    starts = np.linspace(0, N, max(1, most // 2) + 1).astype(np.int64)[:-1]
    ends = np.append(starts[1:], N)
    lowest, highest = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
    bucket_of = np.repeat(np.arange(len(starts)), ends - starts)
    picked = {0, N - 1}
    for extreme_B in (lowest, highest):
        at = np.flatnonzero(y == extreme_B[bucket_of])
        _, first = np.unique(bucket_of[at], return_index=True)
        picked |= set(at[first].tolist())
    keep = np.array(sorted(picked))
    means = np.add.reduceat(y, starts) / (ends - starts)
    mean = {"x": x[ends - 1].tolist(), "y": means.tolist()}
    return {"x": x[keep].tolist(), "y": y[keep].tolist(), "mean": mean}


def heat(x: Sequence[int] | Array, values_NL: Array, most: int, worst: Callable[..., Any]) -> dict[str, Any]:
    """A table of values over time, at most `most` columns wide.

    Args:
        x: (N,), ascending.
        values_NL: values of each layer; rows of NaN where there are none.
        most: columns.
        worst: numpy's maximum or minimum: what a column shows of the rows that it stands for.

    Returns:
        `x`: the last x of each column; `rows`: for each layer its values.
    """
    x = np.asarray(x)
    there = np.isfinite(values_NL).all(axis=1) if len(values_NL) else np.zeros(0, dtype=bool)
    x, values_NL = x[there], values_NL[there]
    N = len(x)
    if N == 0:
        return {"x": [], "rows": []}
    B = min(N, most)
    starts = np.linspace(0, N, B + 1).astype(np.int64)[:-1]
    ends = np.append(starts[1:], N)
    table_BL = worst.reduceat(values_NL, starts, axis=0)  # type: ignore[attr-defined]
    return {"x": x[ends - 1].tolist(), "rows": np.round(table_BL, 5).T.tolist()}
