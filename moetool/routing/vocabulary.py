"""Which experts process which tokens: vocabulary specialisation.

Shapes: E experts, L layers, N tokens of a batch, U distinct tokens of all texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetool.routing.alignment import Alignment
from moetool.routing.capture import Route
from moetool.routing.load_metrics import Array
from moetool.routing.stats import RoutingStats
from moetool.routing.text_pass import Batch, Tokens

NUM_TOKENS = 8  # shown for each expert
MIN_OCCURRENCES = 10  # a token that is rarer is not shown: one visit would make it a speciality
_READ = 1 << 20


class TokenCounts:
    """How often each expert took each distinct token, and how often it preceded each.

    The counts lie in CPU memory, 8 bytes for each distinct token, expert and layer; their size depends
    on the texts' vocabulary, not on their length.

    Attributes:
        layers: the layers that are counted.
        size: bytes of the counts.
    """

    def __init__(
        self,
        texts: Mapping[str, Tokens],
        max_tokens: int,
        like: RoutingStats,
        layers: Sequence[int],
        alignment: Alignment | None = None,
    ) -> None:
        """Make the tables.

        Args:
            texts: that are going to be counted.
            max_tokens: of each.
            like: has the model's shape.
            layers: that are counted.
            alignment: the model is the second of it, and each original is counted once per token instead of its copies.
        """
        self.types_U = distinct_tokens(texts, max_tokens)
        self.layers = list(layers)
        self.num_experts, self.top_k = alignment.num_originals if alignment else like.num_experts, like.top_k
        self._originals = {layer: alignment.map(1, layer) for layer in layers} if alignment else {}
        shape = (len(self.types_U), self.num_experts)
        self._counts: dict[str, dict[int, Tensor]] = {
            kind: {layer: torch.zeros(shape, dtype=torch.int32) for layer in self.layers} for kind in ("input", "next")
        }
        self._totals = {kind: np.zeros(len(self.types_U), dtype=np.int64) for kind in ("input", "next")}
        self.size = table_size(len(self.types_U), self.num_experts, len(self.layers))

    def observe(self, name: str, route: Route, batch: Batch) -> None:
        """Count the routes of a batch."""
        if route.layer not in self._counts["input"]:
            return
        for kind, tokens in (("input", batch.tokens_N), ("next", batch.next_N)):
            rows_N = np.searchsorted(self.types_U, tokens)
            experts_NK = route.indices_TK[: len(tokens)].cpu()
            once_NK = torch.ones(1, dtype=torch.int32).expand(experts_NK.shape)
            if route.layer in self._originals:
                experts_NK = self._originals[route.layer][experts_NK].sort(dim=1).values
                once_NK = torch.ones_like(experts_NK, dtype=torch.int32)
                once_NK[:, 1:] = experts_NK[:, 1:] != experts_NK[:, :-1]
            places = torch.from_numpy(rows_N)[:, None] * self.num_experts + experts_NK
            counts = self._counts[kind][route.layer].view(-1)
            counts.scatter_add_(0, places.flatten(), once_NK.flatten())
            if route.layer == self.layers[0]:
                np.add.at(self._totals[kind], rows_N, 1)

    def counts_UE(self, kind: str, layer: int) -> Array:
        """Visits of each distinct token (`kind` input) or of its predecessor (next) to each expert."""
        return self._counts[kind][layer].numpy().astype(np.float64)

    def totals_U(self, kind: str) -> Array:
        """Occurrences of each distinct token."""
        return self._totals[kind].astype(np.float64)

    def report(self, tokenizer: Any, load_LE: Array) -> dict[str, Any]:
        """The report's `vocabulary_specialization`, over all texts together.

        For each layer, for the input token and the next token, specialisation as the mean over tokens x
        of max_i N_xi / N_x, the largest share of x's occurrences that one expert takes: `by_type` over
        distinct tokens (as in OLMoE, arXiv 2409.02060, section 5.4, there of the top-1 expert) and
        `by_occurrence` weighted by N_x. From K / E to 1. `by_chance` is what routing that ignores the
        token gives by occurrence in a long text: the layer's mri.

        Args:
            tokenizer: decodes token ids.
            load_LE: load of the counted layers over all texts.
        """
        rows = []
        for layer, load_E in zip(self.layers, load_LE, strict=True):
            row: dict[str, Any] = {"layer": layer, "by_chance": float(load_E.max() * self.top_k)}
            for kind in ("input", "next"):
                best_U = self.counts_UE(kind, layer).max(axis=1)
                row[kind] = _means(best_U, self.totals_U(kind))
            row["experts"] = self._favourites(layer, tokenizer)
            rows.append(row)
        return {
            "num_types": int((self.totals_U("input") > 0).sum()),
            "num_tokens": int(self.totals_U("input").sum()),
            "layers": rows,
        }

    def _favourites(self, layer: int, tokenizer: Any) -> list[dict[str, Any]]:
        """For each expert the tokens of which it takes the largest share; the more frequent first if equal."""
        counts_UE, totals_U = self.counts_UE("input", layer), self.totals_U("input")
        often = np.flatnonzero(totals_U >= MIN_OCCURRENCES)
        experts = []
        for expert in range(self.num_experts):
            share = counts_UE[often, expert] / totals_U[often]
            order = np.lexsort((-totals_U[often], -share))[:NUM_TOKENS]
            tokens = [
                {
                    "id": int(self.types_U[often[i]]),
                    "text": token_text(tokenizer, int(self.types_U[often[i]])),
                    "count": int(counts_UE[often[i], expert]),
                    "share": float(share[i]),
                }
                for i in order
                if share[i] > 0
            ]
            experts.append({"expert": expert, "tokens": tokens})
        return experts


def continual_specialization(
    before: TokenCounts, after: TokenCounts, alignment: Alignment | None = None
) -> dict[str, Any]:
    """Continual vocabulary specialisation (arXiv 2503.05029): does a token still go where it went?

    Each token is mapped to the expert that took it most often in the first checkpoint; the value is the
    share of its occurrences that this expert, or a copy of it, takes in the second. `before` is the same share in the
    first checkpoint, where it is the specialisation itself.
    """
    rows = []
    for layer in before.layers:
        row: dict[str, Any] = {"layer": layer}
        for kind in ("input", "next"):
            first_UE, second_UE = before.counts_UE(kind, layer), after.counts_UE(kind, layer)
            home_U = first_UE.argmax(axis=1)
            if alignment:
                home_U = alignment.map(0, layer).numpy()[home_U]
            stayed_U = np.take_along_axis(second_UE, home_U[:, None], axis=1)[:, 0]
            totals_U = before.totals_U(kind)
            row[kind] = _means(stayed_U, totals_U) | {"before": _means(first_UE.max(axis=1), totals_U)}
        rows.append(row)
    return {"layers": rows}


def _means(hits_U: Array, totals_U: Array) -> dict[str, float]:
    seen_U = totals_U > 0
    if not seen_U.any():
        return {"by_type": 0.0, "by_occurrence": 0.0}
    shares = hits_U[seen_U] / totals_U[seen_U]
    return {"by_type": float(shares.mean()), "by_occurrence": float(hits_U.sum() / totals_U.sum())}


def distinct_tokens(texts: Mapping[str, Tokens], max_tokens: int) -> np.ndarray:
    """The distinct tokens of the first `max_tokens` of each text and the one after them, ascending."""
    seen: np.ndarray = np.zeros(0, dtype=np.int64)
    for text in texts.values():
        total = min(text.num_tokens, max_tokens + 1)
        for start in range(0, total, _READ):
            seen = np.union1d(seen, text.read(start, min(_READ, total - start)))
    return seen


def table_size(num_types: int, num_experts: int, num_layers: int) -> int:
    """Bytes that `TokenCounts` takes."""
    return 2 * 4 * num_types * num_experts * num_layers


def token_text(tokenizer: Any, token: int) -> str:
    """A token as text; the tokenizer's own name for it where it is a piece of a character."""
    text = str(tokenizer.decode([token]))
    return str(tokenizer.convert_ids_to_tokens(token)) if "�" in text else text
