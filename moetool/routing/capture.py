"""How a model's routers handled a batch, read by forward hooks.

Shapes: T tokens (batch x sequence, flattened), E experts, K top-k, L layers.

transformers' own `router_logits` are not used: they exist only under a flag that must not reach a
saved config.json, they carry no choices, and choices after a selection bias cannot be had from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetool.errors import CheckpointError

# Class names of router modules; such a module returns (logits_TE, weights_TK, indices_TK, ...).
_ROUTER = re.compile(r"(Router|MoEV1Gate)$")

# How the routers of a family turn logits into the scores that are ranked. What is not listed uses a
# softmax (before or after the top-k: over all experts it is the same distribution).
_SCORING = {
    "sigmoid": {
        "AXK1TopkRouter",
        "AXK2TopkRouter",
        "AfmoeTokenChoiceRouter",
        "BailingHybridTopkRouter",
        "BeamTopKRouter",
        "DeepseekV32TopkRouter",
        "DeepseekV3TopkRouter",
        "Dots1TopkRouter",
        "Dots3NoteTextTopkRouter",
        "ExaoneMoeTopkRouter",
        "FlintTopKRouter",
        "Glm4MoeLiteTopkRouter",
        "Glm4MoeTopkRouter",
        "Glm4vMoeTextTopkRouter",
        "Glm5NextTextTopkRouter",
        "GlmMoeDsaTopkRouter",
        "HYV3TopKRouter",
        "HYV4TopkRouter",
        "Inkling2TopKRouter",
        "InklingTopkRouter",
        "KimiLinearTopkRouter",
        "Kolibri1TopKRouter",
        "LagunaTopKRouter",
        "Lfm2MoeTopKRouter",
        "MiMoV2FlashTopkRouter",
        "MiniMaxM2TopKRouter",
        "MiniMaxM3VLTopKRouter",
        "MuseSparkTopkRouter",
        "NemotronHTopkRouter",
        "SolarOpenTopkRouter",
        "Step3p7TopKRouter",
    },
    "sqrtsoftplus": {"DeepseekV4TopKRouter", "DeepseekV4HashRouter"},
    "probability": {"Gemma4TextRouter", "DiffusionGemmaTextRouter"},
}

# Routers whose output hides choices: ZayaRouter reports "no expert" as expert 0.
_UNREADABLE = {"ZayaRouter"}


@dataclass(frozen=True)
class Route:
    """The decisions of one router for one batch.

    Attributes:
        layer: index of the decoder layer.
        logits_TE: what the router computed before scoring, in float32, with its gradient.
        weights_TK: how the chosen experts' outputs are weighted.
        indices_TK: int64, the chosen experts, after a selection bias where the family has one.
        scoring: `softmax`, `sigmoid`, `sqrtsoftplus`, or `probability` when the logits already are
            probabilities (some families return those under the same name).
    """

    layer: int
    logits_TE: Tensor
    weights_TK: Tensor
    indices_TK: Tensor
    scoring: str = "softmax"

    def probabilities_TE(self) -> Tensor:
        """The router's probability of each expert, rows summing to 1, with its gradient.

        Sigmoid scores are divided by their sum, as in the balance loss of DeepSeek-V3 (section 2.1.2).
        """
        scores_TE = self.scores_TE()
        if self.scoring in ("softmax", "probability"):
            return scores_TE
        return scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp_min(1e-20)

    def scores_TE(self) -> Tensor:
        """The family's score of each expert, before a selection bias, with its gradient."""
        if self.scoring == "softmax":
            return self.logits_TE.softmax(dim=-1)
        if self.scoring == "probability":
            return self.logits_TE
        if self.scoring == "sqrtsoftplus":
            return nn.functional.softplus(self.logits_TE).sqrt()
        return self.logits_TE.sigmoid()


class RouterCapture:
    """Hooks on every router of a model; they collect only inside `collect`.

    Gradient checkpointing runs the forward a second time during the backward: keep the backward
    outside `collect` and nothing is counted twice.

    Attributes:
        layers: indices of the decoder layers that have a router, ascending.
        routers: layer -> its router module.
        scoring: layer -> how it scores, as in Route, by its class.

    Raises:
        CheckpointError: the model has no router, two in one layer, or one whose choices cannot be read.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers: dict[int, nn.Module] = {}
        for name, module in find_routers(model):
            layer = _layer_index(name)
            if layer in self.routers:
                raise CheckpointError(
                    f"layer {layer} has two routers, the second is '{name}'; moetool reads one per layer"
                )
            if type(module).__name__ in _UNREADABLE:
                raise _unreadable(type(module).__name__, layer)
            self.routers[layer] = module
        if not self.routers:
            raise CheckpointError(
                f"{type(model).__name__} is a dense model without a router; give a Mixture of Experts"
                " (moetool upcycle makes one)"
            )
        self.routers = dict(sorted(self.routers.items()))
        self.layers = list(self.routers)
        self.scoring = {layer: _scoring(module) for layer, module in self.routers.items()}
        self._routes: list[Route] | None = None  # where routes go; None: nobody collects
        self._consume: Callable[[Route], None] | None = None
        for layer, module in self.routers.items():
            module.register_forward_hook(self._hook(layer, self.scoring[layer]))

    def _hook(self, layer: int, scoring: str) -> Callable[[nn.Module, Any, Any], None]:
        # Softmax families of some transformers versions return probabilities: seen once a router, at
        # its first batch, so that later batches cost no device synchronisation.
        checked = scoring != "softmax"

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal checked, scoring
            if torch.compiler.is_compiling():
                # A place of the router's own: a shared list's length, or a layer's number, would have each layer
                # compiled for itself.
                module.compiled_output = read_output(output, type(module).__name__, -1)  # type: ignore[assignment]
                return
            if self._routes is None:
                return
            logits_TE, weights_TK, indices_TK = read_output(output, type(module).__name__, layer)
            if not checked and not logits_TE.is_meta:
                scoring, checked = ("probability" if _are_probabilities(logits_TE) else "softmax"), True
            route = Route(layer, logits_TE, weights_TK, indices_TK, scoring)
            # Not one callable for both: torch.compile would compile anew for the `append` of each new list.
            if self._consume is None:
                self._routes.append(route)
            else:
                self._consume(route)

        return hook

    @contextmanager
    def collect(self, consume: Callable[[Route], None] | None = None) -> Iterator[list[Route]]:
        """Collect routes while the block runs: one per layer and forward, in layer order.

        Args:
            consume: called with each route inside the hook instead of keeping it in the list, so that
                one layer's logits are alive at a time.
        """
        routes: list[Route] = []
        before = self._routes, self._consume
        self._routes, self._consume = routes, consume
        for router in self.routers.values():
            router.__dict__.pop("compiled_output", None)  # of a forward that nobody collected
        try:
            yield routes
            for layer, router in self.routers.items():
                if output := router.__dict__.pop("compiled_output", None):
                    logits_TE, weights_TK, indices_TK = output
                    routes.append(Route(layer, logits_TE, weights_TK, indices_TK, self.scoring[layer]))
        finally:
            self._routes, self._consume = before


def has_routers(model: nn.Module) -> bool:
    """Whether a model has at least one router."""
    return next(find_routers(model), None) is not None


def find_routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The routers of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if _ROUTER.search(type(module).__name__))


def _layer_index(name: str) -> int:
    number = re.search(r"\.(\d+)\.", f".{name}.")
    return int(number[1]) if number else 0


def _scoring(router: nn.Module) -> str:
    class_name = type(router).__name__
    listed = next((scoring for scoring, classes in _SCORING.items() if class_name in classes), "softmax")
    return str(getattr(router, "expert_selection_fn", listed))  # cohere2_moe: a config key decides


def read_output(output: Any, class_name: str, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (T, E) in float32, weights (T, K) and chosen experts (T, K) from a router's output.

    Raises:
        CheckpointError: it returned something else.
    """
    if isinstance(output, tuple) and len(output) >= 3 and all(isinstance(part, Tensor) for part in output[:3]):
        logits, weights, indices = output[:3]
        if logits.ndim >= 2 and not indices.is_floating_point() and indices.shape == weights.shape:
            experts, top_k = logits.shape[-1], indices.shape[-1]
            return logits.float().reshape(-1, experts), weights.reshape(-1, top_k), indices.long().reshape(-1, top_k)
    raise _unreadable(class_name, layer)


def _unreadable(class_name: str, layer: int) -> CheckpointError:
    """The refusal of a router whose choices cannot be read."""
    return CheckpointError(
        f"layer {layer}: {class_name} does not return (logits, weights, chosen experts); its choices cannot be read"
    )


@torch.no_grad()
def _are_probabilities(logits_TE: Tensor) -> bool:
    if not logits_TE.numel():
        return False
    sums_T = logits_TE.sum(dim=-1)
    return bool((logits_TE >= 0).all() & ((sums_T - 1).abs() < 2e-2).all())
