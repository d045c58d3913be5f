"""What a command tells of memory before it loads a model, and again where it was not enough."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moetool.commands.console import Console, escape, size


def tell_weights(console: Console, folders: Iterable[Path], dtype: str, device: str, device_map: str | None) -> str:
    """Say how much memory the weights of the largest model take, and warn where there is less.

    Args:
        console: of the command.
        folders: the models, of which one is in memory at a time.
        dtype: of the weights in memory; `auto`: as saved.
        device: on which.
        device_map: spreads a model over devices, of which no single one must hold it.

    Returns:
        The estimate, as it was said.
    """
    from moetool.cost.devices import free_memory
    from moetool.cost.memory import weight_bytes

    need = max(weight_bytes(folder, dtype) for folder in folders)
    free = None if device_map else free_memory(device)
    there = f", {size(free)} free" if free is not None else ""
    estimate = f"memory about {size(need)} for weights on {device_map or device}{there}"
    if not console.json:
        console.say(f"[dim]{escape(estimate)}; activations come on top[/dim]")
    if free is not None and need > free:
        smaller = "--dtype bfloat16" if dtype in ("auto", "float32") else "a smaller model"
        console.warn(f"the weights need about {size(need)}, {device} has {size(free)} free; try {smaller}")
    return estimate


@contextmanager
def estimated(estimate: str) -> Iterator[None]:
    """Where memory runs out, the estimate that was printed before is part of what is said (see cli.run)."""
    try:
        yield
    except Exception as error:
        error.add_note(f"estimated before: {estimate}")
        raise
