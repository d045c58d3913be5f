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
from moetool.routing.alignment import Alignment
from moetool.routing.capture import Route
from moetool.routing.load_metrics import Array
from moetool.routing.report import domain_entry
from moetool.routing.stats import RoutingStats
from moetool.routing.text_pass import Batch, Tokens

# Of the shape of two models (see `check_shapes`), what copying and leaving out experts changes.
MAY_DIFFER = ("the number of experts", "top-k")


class RouteFile:
    """The first checkpoint's choices, kept in a temporary file until the second has read them.

    So one model is in memory at a time, and memory does not grow with the text. The file has no name:
    it goes with the process, however that ends.

    Attributes:
        size: bytes on disk.
    """

    def __init__(
        self,
        folder: Path,
        texts: Mapping[str, Tokens],
        max_tokens: int,
        like: RoutingStats,
        alignment: Alignment | None = None,
    ) -> None:
        self.like, self.alignment = like, alignment
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
        A = alignment.num_originals if alignment else like.num_experts
        self._reached = {name: {layer: torch.zeros(A, dtype=torch.int64) for layer in like.layers} for name in texts}

    def write(self, name: str, route: Route, batch: Batch) -> None:
        """Observer of the first checkpoint."""
        N = len(batch.tokens_N)
        self._routes[name][self._row[route.layer], batch.start : batch.start + N] = route.indices_TK[:N].cpu().numpy()

    def compare(self, name: str, route: Route, batch: Batch) -> None:
        """Observer of the second checkpoint."""
        N = len(batch.tokens_N)
        layer, now_NK = route.layer, route.indices_TK[:N]
        before = self._routes[name][self._row[layer], batch.start : batch.start + N].astype(np.int64)
        before_NK = torch.from_numpy(before).to(now_NK.device)
        if self.alignment:
            first_E, second_E = (self.alignment.map(side, layer).to(now_NK.device) for side in (0, 1))
            before_NK, now_NK = first_E[before_NK], second_E[now_NK]
        reached_NA = torch.zeros(N, len(self._reached[name][layer]), dtype=torch.bool, device=now_NK.device)
        reached_NA.scatter_(1, now_NK, torch.ones((), dtype=torch.bool, device=now_NK.device).expand(now_NK.shape))
        kept, reached_A = reached_NA.gather(1, before_NK).sum(), reached_NA.sum(0)
        self._kept[name][layer] = self._kept[name][layer].to(kept.device) + kept
        self._reached[name][layer] = self._reached[name][layer].to(kept.device) + reached_A

    def saturation(self, name: str, num_tokens: int) -> list[float]:
        """Share of a token's K experts that both checkpoints choose, mean over tokens, per layer.

        Continual router saturation of arXiv 2503.05029 and OLMoE (arXiv 2409.02060, section 5.1):
        1 where every choice stayed. A copy counts as its original.
        """
        return [int(kept) / (num_tokens * self.like.top_k) for kept in self._kept[name].values()]

    def reached(self, name: str, num_tokens: int) -> Array:
        """Share of tokens for which the second checkpoint chooses an expert of the first, or a copy of it: (L, A)."""
        reached_LA = torch.stack([reached_A.cpu() for reached_A in self._reached[name].values()])
        return reached_LA.double().numpy() / num_tokens


def check_shapes(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuse a second checkpoint of another shape.

    Args:
        name: of the second, as the user named it.
        one: what of the first -> value.
        other: of the second what must be the same; a value of None is not known.

    Raises:
        ConfigError: one differs.
    """
    for what, theirs in other.items():
        ours = one[what]
        if ours != theirs and ours is not None and theirs is not None:
            # These two may differ where moetool.json says how.
            why = what in MAY_DIFFER and ", and moetool.json does not record a model that both were made from by cpt,"
            why = f"{why} grow or prune, so their experts cannot be lined up" if why else ""
            raise ConfigError(
                f"--compare {name}: the models differ in {what} ({ours} and {theirs}){why}; compare checkpoints of one"
                " model"
            )


def saturation_by_chance(load_LA: Array, reached_LA: Array) -> list[float]:
    """The saturation of two routers that choose each expert as often, but have nothing else in common: sum_i f_i r_i.

    K sum_i f_i g_i without copies; K / E where both are balanced.

    Args:
        load_LA: f, the share of the first one's routes that go to each expert.
        reached_LA: r, the share of tokens for which the second one chooses it: K g_i, where g is its load.
    """
    return [float(value) for value in (load_LA * reached_LA).sum(axis=1)]


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
    alignment = routes.alignment
    for name, sums in after.items():
        domains[name] = entry = domain_entry(sums)
        loads = [load_metrics.load(before[name]), load_metrics.load(sums)]
        loads = [alignment.pooled(side, load_LE) for side, load_LE in enumerate(loads)] if alignment else loads
        columns = {
            "saturation": routes.saturation(name, sums.num_tokens),
            "saturation_by_chance": saturation_by_chance(loads[0], routes.reached(name, sums.num_tokens)),
            "mri_change": [
                new - old for new, old in zip(load_metrics.mri(sums), load_metrics.mri(before[name]), strict=True)
            ],
            "load_divergence": load_metrics.divergence(*loads),
        }
        for row, layer in enumerate(entry["layers"]):
            layer |= {key: values[row] for key, values in columns.items()}
    first = next(iter(after.values()))
    return {
        "model": model,
        "num_experts": first.num_experts,
        "top_k": first.top_k,
        "experts": alignment.describe() if alignment else None,
        "domains": domains,
        "vocabulary_specialization": vocabulary,
        "drift": list(drift),
        "upcycling": upcycling,
    }
