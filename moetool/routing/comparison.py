"""Two checkpoints on the same tokens: which routes stayed, and how far the weights moved.

Shapes: E experts, K top-k, L layers, N tokens of a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moetool.checkpoint.folder import unnamed_file
from moetool.errors import ConfigError
from moetool.routing import load_metrics
from moetool.routing.capture import Route
from moetool.routing.report import domain_entry
from moetool.routing.stats import RoutingStats
from moetool.routing.text_pass import Batch, Tokens


class RouteFile:
    """The first checkpoint's choices, kept in a temporary file until the second has read them.

    So one model is in memory at a time, and memory does not grow with the text. The file has no name:
    it goes with the process, however that ends.

    Attributes:
        size: bytes on disk.
    """

    def __init__(self, folder: Path, texts: Mapping[str, Tokens], max_tokens: int, like: RoutingStats) -> None:
        self.like = like
        dtype = np.uint8 if like.num_experts <= 256 else np.uint16
        shapes = {
            name: (len(like.layers), min(text.num_tokens, max_tokens), like.top_k) for name, text in texts.items()
        }
        self.size = sum(int(np.prod(shape)) for shape in shapes.values()) * np.dtype(dtype).itemsize
        folder.mkdir(parents=True, exist_ok=True)
        self._routes = {
            name: np.memmap(
                unnamed_file(folder, int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype, "r+", shape=shape
            )
            for name, shape in shapes.items()
        }
        self._row = {layer: row for row, layer in enumerate(like.layers)}
        self._kept = {name: {layer: torch.zeros((), dtype=torch.int64) for layer in like.layers} for name in texts}

    def write(self, name: str, route: Route, batch: Batch) -> None:
        """Observer of the first checkpoint."""
        N = len(batch.tokens_N)
        self._routes[name][self._row[route.layer], batch.start : batch.start + N] = route.indices_TK[:N].cpu().numpy()

    def compare(self, name: str, route: Route, batch: Batch) -> None:
        """Observer of the second checkpoint."""
        N = len(batch.tokens_N)
        before_NK = self._routes[name][self._row[route.layer], batch.start : batch.start + N].astype(np.int64)
        now_NK = route.indices_TK[:N]
        same = torch.from_numpy(before_NK).to(now_NK.device)[:, :, None] == now_NK[:, None, :]
        self._kept[name][route.layer] = self._kept[name][route.layer].to(now_NK.device) + same.sum()

    def saturation(self, name: str, num_tokens: int) -> list[float]:
        """Share of a token's K experts that both checkpoints choose, mean over tokens, per layer.

        Continual router saturation of arXiv 2503.05029 and OLMoE (arXiv 2409.02060, section 5.1):
        1 where every choice stayed.
        """
        return [int(kept) / (num_tokens * self.like.top_k) for kept in self._kept[name].values()]


def check_shapes(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuse a second checkpoint of another shape.

    Args:
        name: of the second, as the user named it.
        one: what of the first -> value.
        other: the same of the second; a value of None is not known.

    Raises:
        ConfigError: one differs.
    """
    for what, ours in one.items():
        theirs = other[what]
        if ours != theirs and ours is not None and theirs is not None:
            raise ConfigError(
                f"--compare {name}: the models differ in {what} ({ours} and {theirs}); compare checkpoints of one model"
            )


def saturation_by_chance(one: RoutingStats, other: RoutingStats) -> list[float]:
    """The saturation of two routers that have these loads but nothing else in common: K sum_i f_i g_i.

    K / E where both are balanced.
    """
    values = one.top_k * (load_metrics.load(one) * load_metrics.load(other)).sum(axis=1)
    return [float(value) for value in values]


def build_comparison(
    model: str,
    before: Mapping[str, RoutingStats],
    after: Mapping[str, RoutingStats],
    routes: RouteFile,
    drift: Sequence[dict[str, Any]],
    vocabulary: dict[str, Any] | None = None,
    upcycling: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The report's `comparison`.

    Args:
        model: the second checkpoint, as the user named it.
        before: domain -> sums of the first.
        after: the same of the second.
        routes: after both passes.
        drift: from `drift.drift`.
        vocabulary: from `vocabulary.continual_specialization`.
        upcycling: of the second, from `upcycling.build_upcycling`.
    """
    domains: dict[str, Any] = {}
    for name, sums in after.items():
        domains[name] = entry = domain_entry(sums)
        columns = {
            "saturation": routes.saturation(name, sums.num_tokens),
            "saturation_by_chance": saturation_by_chance(before[name], sums),
            "mri_change": [
                new - old for new, old in zip(load_metrics.mri(sums), load_metrics.mri(before[name]), strict=True)
            ],
            "load_divergence": load_metrics.domain_divergence(before[name], sums),
        }
        for row, layer in enumerate(entry["layers"]):
            layer |= {key: values[row] for key, values in columns.items()}
    return {
        "model": model,
        "domains": domains,
        "vocabulary_specialization": vocabulary,
        "drift": list(drift),
        "upcycling": upcycling,
    }
