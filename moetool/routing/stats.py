"""Route counts as plain sums: two parts of a text, or two processes, merge by addition.

Shapes: T tokens, E experts, K top-k, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moetool.errors import CheckpointError
from moetool.routing.capture import Route


class _Sums(NamedTuple):
    """Sums of one layer: routes to each expert, probability of each, tokens for which two were both chosen."""

    counts_E: Tensor  # int64
    probability_E: Tensor  # float64
    coactivation_EE: Tensor  # int64; its diagonal is counts_E


def _zeros(E: int) -> _Sums:
    return _Sums(
        torch.zeros(E, dtype=torch.int64), torch.zeros(E, dtype=torch.float64), torch.zeros(E, E, dtype=torch.int64)
    )


class RoutingStats:
    """Sums of routes over tokens; their memory does not grow with the text.

    Sums stay on the device where the routes were made until they are read, so that counting waits for
    no device.

    Attributes:
        layers: indices of the decoder layers, ascending.
        num_experts: routed experts per layer (shared experts are not routed and not counted).
        top_k: experts per token.
        num_tokens: tokens counted.
    """

    def __init__(
        self,
        layers: Iterable[int],
        num_experts: int,
        top_k: int,
        num_tokens: int = 0,
        sums: Mapping[int, _Sums] | None = None,
    ) -> None:
        self.layers = list(layers)
        self.num_experts = num_experts
        self.top_k = top_k
        self.num_tokens = num_tokens
        self._sums = dict(sums) if sums else {layer: _zeros(num_experts) for layer in self.layers}

    @classmethod
    def like(cls, routes: list[Route]) -> RoutingStats:
        """Empty stats that fit the routes of one forward."""
        first = routes[0]
        return cls([route.layer for route in routes], first.logits_TE.shape[-1], first.indices_TK.shape[-1])

    @torch.no_grad()
    def update(self, routes: Iterable[Route], mask_T: Tensor | None = None) -> None:
        """Add the routes of a batch (all layers at once or one after the other, in any order).

        Args:
            routes: what the routers did.
            mask_T: bool; False leaves a token out (padding).

        Raises:
            CheckpointError: a layer has another number of experts or top-k than these stats.
        """
        for route in routes:
            E, K = route.logits_TE.shape[-1], route.indices_TK.shape[-1]
            if (self.num_experts, self.top_k) != (E, K):
                raise CheckpointError(
                    f"layer {route.layer} routes to {K} of {E} experts, layer {self.layers[0]} to {self.top_k} of"
                    f" {self.num_experts}; layers that differ cannot be analysed together"
                )
            # float32 sums of ones are exact below 2**24 tokens, far beyond any batch.
            chosen_TE = torch.zeros_like(route.logits_TE, requires_grad=False)
            chosen_TE.scatter_(1, route.indices_TK, 1.0)
            probabilities_TE = route.probabilities_TE()
            num_tokens = len(chosen_TE)
            if mask_T is not None:
                mask_T1 = mask_T.reshape(-1, 1).to(chosen_TE.device)
                chosen_TE = chosen_TE * mask_T1
                probabilities_TE = probabilities_TE * mask_T1
                # Where the mask lies on the CPU this waits for no device.
                num_tokens = int(mask_T.sum()) if route.layer == self.layers[0] else 0
            if route.layer == self.layers[0]:
                self.num_tokens += num_tokens
            # Batches are added up in double precision; some devices (MPS) have none, so they go to the CPU.
            to = "cpu" if chosen_TE.device.type == "mps" else chosen_TE.device
            with torch.autocast(chosen_TE.device.type, enabled=False):  # bf16 would round the counts
                together_EE = (chosen_TE.T @ chosen_TE).to(to)
            sums = self._sums[route.layer] = _Sums(*(total.to(to) for total in self._sums[route.layer]))
            sums.counts_E.add_(together_EE.diagonal().long())
            sums.probability_E.add_(probabilities_TE.to(to).sum(dim=0, dtype=torch.float64))
            sums.coactivation_EE.add_(together_EE.long())

    def _stack(self, part: Callable[[_Sums], Tensor]) -> np.ndarray[Any, np.dtype[Any]]:
        return np.stack([part(self._sums[layer]).cpu().numpy() for layer in self.layers])

    @property
    def counts_LE(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens routed to each expert; a layer's sum is num_tokens x top_k."""
        return self._stack(lambda sums: sums.counts_E)

    @property
    def probability_LE(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Sums over tokens of the router's probability of each expert; a layer's sum is num_tokens."""
        return self._stack(lambda sums: sums.probability_E)

    @property
    def coactivation_LEE(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens for which both experts were chosen; the diagonal is `counts_LE`."""
        return self._stack(lambda sums: sums.coactivation_EE)

    @property
    def has_pairs(self) -> bool:
        """Whether pairs were counted; another engine's counts of routes have none."""
        return any(bool(sums.coactivation_EE.any()) for sums in self._sums.values())

    def __add__(self, other: RoutingStats) -> RoutingStats:
        """The stats of both texts together.

        Raises:
            ValueError: they are of models with other layers, experts or top-k.
        """
        ours, theirs = ((stats.layers, stats.num_experts, stats.top_k) for stats in (self, other))
        if ours != theirs:
            raise ValueError(f"stats of different models cannot be added: {ours} and {theirs}")
        sums = {
            layer: _Sums(*(mine + its.to(mine.device) for mine, its in zip(own, other._sums[layer], strict=True)))
            for layer, own in self._sums.items()
        }
        return RoutingStats(*ours, self.num_tokens + other.num_tokens, sums)

    @classmethod
    def from_arrays(cls, layers: Iterable[int], top_k: int, arrays: Mapping[str, Tensor]) -> RoutingStats:
        """Stats of sums: `num_tokens` (), `counts` (L, E), `probability` (L, E) and `coactivation` (L, E, E)."""
        parts = arrays["counts"].long(), arrays["probability"].double(), arrays["coactivation"].long()
        sums = {layer: _Sums(*rows) for layer, rows in zip(layers, zip(*parts, strict=True), strict=True)}
        return cls(sums, parts[0].shape[-1], top_k, int(arrays["num_tokens"]), sums)
