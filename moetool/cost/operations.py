"""The operations of training."""

from __future__ import annotations

from collections.abc import Collection
from math import prod

from moetool.cost.parameters import Sizes, is_routed


def flops_per_token(sizes: Sizes, seq_len: int, trained: Collection[str] | None = None) -> int:
    """Operations that training on one token takes: 6 per parameter that it uses, and attention.

    A parameter that is not trained takes 4: its product, and the gradient of its input.

    Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B: 6 N + 12 L H Q S, here without the input
    embedding, which is looked up. What gradient checkpointing computes twice counts once.

    Args:
        sizes: of the model.
        seq_len: tokens of a sequence.
        trained: names of what is trained; None: everything.
    """
    looked_up = 0 if sizes.tied else sizes.vocab_size * sizes.hidden_size
    used = learning = sizes.active - looked_up
    if trained is not None:
        multiplied = {name for name in trained if not (looked_up and name.endswith("embed_tokens.weight"))}
        _, learning = sizes.count(multiplied)
    attention = sizes.num_layers * sizes.num_heads * sizes.head_dim * seq_len
    return int(4 * used + 2 * learning + 12 * attention)


def router_gradient_flops(sizes: Sizes, kind: str) -> int:
    """Operations of one token that `--router-gradient` adds; they train no more parameters, so MFU leaves them out.

    `dense` computes the E - K other experts once more, 2 operations per parameter; `default` takes the product of a
    gradient with E vectors in each layer.

    Args:
        sizes: of the model.
        kind: sparse, default or dense.
    """
    routed = {name: prod(shape) for name, shape in sizes.shapes.items() if is_routed(name, shape)}
    if kind == "dense":
        return int(2 * sum(routed.values()) * (sizes.num_experts - sizes.top_k) // sizes.num_experts)
    layers = sum(name.endswith("down_proj") for name in routed)
    return int(2 * layers * sizes.num_experts * sizes.hidden_size) if kind == "default" else 0
