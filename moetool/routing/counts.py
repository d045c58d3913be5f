"""Routes that another engine has counted: {domain: {layer: [count per expert]}}."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from moetool.errors import DataError
from moetool.routing.stats import RoutingStats


def read_counts(path: Path, top_k: int) -> dict[str, RoutingStats]:
    """Read a file of counts.

    Router probabilities and pairs of experts are not known from counts: measures of them are null.

    Args:
        path: JSON.
        top_k: experts a token, from which the number of tokens follows.

    Raises:
        DataError: not such a file, or counts that contradict each other; names domain and layer.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"--counts {path}: {os.strerror(error.errno or 0).lower()}") from None
    except (ValueError, RecursionError):
        raise DataError(f"--counts {path}: not valid JSON; expected {_SHAPE}") from None
    if not isinstance(document, dict) or not document:
        raise DataError(f"--counts {path}: expected {_SHAPE}")
    stats = {name: _domain(layers, top_k, f"--counts {path}: domain '{name}'") for name, layers in document.items()}
    first = next(iter(stats.values()))
    for name, sums in stats.items():
        if (sums.layers, sums.num_experts) != (first.layers, first.num_experts):
            raise DataError(f"--counts {path}: domain '{name}' has other layers or experts than the first one")
    return stats


_SHAPE = '{"domain": {"0": [tokens of expert 0, of expert 1, ...], "1": [...]}}'


def _domain(layers: Any, top_k: int, where: str) -> RoutingStats:
    if not isinstance(layers, dict) or not layers or not all(key.isdecimal() for key in layers):
        raise DataError(f"{where}: expected layer numbers with their counts, as in {_SHAPE}")
    rows = {int(key): value for key, value in layers.items()}
    rows = dict(sorted(rows.items()))
    for layer, counts in rows.items():
        whole = isinstance(counts, list) and all(type(count) is int and 0 <= count < 2**62 for count in counts)
        if not whole or not counts:
            raise DataError(f"{where}, layer {layer}: expected a list of whole numbers from 0, one an expert")
    num_experts = len(next(iter(rows.values())))
    # An engine with a capacity limit drops routes, so layers may differ: the fullest tells the tokens.
    tokens = max(sum(counts) for counts in rows.values()) // top_k
    if tokens == 0 or top_k > num_experts:
        raise DataError(f"{where}: {tokens * top_k} routes to {num_experts} experts do not fit --top-k {top_k}")
    for layer, counts in rows.items():
        here = f"{where}, layer {layer}"
        if len(counts) != num_experts:
            raise DataError(f"{here}: {len(counts)} experts, but {num_experts} in the first layer")
        if max(counts) > tokens:
            raise DataError(f"{here}: {max(counts)} of {tokens} tokens go to one expert; is --top-k {top_k} right?")
    L, E = len(rows), num_experts
    return RoutingStats.from_arrays(
        rows,
        top_k,
        {
            "num_tokens": torch.tensor(tokens),
            "counts": torch.tensor(list(rows.values())),
            "probability": torch.zeros(L, E),
            "coactivation": torch.zeros(L, E, E),
        },
    )
