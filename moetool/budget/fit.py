"""The meshes that fit, as a plan shows them, and advice if none does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moetool.budget.meshes import (
    Choice,
    Cluster,
    best_of_each,
    finer,
    least_memory,
    meshes,
    more_gpus,
    run_options,
)
from moetool.cost.memory import estimate, in_gb, smaller
from moetool.cost.parameters import Sizes
from moetool.mesh import Mesh


def fit(
    sizes: Sizes, cluster: Cluster, seq_len: int, batch: int, found: Sequence[Choice], granularity: int | None
) -> dict[str, Any]:
    """The meshes that fit, the recommended one first, then the others by their memory; advice if none fits.

    Args:
        sizes: of the model.
        cluster: the GPUs.
        seq_len: tokens of a sequence.
        batch: sequences of a step.
        found: the choices for the model, the recommended one first.
        granularity: of the model's experts; None where they cannot be made finer.
    """
    fitting = best_of_each(found)
    rows = [_row(one) for one in fitting]
    taken = {one.mesh for one in fitting}
    others: list[dict[str, Any]] = []
    for mesh in meshes(sizes, cluster):
        if mesh not in taken:
            need = estimate(sizes, run_options(mesh, seq_len, 1), mesh)
            small = need["total"] <= cluster.room  # but the batch cannot be shared out
            others.append({
                "mesh": str(mesh) or "one GPU", "micro_batch_size": 1, "memory": need, "fits": False,
                "why": f"{batch} sequences cannot be divided among the processes" if small else "too large",
            })  # fmt: skip
    others.sort(key=lambda one: one["memory"]["total"])
    return {
        "fitting": rows,
        "others": others,
        "recommended": rows[0] if rows else None,
        "because": _because(fitting[0], fitting) if fitting else "none fits",
        "advice": [] if fitting else _advice(sizes, cluster, seq_len, batch, granularity),
    }


def _row(one: Choice) -> dict[str, Any]:
    mesh = one.mesh
    return {
        "mesh": str(mesh) or "one GPU",
        "sizes": {"fsdp": mesh.fsdp, "ep": mesh.ep, "tp": mesh.tp, "replicas": mesh.replicas},
        "micro_batch_size": one.training.micro_batch_size,
        "memory": one.memory,
        "fits": True,
        "loading_per_machine": one.loading,
        "saving_per_machine": one.saving,
        "sent": one.sent,
        "sent_per_step": sum(one.sent.values()),
        "network_per_step": one.crossing,
        "efficiency": [one.alone, one.overlapped],
    }


def _because(best: Choice, fitting: Sequence[Choice]) -> str:
    others = [one for one in fitting if one.mesh != best.mesh]
    if not others:
        return "it is the only one that fits"
    if best.mesh.processes == 1:
        return "there is one GPU"
    if any(one.overlapped > best.overlapped + 0.005 for one in others):
        return "of the meshes within a twentieth of the best efficiency, it sends least over the network"
    return "of the meshes that fit, GPUs spend the largest share of a step on arithmetic"


def _advice(sizes: Sizes, cluster: Cluster, seq_len: int, batch: int, granularity: int | None) -> list[str]:
    """Changes that would make the training fit."""
    room = cluster.room
    mesh, need = least_memory(sizes, cluster, seq_len)
    if need["total"] <= room:
        return [
            f"memory is enough ({str(mesh) or 'one GPU'}: {need['total'] / 1e9:.0f} GB), but --global-batch-size"
            f" {batch} is not a multiple of the {mesh.data_parallel} processes that read different text"
        ]
    said = [
        f"the smallest needs {need['total'] / 1e9:.0f} GB of each GPU ({str(mesh) or 'one GPU'}), and"
        f" {room / 1e9:.0f} GB of {cluster.gpu.memory / 1e9:.0f} are taken at most"
    ]
    if (gpus := more_gpus(sizes, cluster, seq_len)) is not None:
        said.append(f"{gpus} such GPUs are enough")
    if gpus != 2 * cluster.num_gpus and granularity and (parts := _parts(sizes, cluster, seq_len)):
        many, top = parts * sizes.num_experts, parts * sizes.top_k
        said.append(
            f"finer experts divide further: --granularity {parts * granularity} --num-experts {many} --top-k {top}"
        )
    whole = Mesh(replicas=cluster.num_gpus)
    ways = smaller(sizes, run_options(whole, seq_len, 1), int(room), whole)
    alone = " without a mesh" if cluster.num_gpus > 1 else ""
    return said + [f"{typed} fits{alone} ({in_gb(size)})" for typed, size in ways]


def _parts(sizes: Sizes, cluster: Cluster, seq_len: int) -> int | None:
    """The fewest parts of an expert with which a mesh fits."""
    width = min(shape[-1] for name, shape in sizes.shapes.items() if ".experts." in name and "down" in name)
    for parts in (2, 4, 8, 16):
        if width % parts:
            return None
        _, need = least_memory(finer(sizes, parts), cluster, seq_len)
        if need["total"] <= cluster.room:
            return parts
    return None
