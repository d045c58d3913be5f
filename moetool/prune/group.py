"""Groups of experts that become one: how they are found (REAM, arXiv 2604.04356), and how a lineage records them.

Shapes: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from moetool.errors import CheckpointError
from moetool.lineage import LINEAGE
from moetool.outside import fits

GROUP_SIZE = 16  # experts in a group at most: the paper's C
DECIMALS = 6  # of a weight: it is the same where sums are rounded otherwise, and readable


@dataclass(frozen=True)
class Group:
    """Experts that become one.

    Attributes:
        experts: the one that is kept (the centroid), then those merged into it.
        weights: of each; their sum is 1.
    """

    experts: Sequence[int]
    weights: Sequence[float]


def group_up(
    distance_EE: Tensor,
    kept: Sequence[int],
    saliency: Sequence[float],
    within: Sequence[range],
    apart: Sequence[int],
) -> list[Group]:
    """The most salient kept expert takes the nearest of those left out until its group is full, then the next one does.

    An expert of no saliency is in no group: its weight would be 0. Of equal ones the first comes first.

    Args:
        distance_EE: between experts.
        kept: experts.
        saliency: of all experts; weights are proportional to it.
        within: groups of experts that do not mix.
        apart: experts that take no others.

    Returns:
        The groups of more than one expert, by the number of the one that is kept.
    """
    free = {expert for expert, one in enumerate(saliency) if one > 0} - set(kept)
    found = []
    for centroid in sorted(kept, key=lambda expert: (-saliency[expert], expert)):
        if centroid in apart or not saliency[centroid] > 0:
            continue
        (near,) = (free.intersection(one) for one in within if centroid in one)
        members = sorted(near, key=lambda expert: (float(distance_EE[centroid, expert]), expert))[: GROUP_SIZE - 1]
        free -= set(members)
        if members:
            total = saliency[centroid] + sum(saliency[expert] for expert in members)
            weights = [round(saliency[expert] / total, DECIMALS) for expert in members]
            found.append(Group([centroid, *members], [round(1 - sum(weights), DECIMALS), *weights]))
    return sorted(found, key=lambda group: group.experts[0])


def recorded_groups(groups: Mapping[int, Sequence[Group]]) -> list[list[dict[str, Any]]]:
    """Their record in a lineage entry, as JSON: a list for each layer with experts."""
    return [[asdict(group) for group in those] for those in groups.values()]


def read_groups(recorded: Any, kept: Mapping[int, Sequence[int]], num_experts: int) -> dict[int, list[Group]]:
    """The inverse of `recorded_groups`.

    Args:
        recorded: of a lineage entry.
        kept: layer -> experts that are kept, of the same entry.
        num_experts: before.

    Raises:
        CheckpointError: it is damaged.
    """
    if not isinstance(recorded, list) or len(recorded) != len(kept):
        raise _damaged(recorded)
    return {layer: _read(those, kept[layer], num_experts) for layer, those in zip(kept, recorded, strict=True)}


def _read(recorded: Any, kept: Sequence[int], num_experts: int) -> list[Group]:
    free = set(range(num_experts)) - set(kept)
    centroids = set(kept)
    if recorded != [] and not fits(recorded, [{"experts": [int], "weights": [float]}]):
        raise _damaged(recorded)
    groups = [Group(one["experts"], one["weights"]) for one in recorded]
    for group in groups:
        centroid, *members = group.experts
        sound = centroid in centroids and members and len(set(members)) == len(members) and free.issuperset(members)
        if not sound or len(group.weights) != len(group.experts) or not math.isclose(sum(group.weights), 1):
            raise _damaged(recorded)
        centroids.discard(centroid)
        free.difference_update(members)
    return groups


def _damaged(recorded: Any) -> CheckpointError:
    return CheckpointError(f"{LINEAGE}: the merged experts of an entry cannot be read ({str(recorded)[:100]})")
