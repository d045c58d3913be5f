"""The memory estimate that is printed before a model is loaded, and again if memory runs out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moetool.commands.console import Console, escape, size
from moetool.mesh import ONE, Mesh


def tell_weights(
    console: Console, folders: Iterable[Path], dtype: str, device: str, device_map: str | None, mesh: Mesh = ONE
) -> str:
    """Print how much memory the weights of the largest model take in each process, and warn if less is free.

    Args:
        console: of the command.
        folders: the models, of which one is in memory at a time.
        dtype: of the weights in memory; `auto`: as saved.
        device: the device of the weights.
        device_map: spreads a model over devices, so that no single one must hold it.
        mesh: of the processes that share a model.

    Returns:
        The estimate, as printed.
    """
    from moetool.cost.devices import free_memory
    from moetool.cost.memory import weight_bytes

    need = max(weight_bytes(folder, dtype, mesh) for folder in folders)
    free = None if device_map else free_memory(device)
    there = f", {size(free)} free" if free is not None else ""
    share = "" if mesh.whole else f" of each process ({mesh})"
    estimate = f"memory about {size(need)} for weights on {device_map or device}{share}{there}"
    if not console.json:
        console.say(f"[dim]{escape(estimate)}; activations need more[/dim]")
    if free is not None and need > free:
        smaller = "--dtype bfloat16" if dtype in ("auto", "float32") else "a smaller model"
        smaller += "" if mesh.whole else ", or more processes"
        console.warn(f"the weights need about {size(need)}, but {device} has {size(free)} free; try {smaller}")
    return estimate


@contextmanager
def estimated(estimate: str) -> Iterator[None]:
    """If memory runs out, the error repeats the estimate that was printed before (see cli.run)."""
    try:
        yield
    except Exception as error:
        error.add_note(f"the estimate was: {estimate}")
        raise
