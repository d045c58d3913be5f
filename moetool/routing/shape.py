"""The number of experts of a model's routers, and of those they choose, from a router's output for one token.

Families call the two by a dozen names. Shapes: T tokens, D hidden.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moetool.errors import CheckpointError
from moetool.routing.capture import RouterCapture, read_output
from moetool.routing.stats import RoutingStats

BY_SEQUENCE = {"AfmoeTokenChoiceRouter"}  # routers that take hidden states as (batch, sequence, D), not as (T, D)


@torch.no_grad()
def probe(model: Any, capture: RouterCapture) -> RoutingStats:
    """Empty stats of the model's shape.

    Raises:
        CheckpointError: a router cannot be read, or none is called.
    """
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    with capture.collect() as routes:
        run_layers(model, ids)
    if not routes:
        raise CheckpointError(f"{type(model).__name__}: none of its routers was called")
    return RoutingStats(capture.layers, routes[0].logits_TE.shape[-1], routes[0].indices_TK.shape[-1])


def run_layers(model: Any, ids: Tensor) -> None:
    """Run a model for its routing, with as little of the head as possible.

    Args:
        model: a causal language model of transformers. Sharded by FSDP it must be called itself.
        ids: tokens, (B, S).
    """
    if isinstance(model, FSDPModule):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)  # type: ignore[operator]
    else:
        model.base_model(input_ids=ids, use_cache=False)


@torch.inference_mode()
def outline(model: Any, capture: RouterCapture) -> RoutingStats | None:
    """The same for a model on torch's meta device, which cannot run as a whole: only its first router runs.

    Returns:
        None where that router takes more than hidden states and the selection bias of its block: DeepSeek-V4's
        chooses by the number of the token.

    Raises:
        CheckpointError: it cannot be read.
    """
    layer, router = next(iter(capture.routers.items()))
    kind = type(router).__name__
    block = next(module for module in model.modules() if router in module.children())
    _, *others = signature(router.forward).parameters
    if not all(hasattr(block, other) for other in others):
        return None
    D = model.config.get_text_config().hidden_size
    hidden = torch.zeros((1, 1, D) if kind in BY_SEQUENCE else (1, D), device="meta")
    logits_TE, _, indices_TK = read_output(router(hidden, *(getattr(block, other) for other in others)), kind, layer)
    return RoutingStats(capture.layers, logits_TE.shape[-1], indices_TK.shape[-1])
