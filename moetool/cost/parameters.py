"""Parameters of a model, counted without its weights.

A model here is one of transformers whose tensors may be on torch's meta device, as
`checkpoint.model.skeleton` makes it from config.json.
"""

from __future__ import annotations

from typing import Any

from moetool.routing.capture import RouterCapture, has_routers
from moetool.routing.shape import outline


def routing_size(model: Any) -> tuple[int, int]:
    """Routed experts per layer and experts per token; (1, 1) for a dense model.

    A block is run on torch's meta device, so that no family's names for the two need be known.
    """
    if not has_routers(model):
        return 1, 1
    if found := outline(model, RouterCapture(model)):
        return found.num_experts, found.top_k
    experts = [p.shape[0] for name, p in model.named_parameters() if is_routed(name, p)]
    return max(experts, default=1), getattr(model.config.get_text_config(), "num_experts_per_tok", 1)


def count_parameters(model: Any) -> tuple[int, int]:
    """All parameters, and those that one token uses."""
    num_experts, top_k = routing_size(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if is_routed(name, p))
    return total, total - experts + experts * top_k // num_experts


def is_routed(name: str, parameter: Any) -> bool:
    """Whether a parameter holds the routed experts of a layer, (experts, rows, columns)."""
    return ".experts." in name and parameter.ndim == 3


def is_router(name: str) -> bool:
    """Whether a parameter is a router's matrix."""
    return name.endswith((".gate.weight", ".router.weight", ".router.layer.weight"))


def is_embedding(name: str) -> bool:
    """Whether a parameter is the input embedding or the head."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))
