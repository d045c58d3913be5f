"""The parts of a model that a process of a mesh holds, and those that FSDP gathers for it, in elements."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from moetool.cost.parameters import Sizes, is_embedding, is_routed, pattern
from moetool.mesh import Mesh

_DIVIDING = ("colwise", "rowwise", "packed_", "embedding_")  # styles of tensor parallelism that divide a matrix


@lru_cache(maxsize=256)
def parts_of(sizes: Sizes, mesh: Mesh) -> Mapping[str, int]:
    """Into how many parts each parameter is divided, by name, before FSDP shards it.

    `ep` divides the experts, `tp` the matrices that transformers' plan for the family names: of some families all but
    the routers, of others (GraniteMoeHybrid) the embeddings, the head and the experts alone.
    """
    plan = {name for name, style in sizes.tp_plan.items() if style.startswith(_DIVIDING)}
    parts = {}
    for name, shape in sizes.shapes.items():
        kind = pattern(name)
        divided = len(shape) > 1 and (kind in plan or kind.removesuffix(".weight") in plan)
        parts[name] = mesh.ep if is_routed(name, shape) and mesh.ep > 1 else mesh.tp if divided else 1
    return parts


@lru_cache(maxsize=256)
def shard_elements(sizes: Sizes, mesh: Mesh) -> Mapping[str, int]:
    """The most elements of each parameter that a process of a mesh holds, by name.

    FSDP deals out rows (of experts: experts), so that some processes hold one more than others.

    Args:
        sizes: of the model.
        mesh: of the processes.
    """
    parts, shards = parts_of(sizes, mesh), {}
    for name, shape in sizes.shapes.items():
        rows, rest = shape[0], math.prod(shape[1:])
        if is_routed(name, shape) and mesh.ep > 1:
            shards[name] = math.ceil(rows / mesh.ep / mesh.efsdp) * rest
        else:
            shards[name] = math.ceil(rows / mesh.fsdp) * rest // parts[name]
    return shards


@lru_cache(maxsize=256)
def gathered_elements(sizes: Sizes, mesh: Mesh) -> tuple[int, int]:
    """What FSDP gathers for a forward: the elements of the largest layer, and of the embeddings and the head."""
    parts = parts_of(sizes, mesh)
    layers: Counter[str] = Counter()
    ends = 0
    for name, shape in sizes.shapes.items():
        held = math.prod(shape) // parts[name]
        if is_embedding(name):
            ends += held
        else:
            number = next((part for part in name.split(".") if part.isdigit()), "")
            layers[number] += held
    return max(layers.values()), ends
