"""Operations that training takes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from moetool.cost.parameters import count_parameters


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
