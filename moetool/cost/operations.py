"""Operations that training takes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from moetool.cost.parameters import count_parameters, is_routed, routing_size


def flops_per_token(model: Any, seq_len: int, trained: Collection[str] | None = None) -> int:
    """Operations that training on one token takes: 6 per parameter that it uses, and attention.

    A parameter that is not trained takes 4: its product, and the gradient of its input.

    Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B: 6 N + 12 L H Q S, here without the input
    embedding, which is looked up. What gradient checkpointing computes twice counts once.

    Args:
        model: without weights, see `parameters`.
        seq_len: tokens of a sequence.
        trained: names of what is trained; None: everything.
    """
    config = model.config.get_text_config()
    _, active = count_parameters(model)
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    used = learning = active - looked_up
    if trained is not None:
        multiplied = {name for name in trained if not (looked_up and name.endswith("embed_tokens.weight"))}
        _, learning = count_parameters(model, multiplied)
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim * seq_len
    return int(4 * used + 2 * learning + 12 * attention)


def router_gradient_flops(model: Any, kind: str) -> int:
    """Operations of one token that `--router-gradient` adds; they train no more parameters, so MFU leaves them out.

    `dense` computes the E - K other experts once more, 2 operations per parameter; `default` takes the product of a
    gradient with E vectors in each layer.

    Args:
        model: without weights, see `parameters`.
        kind: sparse, default or dense.
    """
    num_experts, top_k = routing_size(model)
    routed = {name: p for name, p in model.named_parameters() if is_routed(name, p)}
    if kind == "dense":
        return int(2 * sum(p.numel() for p in routed.values()) * (num_experts - top_k) // num_experts)
    layers = sum(name.endswith("down_proj") for name in routed)
    return int(2 * layers * num_experts * model.config.get_text_config().hidden_size) if kind == "default" else 0
