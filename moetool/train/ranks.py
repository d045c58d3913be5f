"""Communication between the processes of a run outside training: on the CPU, from any thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from moetool.errors import CheckpointError, in_one_line

Value = TypeVar("Value")


class Severed(CheckpointError):
    """A process cannot give what others wait for: it must end, which ends their waiting."""


@dataclass(frozen=True)
class Ranks:
    """All processes of a run, in a gloo group of their own; without a group one process, which talks to nobody.

    Attributes:
        rank: of this process, from 0; the first one is the main process.
        size: how many they are.
        group: torch's process group.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what there is once."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, in every process; all must call."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, do: Callable[[], Value]) -> list[Value]:
        """The results of `do` in all processes; all must call.

        Raises:
            Exception: where `do` fails in one process, all fail: that one with its own error.
            CheckpointError: another process has failed; says which, and with what.
        """
        if self.group is None:
            return [do()]
        value, error = None, None
        try:
            value = do()
        except (CancelledError, Severed):  # this process is ending
            raise
        except Exception as failed:
            error = failed
        outcomes = self.gather((value, error and in_one_line(error, 1000)))
        if error:
            raise error
        for rank, (_, words) in enumerate(outcomes):
            if words:
                raise CheckpointError(f"process {rank} has failed: {words}")
        return [value for value, _ in outcomes]  # type: ignore[misc]

    def send(self, tensor: Tensor, to: int, tag: int) -> Any:
        """Begin to send a contiguous tensor on the CPU, which stays as it is until `wait` of the result is over."""
        return dist.isend(tensor, to, group=self.group, tag=tag)

    def receive(self, into: Tensor, sender: int, tag: int) -> Any:
        """Begin to fill a contiguous tensor on the CPU; it is full when `wait` of the result is over."""
        return dist.irecv(into, sender, group=self.group, tag=tag)


ALONE = Ranks()


def new_ranks() -> Ranks:
    """The processes of this run; all must call."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ALONE
    # Others wait while the main process works alone: it averages snapshots, or brings a step folder to a slow disk.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return Ranks(dist.get_rank(), dist.get_world_size(), group)
