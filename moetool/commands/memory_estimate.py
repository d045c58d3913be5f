"""The memory estimate, printed before a model is loaded and again if memory runs out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from moetool.commands.console import Console, escape, size
from moetool.mesh import ONE, Mesh

if TYPE_CHECKING:
    from moetool.calibration.options import CalibrationOptions
    from moetool.surgery.plan import Plan
    from moetool.upcycle.texts import TextOptions


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
    from moetool.cost.memory import weight_bytes

    need = max(weight_bytes(folder, dtype, mesh) for folder in folders)
    share = "" if mesh.whole else f" of each process ({mesh})"
    smaller = ["--dtype bfloat16" if dtype in ("auto", "float32") else "a smaller model"]
    smaller += [] if mesh.whole else ["more processes"]
    return _tell(console, need, "weights", device, device_map, share, smaller)


def tell_calibration(console: Console, folder: Path, run: CalibrationOptions) -> str:
    """Tell the memory for a model through which texts run, with `--stream` one layer at a time.

    Args:
        console: of the command.
        folder: the model.
        run: how the texts run.

    Returns:
        The estimate, as printed.
    """
    from moetool.calibration.options import IN_MEMORY
    from moetool.checkpoint.model import pick_device
    from moetool.cost.memory import hidden_bytes, layer_bytes, weight_bytes

    device = pick_device(run.device)
    if not run.stream:
        need = weight_bytes(folder, run.dtype)
        smaller = ["--stream", *(["--dtype bfloat16"] if run.dtype in ("auto", "float32") else [])]
        return _tell(console, need, "weights", device, run.device_map, "", smaller)
    tokens = run.max_tokens * max(len(run.data), len(run.val))
    need = layer_bytes(folder, run.dtype) + min(IN_MEMORY, hidden_bytes(folder, run.dtype, tokens))
    what = "one layer, embeddings, head and hidden states"
    return _tell(console, need, what, device, None, "", ["a smaller --dtype", "fewer --max-tokens"])


def tell_unwritten(console: Console, plan: Plan, run: TextOptions) -> str:
    """Tell the memory for a planned model through which texts run.

    Args:
        console: of the command.
        plan: the model.
        run: how the texts run.

    Returns:
        The estimate, as printed.
    """
    from moetool.calibration.options import IN_MEMORY
    from moetool.checkpoint.model import pick_device
    from moetool.cost.memory import one_layer

    width = plan.config.get("hidden_size", 0) * max(
        tensor.size // max(1, prod(tensor.shape)) for tensor in plan.model_tensors
    )
    states = min(IN_MEMORY, run.max_tokens * len(run.calibrate) * width)
    need = one_layer((tensor.name, tensor.size) for tensor in plan.model_tensors) + 2 * states
    what = "one layer, embeddings, head and hidden states"
    return _tell(console, need, what, pick_device(run.device), None, "", ["a smaller --dtype", "fewer --max-tokens"])


def _tell(
    console: Console, need: int, what: str, device: str, device_map: str | None, share: str, smaller: list[str]
) -> str:
    from moetool.cost.devices import free_memory

    free = None if device_map else free_memory(device)
    there = f", {size(free)} free" if free is not None else ""
    estimate = f"memory about {size(need)} for {what} on {device_map or device}{share}{there}"
    if not console.json:
        console.say(f"[dim]{escape(estimate)}; activations need more[/dim]")
    if free is not None and need > free:
        advice = ", or ".join(smaller)
        console.warn(f"{what} need about {size(need)}, but {device} has {size(free)} free; try {advice}")
    return estimate


@contextmanager
def estimated(estimate: str) -> Iterator[None]:
    """If memory runs out, the error repeats the estimate that was printed before (see cli.run)."""
    try:
        yield
    except Exception as error:
        error.add_note(f"the estimate was: {estimate}")
        raise
