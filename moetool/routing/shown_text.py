"""The first tokens of each text with the experts that took them, small enough for a page.

Shapes: E experts, K top-k, R ranks that are kept, L layers that are kept, T tokens of a text that are kept.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moetool.layers import evenly
from moetool.routing.alignment import Alignment
from moetool.routing.capture import Route
from moetool.routing.stats import RoutingStats
from moetool.routing.text_pass import Batch, Tokens
from moetool.routing.vocabulary import token_text

TOKENS = 2000  # of each text
PAGE_BYTES = 1_800_000  # of a page that the choices may take, in base64


class ShownText:
    """Choices of one model, or of two on the same tokens: an observer for each.

    Attributes:
        layers: that are kept; all, or as many as fit, evenly spread.
        num_ranks: R, the choices of a token that are kept, the one with the largest weight first.
    """

    def __init__(
        self,
        texts: Mapping[str, Tokens],
        max_tokens: int,
        models: Sequence[RoutingStats],
        alignment: Alignment | None = None,
    ) -> None:
        """Make room.

        Args:
            texts: that will be run.
            max_tokens: of each.
            models: have the shape of each model.
            alignment: of the experts of two models, where they do not correspond by their numbers.
        """
        self._texts, self._alignment = texts, alignment
        self._T = {name: min(text.num_tokens, max_tokens, TOKENS) for name, text in texts.items()}
        widest = max(model.num_experts for model in models)
        self._dtype = np.dtype("u1" if widest <= 256 else "<u2")
        tokens = sum(self._T.values()) * len(models)
        self.layers, self.num_ranks = _fitting(
            models[0].layers, min(model.top_k for model in models), tokens, self._dtype.itemsize + 1
        )
        L, R = len(self.layers), self.num_ranks
        self._row = {layer: row for row, layer in enumerate(self.layers)}
        self._experts = [{name: np.zeros((T, L, R), np.int64) for name, T in self._T.items()} for _ in models]
        self._weights = [{name: np.zeros((T, L, R)) for name, T in self._T.items()} for _ in models]
        # Of all K choices, as numbers of the model that both come from: which of them the other made, too.
        self._all = [{name: np.full((T, L, m.top_k), -1) for name, T in self._T.items()} for m in models]

    def observe(self, side: int, name: str, route: Route, batch: Batch) -> None:
        """Keep a route's choices for the first tokens, for the first (0) or second (1) model."""
        row, number = self._row.get(route.layer), min(len(batch.tokens_N), self._T[name] - batch.start)
        if row is None or number <= 0:
            return
        weights_TK, order_TK = route.weights_TK[:number].float().sort(dim=1, descending=True, stable=True)
        experts_TK = route.indices_TK[:number].gather(1, order_TK).cpu()
        part, R = slice(batch.start, batch.start + number), self.num_ranks
        self._experts[side][name][part, row] = experts_TK[:, :R].numpy()
        self._weights[side][name][part, row] = weights_TK[:, :R].cpu().numpy()
        if self._alignment:
            experts_TK = self._alignment.map(side, route.layer)[experts_TK]
        self._all[side][name][part, row] = experts_TK.numpy()

    def report(self, tokenizer: Any) -> dict[str, Any]:
        """The report's `text`.

        Returns:
            `layers` and `num_ranks`; `domains`: name -> `tokens` (texts) and `models`, one or two: `experts`, (T, L, R)
            numbers of `expert_bytes` bytes, little-endian, in base64; `weights`, likewise of one byte, times
            `weight_scale`; of two models `changed`, likewise (T, L, R) bits, the highest of a byte first, 1 where
            the other model did not choose this expert or a copy of it at any rank.
        """
        domains = {}
        for name, T in self._T.items():
            tokens = [token_text(tokenizer, int(token)) for token in self._texts[name].read(0, T)]
            models = []
            for side in range(len(self._experts)):
                weights = self._weights[side][name]
                scale = float(np.abs(weights).max(initial=0)) / 255 or 1.0
                model: dict[str, Any] = {
                    "experts": _packed(self._experts[side][name].astype(self._dtype)),
                    "weights": _packed(np.rint(np.clip(weights, 0, None) / scale).astype(np.uint8)),
                    "weight_scale": scale,
                }
                if len(self._experts) > 1:
                    own, other = self._all[side][name][:, :, : self.num_ranks], self._all[1 - side][name]
                    kept = (own[..., :, None] == other[..., None, :]).any(axis=-1)
                    model["changed"] = _packed(np.packbits(~kept.reshape(-1)))
                models.append(model)
            domains[name] = {"tokens": tokens, "models": models}
        return {
            "layers": self.layers,
            "num_ranks": self.num_ranks,
            "expert_bytes": self._dtype.itemsize,
            "domains": domains,
        }


def _fitting(layers: Sequence[int], top_k: int, tokens: int, size: int) -> tuple[list[int], int]:
    """Layers and ranks that fit: fewer ranks first, down to two, then fewer layers, evenly spread.

    Args:
        layers: of the model.
        top_k: K.
        tokens: of all texts and models.
        size: bytes of a choice.
    """
    room = PAGE_BYTES * 3 // 4 // max(1, tokens * size)  # choices of a token
    ranks = max(min(2, top_k), min(top_k, room // len(layers)))
    return evenly(layers, max(1, room // ranks)), ranks


def _packed(values: Any) -> str:
    return base64.b64encode(values.tobytes()).decode()
