"""Which experts are chosen together, over all pairs of the top-k, against chance.

Shapes: E experts, L layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moetool.routing.load_metrics import Array
from moetool.routing.stats import RoutingStats

# Whole matrices are written for at most so many experts; the strongest pairs for any number.
MATRIX_EXPERTS = 64
NUM_PAIRS = 10


def expected_pairs(counts_LE: np.ndarray, top_k: int) -> Array:
    """How often two experts would be chosen together if nothing but their loads decided.

    Quasi-independence: the symmetric table with a zero diagonal, e_ij = a_i a_j, whose rows sum to
    those of the true pairs, N_i (K - 1). A busy expert thus meets every other often, and no expert
    meets itself. With balanced loads e_ij / N_i = (K - 1) / (E - 1).

    Args:
        counts_LE: tokens of each expert N_i.
        top_k: K.

    Returns:
        (L, E, E) tokens, symmetric.
    """
    rows_LE = counts_LE.astype(np.float64) * (top_k - 1)
    a_LE = rows_LE / np.sqrt(np.maximum(rows_LE.sum(axis=1, keepdims=True), 1))
    for _ in range(1000):  # far more than needed unless an expert is in every pair, where the limit is at infinity
        others_LE = a_LE.sum(axis=1, keepdims=True) - a_LE
        ratio_LE = np.divide(rows_LE, a_LE * others_LE, out=np.ones_like(a_LE), where=(a_LE > 0) & (others_LE > 0))
        a_LE = a_LE * np.sqrt(ratio_LE)
        if np.abs(ratio_LE - 1).max(initial=0) < 1e-9:
            break
    pairs_LEE: Array = a_LE[:, :, None] * a_LE[:, None, :]
    pairs_LEE[:, np.arange(a_LE.shape[1]), np.arange(a_LE.shape[1])] = 0
    return pairs_LEE


def coactivation(stats: RoutingStats) -> list[dict[str, Any]] | None:
    """The report's entry of one domain; None when one expert per token is chosen.

    For each layer: `matrix[i][j]` = N_ij / N_i, the share of expert i's tokens that expert j takes as
    well (asymmetric, rows sum to K - 1), `expected` the same by chance, both null for more than
    `MATRIX_EXPERTS` experts; `distance`, half the sum of |pairs - expected pairs| over all pairs, from
    0 (chance) to 1; and the pairs that exceed chance most by (N_ij - e_ij) / sqrt(e_ij).
    """
    if stats.top_k == 1:
        return None
    expected_LEE = expected_pairs(stats.counts_LE, stats.top_k)
    rows = []
    for layer, together_EE, expected_EE in zip(stats.layers, stats.coactivation_LEE, expected_LEE, strict=True):
        counts_E = together_EE.diagonal().astype(np.float64)
        pairs_EE = together_EE.astype(np.float64)
        np.fill_diagonal(pairs_EE, 0)
        total = pairs_EE.sum()
        rows.append(
            {
                "layer": layer,
                "distance": float(np.abs(pairs_EE - expected_EE).sum() / (2 * total)) if total else 0.0,
                "matrix": _shares(pairs_EE, counts_E),
                "expected": _shares(expected_EE, counts_E),
                "pairs": _strongest(pairs_EE, expected_EE, stats.num_tokens),
            }
        )
    return rows


def _shares(pairs_EE: Array, counts_E: Array) -> list[list[float]] | None:
    if len(counts_E) > MATRIX_EXPERTS:
        return None
    return np.round(pairs_EE / np.maximum(counts_E, 1)[:, None], 4).tolist()  # type: ignore[no-any-return]


def _strongest(pairs_EE: Array, expected_EE: Array, num_tokens: int) -> list[dict[str, Any]]:
    # One token more on both sides, so that a pair that chance never makes does not win by one meeting.
    excess_EE = np.triu((pairs_EE - expected_EE) / np.sqrt(expected_EE + 1), k=1)
    order = np.argsort(-excess_EE, axis=None, kind="stable")[:NUM_PAIRS]
    best = [divmod(int(place), len(pairs_EE)) for place in order if excess_EE.flat[place] > 0]
    return [
        {
            "experts": [i, j],
            "share": float(pairs_EE[i, j] / max(num_tokens, 1)),
            "expected": float(expected_EE[i, j] / max(num_tokens, 1)),
        }
        for i, j in best
    ]
