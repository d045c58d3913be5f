"""Parameters of a model, counted without its weights.

A model here is one of transformers whose tensors may be on torch's meta device, as
`checkpoint.model.skeleton` makes it from config.json.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from moetool.routing.capture import RouterCapture, find_routers, has_routers
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


def count_parameters(model: Any, among: Collection[str] | None = None) -> tuple[int, int]:
    """All parameters, and those that one token uses; where names are given, among these."""
    num_experts, top_k = routing_size(model)
    counted = {name: p for name, p in model.named_parameters() if among is None or name in among}
    total = sum(parameter.numel() for parameter in counted.values())
    experts = sum(p.numel() for name, p in counted.items() if is_routed(name, p))
    return total, total - experts + experts * top_k // num_experts


def is_routed(name: str, parameter: Any) -> bool:
    """Whether a parameter holds the routed experts of a layer, (experts, rows, columns)."""
    return ".experts." in name and parameter.ndim == 3


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to experts, routed or shared; what weights a shared expert does not."""
    return bool(re.search(r"\.(experts|shared_experts?|shared_mlp)\.", name))


def router_names(model: Any) -> frozenset[str]:
    """The parameters of a model's routers, by name."""
    return frozenset(
        f"{router}.{name}" for router, module in find_routers(model) for name, _ in module.named_parameters()
    )


def trained_names(model: Any, train_only: str = "everything", freeze_router: bool = False) -> frozenset[str]:
    """The parameters that `cpt` trains, by name, but for selection biases, which no gradient reaches.

    Args:
        model: see above.
        train_only: `routers`, `experts` (routed and shared ones) or `everything`.
        freeze_router: whether routers are not among them.
    """
    routers = router_names(model)
    if train_only == "routers":
        return routers
    every = frozenset(name for name, _ in model.named_parameters())
    chosen = every if train_only == "everything" else frozenset(filter(is_expert, every))
    return chosen - routers if freeze_router else chosen


def is_embedding(name: str) -> bool:
    """Whether a parameter is the input embedding or the head."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))
