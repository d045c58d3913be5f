"""The cost of each way of training (operations, time and money), and the recommended way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moetool.budget.law import Verdict
from moetool.budget.meshes import Cluster
from moetool.budget.rules import skywork

Way = Literal["dense", "copy", "drop", "scratch"]
TITLES: dict[Way, str] = {
    "dense": "train the dense model",
    "copy": "upcycle by copies",
    "drop": "upcycle, half of each expert redrawn",
    "scratch": "train a Mixture of Experts from scratch",
}
NAMES: dict[Way, str] = {"dense": "dense", "copy": "copies", "drop": "redrawn", "scratch": "scratch"}
CLOSE = 0.02  # nats: the three parts of the law were fitted apart, and differ by as much for no reason


@dataclass(frozen=True)
class Speed:
    """How fast the GPUs are.

    Attributes:
        flops: operations per second that one GPU reaches.
        mfu: the same as a share of its peak.
        source: of the figure, in words.
    """

    flops: float
    mfu: float
    source: str


def speed(cluster: Cluster, mfu: float, tokens_per_second: float | None, flops: float, source: str) -> Speed:
    """The speed of training.

    Args:
        cluster: the GPUs.
        mfu: share of the peak, where no speed is given.
        tokens_per_second: of all GPUs together with the Mixture of Experts.
        flops: operations that it takes for a token.
        source: of what is given, in words.
    """
    peak = cluster.gpu.peak_flops
    if tokens_per_second is None:
        return Speed(mfu * peak, mfu, source)
    reached = tokens_per_second * flops / cluster.num_gpus
    return Speed(reached, reached / peak, source)


def cost(operations: float, reached: Speed, cluster: Cluster, price: float | None) -> dict[str, Any]:
    """Operations, GPU-hours, days and money of a training.

    Args:
        operations: of all of it.
        reached: the speed of a GPU.
        cluster: the GPUs.
        price: of a GPU for an hour.
    """
    hours = operations / reached.flops / 3600
    return {
        "operations": operations,
        "gpu_hours": hours,
        "days": hours / cluster.num_gpus / 24,
        "money": None if price is None else hours * price,
    }


def recommend(
    law: Verdict | None, same_cost: float | None, moe: float, dense: float | None, unfit: str
) -> tuple[Way, str]:
    """Which way to take, and why.

    Args:
        law: what it says; None outside its range.
        same_cost: loss of the dense model if it is trained with as many operations; None outside the range.
        moe: operations of the training of the Mixture of Experts.
        dense: those that the dense model has had; None where its tokens are not known.
        unfit: why the model cannot be upcycled; empty where it can.
    """
    if unfit:
        return "dense", "moetool cannot upcycle the model"
    if law and same_cost is not None:
        if law.dense <= law.upcycled:
            when = f"only from about {law.beats_dense / 1e9:,.0f} B tokens on" if law.beats_dense else "never"
            return "dense", f"by the law, copies are better than the dense model trained as long {when}"
        if same_cost <= law.upcycled:
            return "dense", "by the law, the dense model is better than copies if it is trained for the same money"
        if law.scratch < law.upcycled - CLOSE:
            return "scratch", "by the law, it is better than copies with as many tokens"
        return "drop", (
            "by the law, copies are better than the dense model trained as long, or for the same money, and redrawn"
            " experts beat copies in the Drop-Upcycling paper"
        )
    if dense is None:
        return "drop", (
            "redrawn experts beat copies in the Drop-Upcycling paper. Whether upcycling pays off is unknown without"
            " --dense-tokens"
        )
    rule = skywork(moe, dense)
    if rule == "from scratch":
        return "scratch", "the training costs twice what the dense model's did, or more (Skywork-MoE's rule)"
    if rule == "upcycle":
        return "drop", "the training costs much less than the dense model's did (Skywork-MoE's rule)"
    return "drop", (
        "redrawn experts beat copies in the Drop-Upcycling paper. Whether upcycling pays off is open by Skywork-MoE's"
        " rule,"
        " so first compare it with training from scratch on a tenth of the tokens"
    )
