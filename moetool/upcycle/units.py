"""How the units of a dense FFN are dealt to shards, from what they do on a text.

Any partition starts exactly as the dense model, because the sum over shards does not depend on the order of units.

Shapes: F units, G shards, T tokens; N units that are dealt, M shards that they are dealt to.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRING = 16  # a token fires one unit in so many
ROUNDS = 10  # of k-means
STARTS = 4  # of k-means


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


def by_cluster(contribution_F: Tensor, fired_FT: Tensor, shared: int, parts: int, draw: torch.Generator) -> Tensor:
    """The shard of each unit, int64 (F,): as `by_activation`, but the others hold units that fire on the same tokens.

    After CMoE (Pei et al. 2025, arXiv 2502.04416, section 3), with several rounds of k-means.

    Args:
        contribution_F: of each unit.
        fired_FT: bool, see `fired`.
        shared: the first so many shards are shared by all tokens.
        parts: G, which divides F.
        draw: of this layer's own.
    """
    shard_F, rest_N = _with_shared(contribution_F, shared, parts)
    rest_N = rest_N.sort().values
    shard_F[rest_N] = shared + balanced_clusters(fired_FT[rest_N].float(), parts - shared, draw)
    return shard_F


def _with_shared(contribution_F: Tensor, shared: int, parts: int) -> tuple[Tensor, Tensor]:
    """Shards, of which only the shared ones have got units; and the other units by contribution, the largest first."""
    F = len(contribution_F)
    size = F // parts
    ranked_F = contribution_F.sort(descending=True, stable=True).indices
    shard_F = torch.full((F,), -1)
    shard_F[ranked_F[: shared * size].sort().values] = torch.arange(shared * size) // size
    return shard_F, ranked_F[shared * size :]


def fired(units_TF: Tensor, mean_F: Tensor) -> Tensor:
    """Which units fire on which tokens, bool (F, T): a sixteenth of them, with the largest |h| in relation to its mean.

    CMoE takes the largest |h| with inputs and rows of norm 1. A unit's own mean does the same, whatever its scale.

    Args:
        units_TF: h = act(gate x) * up x.
        mean_F: the mean of |h| over a text.
    """
    T, F = units_TF.shape
    relative_TF = torch.where(mean_F > 0, units_TF.abs().double() / mean_F, 0)
    largest_TK = relative_TF.topk(max(1, F // FIRING), dim=1).indices
    fired_TF = torch.zeros(T, F, dtype=torch.bool).scatter_(1, largest_TK, True)
    return fired_TF.T.contiguous()


def balanced_clusters(points_NT: Tensor, clusters: int, draw: torch.Generator) -> Tensor:
    """Spherical k-means with clusters of equal size: the cluster of each point, int64 (N,).

    The best of a few starts, by the sum of cosines to the centres; each is k-means++ (Arthur and Vassilvitskii 2007).

    Args:
        points_NT: their number is a multiple of that of the clusters.
        clusters: M.
        draw: of all starts.
    """
    points_NT = torch.nn.functional.normalize(points_NT, dim=1)
    size, best, label_N = len(points_NT) // clusters, -1.0, torch.empty(0)
    for _ in range(STARTS if clusters > 1 else 1):
        cosine_NM = points_NT @ _first_centres(points_NT, clusters, draw).T
        for _ in range(ROUNDS):
            found_N = assign_balanced(cosine_NM, size)
            total = float(cosine_NM.gather(1, found_N[:, None]).sum())
            if total > best:
                best, label_N = total, found_N
            sums_MT = torch.zeros(clusters, points_NT.shape[1]).index_add_(0, found_N, points_NT)
            cosine_NM = points_NT @ torch.nn.functional.normalize(sums_MT, dim=1).T
    return label_N


def _first_centres(points_NT: Tensor, clusters: int, draw: torch.Generator) -> Tensor:
    """Points (M, T), each drawn with a probability by its squared distance from those before."""
    distance_N = torch.ones(len(points_NT))
    chosen: list[int] = []
    for _ in range(clusters):
        chances_N = distance_N if float(distance_N.sum()) > 0 else torch.ones(len(points_NT))
        chosen.append(int(torch.multinomial(chances_N, 1, generator=draw)))
        distance_N = torch.minimum(distance_N, (1 - points_NT @ points_NT[chosen[-1]]).clamp(min=0))
        distance_N[chosen] = 0
    return points_NT[chosen]


def assign_balanced(score_NM: Tensor, size: int) -> Tensor:
    """A cluster of each point, int64 (N,), with `size` points each, that has a large sum of scores.

    In rounds, all points that are left go to the best cluster that has room; a cluster with too many takes those that
    would lose most elsewhere. Each round fills a cluster or ends, so there are at most M.

    Args:
        score_NM: of each point in each cluster; N = M x size.
        size: of a cluster.
    """
    N, M = score_NM.shape
    label_N, room = torch.full((N,), -1), [size] * M
    while len(left := (label_N < 0).nonzero()[:, 0]):
        closed_M = torch.tensor([not one for one in room])
        open_score = score_NM[left].masked_fill(closed_M, -torch.inf)
        two = open_score.topk(min(2, M), dim=1)
        loss, wanted = two.values[:, 0] - two.values[:, -1], two.indices[:, 0]
        for cluster in range(M):
            those = (wanted == cluster).nonzero()[:, 0]
            taken = those[loss[those].sort(descending=True, stable=True).indices[: room[cluster]]]
            label_N[left[taken]] = cluster
            room[cluster] -= len(taken)
    return label_N
