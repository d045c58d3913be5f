"""What `moetool verify` must know of a command that rewrites checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetool.checkpoint.reader import CheckpointReader
from moetool.surgery.plan import Plan


@dataclass(frozen=True)
class Operation:
    """An operation under `operation` in the registry.

    Attributes:
        done: what it does to its source, as messages say it: `upcycled`.
        replan: (sources, lineage entry, max_shard_size) -> the plan that the entry tells of.
    """

    done: str
    replan: Callable[[Sequence[CheckpointReader], Mapping[str, Any], int], Plan]
