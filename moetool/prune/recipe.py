"""The options of `moetool prune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moetool import registry
from moetool.option import option


@dataclass(frozen=True)
class PruneOptions:
    """The number of experts to keep, their score, and the treatment of the others."""

    keep_experts: int = option("Number of routed experts per layer to keep.", min=1, metavar="N")
    score: str = option(
        "How experts are scored; auto takes the score that changes the layers' outputs least on held-out tokens.",
        "auto", names=["auto", *registry.names("score"), "reconstruction", "random"], what="score",
    )  # fmt: skip
    protect_super: bool = option(
        "Keep experts whose outputs have extreme entries, whatever their score.", False, flag="--protect-super"
    )
    merge: Literal["none", "ream"] = option(
        "Remove the other experts, or merge them into the kept ones (REAM).", "none"
    )
    seed: int = option("Random seed of --score random.", 0, min=0, needs=("score", "random".__eq__))
