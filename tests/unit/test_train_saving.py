"""What happens to the processes that wait when one cannot give what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moetool.train.assignment import Held, assign
from moetool.train.ranks import Ranks, Severed
from moetool.train.saving import write_files
from moetool.train.shards import everything
from tests.unit.test_train_assignment import contents


class Talking(Ranks):
    """A process of two; exchanging an outcome would wait for one that waits for it."""

    def gather(self, value: Any) -> Any:
        raise AssertionError("a process that others wait for waits for them")


def test_a_process_that_cannot_give_what_it_holds_ends(tmp_path: Path) -> None:
    shape = (2, 3)
    held = {"t": Held(torch.float32, shape, (everything(shape), ((), ())))}
    assignment = assign(held, [("t",)], contents, 2)

    def read(name: str) -> Tensor:
        raise RuntimeError("no memory\nfor a copy")

    ranks = Talking(0, 2, "group")
    with pytest.raises(Severed, match="no memory for a copy; run the same command again"):
        ranks.together(lambda: write_files(assignment, ranks, read, contents, tmp_path, lambda: None))
