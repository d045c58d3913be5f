"""Routes that another engine has counted: {domain: {layer: [count per expert]}}."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from moetool.errors import DataError
from moetool.outside import parse_json, read_bytes
from moetool.routing.stats import RoutingStats


def read_counts(path: Path, top_k: int) -> dict[str, RoutingStats]:
    """Read a file of counts.

    Router probabilities and pairs of experts are not known from counts: measures of them are null.

    Args:
        path: JSON.
        top_k: experts per token, from which the number of tokens follows.

    Raises:
        DataError: not such a file, or counts that contradict each other; names domain and layer.
    """
    try:
        document = parse_json(read_bytes(path, error=DataError, pipe=True), str(path), DataError)
    except DataError as error:
        raise DataError(f"--counts {error}; expected {_SHAPE}") from None
    if not isinstance(document, dict) or not document:
        raise DataError(f"--counts {path}: expected {_SHAPE}")
    stats = {name: _domain(layers, top_k, f"--counts {path}: domain '{name}'") for name, layers in document.items()}
    first = next(iter(stats.values()))
    for name, sums in stats.items():
        if (sums.layers, sums.num_experts) != (first.layers, first.num_experts):
            raise DataError(f"--counts {path}: domain '{name}' has other layers or experts than the first one")
    return stats


MAX_EXPERTS, MAX_CELLS = 4096, 100_000  # of a layer, and experts of all layers
_SHAPE = '{"domain": {"0": [tokens of expert 0, of expert 1, ...], "1": [...]}}'


def _domain(layers: Any, top_k: int, where: str) -> RoutingStats:
    if not isinstance(layers, dict) or not layers or not all(re.fullmatch(r"[0-9]{1,6}", key) for key in layers):
        raise DataError(f"{where}: expected layer numbers with their counts, as in {_SHAPE}")
    rows = {int(key): value for key, value in layers.items()}
    if len(rows) < len(layers):
        raise DataError(f"{where}: a layer is given twice")
    rows = dict(sorted(rows.items()))
    for layer, counts in rows.items():
        whole = isinstance(counts, list) and all(type(count) is int and 0 <= count < 2**62 for count in counts)
        if not whole or not counts:
            raise DataError(f"{where}, layer {layer}: expected a list of whole numbers from 0, one per expert")
    num_experts = len(next(iter(rows.values())))
    if num_experts > MAX_EXPERTS or num_experts * len(rows) > MAX_CELLS:
        raise DataError(f"{where}: {len(rows)} layers of {num_experts} experts, more than any model has")
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
            # One zero that stands for all: experts squared would be far more than the file.
            "coactivation": torch.zeros((), dtype=torch.int64).expand(L, E, E),
        },
    )
