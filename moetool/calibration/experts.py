"""The experts and routers of a loaded model, and what they compute for some tokens.

Shapes: T tokens, E experts, K top-k, D hidden, F intermediate units.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from moetool.calibration.by_layer import LayeredModel
from moetool.errors import CheckpointError
from moetool.layers import layer_of
from moetool.routing.capture import RouterCapture, read_output


@dataclass(frozen=True)
class Layer:
    """The experts and the router of one layer.

    Attributes:
        experts: transformers' module of all routed experts, which is called with hidden states, choices and weights.
        router: chooses and weights them.
        block: has both; a selection bias may lie in it.
    """

    experts: Any
    router: nn.Module
    block: nn.Module

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.experts.gate_up_proj.shape[0])

    def output(self, expert: int, hidden_TD: Tensor) -> Tensor:
        """(T, D), an expert's output for some tokens."""
        return self.ffn(self.experts.gate_up_proj[expert], self.experts.down_proj[expert], hidden_TD)

    def ffn(self, gate_up_GD: Tensor, down_DF: Tensor, hidden_TD: Tensor) -> Tensor:
        """(T, D), the output of an expert with these weights for some tokens; G is gate and up, 2 F."""
        # One product would put gate and up side by side, and what follows is slower on rows that are not contiguous.
        gate_TF, up_TF = (nn.functional.linear(hidden_TD, half_FD) for half_FD in gate_up_GD.chunk(2))
        return nn.functional.linear(self.experts.act_fn(gate_TF) * up_TF, down_DF)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, E) in fp32, the router's logits before it chooses."""
        return read_output(self.router(hidden_TD, *self._others()), type(self.router).__name__, -1)[0]

    def _others(self) -> list[Any]:
        """The router's arguments after the hidden states: a selection bias that lies in the block."""
        _, *names = signature(self.router.forward).parameters
        return [getattr(self.block, name, None) for name in names]

    def routing(self, kept: Sequence[int]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The family's own router with some of its experts only.

        Args:
            kept: experts, ascending.

        Returns:
            Hidden states (T, D) -> weights (T, K) in fp32, and choices (T, K) as positions in `kept`.
        """
        E, index = self.num_experts, torch.tensor(list(kept), device=self.experts.gate_up_proj.device)
        router = copy.deepcopy(self.router).requires_grad_(False)
        for module in router.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is not None and E in tensor.shape:
                        axis = 0 if tensor.shape[0] == E else tensor.ndim - 1
                        part = tensor.index_select(axis, index.to(tensor.device))
                        store[name] = nn.Parameter(part, False) if store is module._parameters else part  # type: ignore[assignment]
        if hasattr(router, "num_experts"):
            router.num_experts = len(kept)  # type: ignore[assignment]
        more = [one[index.to(one.device)] if isinstance(one, Tensor) else one for one in self._others()]

        def route(hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
            _, weights_TK, indices_TK = read_output(router(hidden_TD, *more), type(router).__name__, -1)
            return weights_TK.float(), indices_TK

        return route


class _OneAtATime(Mapping[int, Layer]):
    """The layers of a model; only the one accessed last is in memory."""

    def __init__(self, model: LayeredModel) -> None:
        self._model, self._layers = model, find_experts(model.core)

    def __getitem__(self, number: int) -> Layer:
        layer = self._layers[number]
        self._model.load(number)
        return layer

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def layers_with_experts(model: nn.Module | LayeredModel) -> Mapping[int, Layer]:
    """The layers of a model that have routed experts, ascending.

    If the model is not in memory, a layer is read when it is accessed.

    Raises:
        CheckpointError: it has none, they lie on no device, or transformers builds them in a way that is not known.
    """
    if isinstance(model, LayeredModel):
        return _OneAtATime(model)
    found = find_experts(model)
    if any(layer.experts.down_proj.is_meta for layer in found.values()):
        raise CheckpointError("weights are offloaded from the device; leave --device-map out")
    return found


def find_experts(model: nn.Module) -> dict[int, Layer]:
    """The layers of a model that have routed experts, ascending, wherever its weights are.

    Raises:
        CheckpointError: it has none, or transformers builds them in a way that is not known.
    """
    routers = RouterCapture(model).routers
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    found: dict[int, Layer] = {}
    for name, module in modules.items():
        layer = layer_of(name)
        both, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        whole = isinstance(both, Tensor) and isinstance(down, Tensor) and both.ndim == down.ndim == 3
        if layer in routers and whole and hasattr(module, "act_fn"):
            router = routers[layer]
            block = modules[names[router].rpartition(".")[0]]
            found[layer] = Layer(module, router, block)
    if found.keys() != routers.keys():
        raise CheckpointError(
            f"{type(model).__name__}: the experts of layer {min(routers.keys() - found.keys())} cannot be read in this"
            " version of transformers"
        )
    return dict(sorted(found.items()))
