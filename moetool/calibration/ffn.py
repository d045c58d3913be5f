"""The FFNs of a dense model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from moetool.errors import CheckpointError

_DOWN = ("mlp.down_proj", "feed_forward.w2", "shared_mlp.output_linear")


@dataclass(frozen=True)
class FFN:
    """The FFN of one layer.

    Attributes:
        whole: transformers' module, which is called with hidden states.
        down: its last projection, which is called with the units.
    """

    whole: nn.Module
    down: nn.Linear


def dense_ffns(model: nn.Module) -> dict[int, FFN]:
    """The FFNs of all layers of a dense model, ascending.

    Raises:
        CheckpointError: transformers builds them in a way that is not known.
    """
    layers = getattr(model.base_model, "layers", ())
    found: dict[int, FFN] = {}
    for number, layer in enumerate(layers):
        modules = dict(layer.named_modules())
        name = next((name for name in _DOWN if isinstance(modules.get(name), nn.Linear)), None)
        if name is None:
            raise CheckpointError(
                f"{type(model).__name__}: the FFN of layer {number} cannot be read in this version of transformers"
            )
        found[number] = FFN(modules[name.rpartition(".")[0]], modules[name])
    if not found:
        raise CheckpointError(f"{type(model).__name__} has no list of layers, so its FFNs cannot be read")
    return found
