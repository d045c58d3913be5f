"""How the units of a dense FFN are divided into parts, from their contributions on a text.

Any partition starts exactly as the dense model, because the sum over shards does not depend on the order of units.

Shapes: F units, G shards, T tokens; N units that are dealt, M shards that they are dealt to.
"""

from __future__ import annotations

import torch
from torch import Tensor


def by_activation(contribution_F: Tensor, shared: int, parts: int) -> Tensor:
    """The shard of each unit, int64 (F,): the first shards have the largest contributions, the others equal ones.

    Units are dealt in the order of their contribution, to one shard after the other, there and back, so that no shard
    always gets the larger one. MoEBERT (Zuo et al. 2022, arXiv 2204.07675, section 3) deals in one direction.

    Args:
        contribution_F: of each unit.
        shared: the first so many shards are shared by all tokens.
        parts: G, which divides F.
    """
    shard_F, rest_N = _with_shared(contribution_F, shared, parts)
    M = parts - shared
    place_N = torch.arange(len(rest_N))
    lap_N, place_N = place_N // M, place_N % M
    shard_F[rest_N] = shared + torch.where(lap_N % 2 == 0, place_N, M - 1 - place_N)
    return shard_F


def _with_shared(contribution_F: Tensor, shared: int, parts: int) -> tuple[Tensor, Tensor]:
    """Shards, of which only the shared ones have got units; and the other units by contribution, the largest first."""
    F = len(contribution_F)
    size = F // parts
    ranked_F = contribution_F.sort(descending=True, stable=True).indices
    shard_F = torch.full((F,), -1)
    shard_F[ranked_F[: shared * size].sort().values] = torch.arange(shared * size) // size
    return shard_F, ranked_F[shared * size :]
