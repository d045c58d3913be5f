"""The processes that `torchrun` or `accelerate launch` started together, from the environment."""

from __future__ import annotations

import os


def num_processes() -> int:
    """How many were started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_local_processes() -> int:
    """How many of them were started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return os.environ.get("RANK", "0") == "0"
