"""metrics.jsonl: one JSON object per line, each step once."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moetool.checkpoint.folder import naming, write_file
from moetool.outside import fits
from moetool.routing.load_metrics import dead_experts, entropy, mri
from moetool.routing.stats import RoutingStats

# What a run that goes on relies on in a row, and in one of a training step.
_ROW = {"step": int, "val": {"*": float}, "routing": {"*": {"mri": [float]}}, "teacher": float}
_EMPTY: dict[str, Any] = {"val": {}, "routing": {}, "teacher": 0.0}
LOADS = 100  # training rows of a run that have the load of each expert, and the first
_TRAINED = _ROW | {"loss": float, "tokens_per_second": float}


class MetricsLog:
    """Appends rows to a file that is readable during the run."""

    def __init__(self, path: Path, step: int) -> None:
        """Keep the rows up to `step`, those of the checkpoint that is resumed from; 0 keeps none."""
        self.path = path
        kept = [row for row in self.rows() if row["step"] <= step] if step and path.is_file() else []
        write_file(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row and hand it to the system at once."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows in order; a line that a kill cut short, or that is not a row, is left out."""
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict) and fits(_EMPTY | row, _TRAINED if "loss" in row else _ROW):
                    yield row


def routing_row(counts_LE: np.ndarray[Any, np.dtype[np.int64]], num_tokens: int) -> dict[str, Any]:
    """How the routers handled some tokens: `mri`, `entropy` and `dead_experts`, one value per layer.

    Args:
        counts_LE: routes to each expert.
        num_tokens: that were routed.
    """
    L, E = counts_LE.shape
    arrays = {
        "num_tokens": torch.tensor(num_tokens),
        "counts": torch.from_numpy(counts_LE),
        "probability": torch.zeros(L, E),
        "coactivation": torch.zeros(L, E, E),
    }
    top_k = int(counts_LE[0].sum()) // max(num_tokens, 1)
    stats = RoutingStats.from_arrays(range(L), top_k, arrays)
    return {"mri": mri(stats), "entropy": entropy(stats), "dead_experts": dead_experts(stats)}


def load_row(layers: Sequence[int], counts_LE: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, list[float]]:
    """Layer -> each expert's share of its routes, to five digits."""
    load_LE = np.round(counts_LE / np.maximum(counts_LE.sum(axis=1, keepdims=True), 1), 5)
    return {str(layer): load_E for layer, load_E in zip(layers, load_LE.tolist(), strict=True)}


def summarize(log: MetricsLog, step_tokens: int, train: Collection[str]) -> dict[str, Any]:
    """The summary of a run's rows: last training loss, validation before and after, speed.

    Args:
        log: of the run.
        step_tokens: tokens of one step.
        train: the domains that the new text is of.

    Returns:
        `loss`; `val` {domain: {before, after}}; `adaptation` {domain: change of its loss} of the domains
        that were trained on and `forgetting` of all others, replayed ones too: above 0 the model has
        become worse; `mri` {domain: {before: [each layer], after}}; `teacher` {before, after}, the divergence
        in the first and in the last step that had one, if any had; `seconds` (training steps alone) and
        `tokens_per_second`.
    """
    loss, seconds, tokens = None, 0.0, 0
    val: dict[str, dict[str, float]] = {}
    imbalance: dict[str, dict[str, list[float]]] = {}
    divergence: dict[str, float] = {}
    for row in log.rows():
        if "loss" in row:
            loss = row["loss"]
            if "teacher" in row:
                divergence = {"before": row["teacher"]} | divergence | {"after": row["teacher"]}
            seconds += step_tokens / max(row["tokens_per_second"], 1e-9)
            tokens += step_tokens
        for name, value in row.get("val", {}).items():
            val.setdefault(name, {"before": value})["after"] = value
        for name, routing in row.get("routing", {}).items():
            imbalance.setdefault(name, {"before": routing["mri"]})["after"] = routing["mri"]
    change = {name: value["after"] - value["before"] for name, value in val.items()}
    return {
        "loss": loss,
        "val": val,
        "adaptation": {name: value for name, value in change.items() if name in train},
        "forgetting": {name: value for name, value in change.items() if name not in train},
        "mri": imbalance,
        **({"teacher": divergence} if divergence else {}),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
    }
