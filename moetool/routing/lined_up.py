"""How the experts of two compared checkpoints correspond, in sentences, from report.json's `comparison.experts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def how_lined_up(report: Mapping[str, Any]) -> list[str]:
    """The correspondence, if it is the same in all layers."""
    other = report["comparison"]
    shapes = [(report["num_experts"], report["top_k"]), (other["num_experts"], other["top_k"])]
    first, second = (f"{experts} experts per layer, top-{top_k}" for experts, top_k in shapes)
    ways = [", ".join(commands) or "nothing" for commands in other["experts"]["since"]]
    return [
        f"The first model has {first}, the second {second}.",
        f"Their experts are matched by moetool.json: since both were one model, {ways[0]} was done to the first and"
        f" {ways[1]}"
        " to the second.",
        "A copy counts as its original.",
    ]


def copies_in_words(row: Mapping[str, Any]) -> str:
    """The experts of a layer that are copies, such as `copies of 0: 0, 4`; empty where there are none."""
    told = []
    for one in row["copies"]:
        before, now = listed(one["of"]), listed(one["experts"])
        several = "one another in the first, " if len(one["of"]) > 1 else ""
        told.append(f"copies of {several}{before}: {now}")
    return "; ".join(told)


def listed(experts: Sequence[int]) -> str:
    """Numbers of experts, `0, 4`."""
    return ", ".join(map(str, experts))
