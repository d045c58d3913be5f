"""How domain code reports progress, without printing."""

from typing import Protocol


class Progress(Protocol):
    """Called with a task's name, how much of it is done and how much there is, in any unit.

    The first call for a name opens a bar, `done >= total` closes it. `note` is a few characters
    shown beside the bar (a loss, a file name).
    """

    def __call__(self, task: str, done: float, total: float, note: str = "") -> None: ...


def silent(task: str, done: float, total: float, note: str = "") -> None:
    """Report nothing."""
