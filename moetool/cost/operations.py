"""Operations that training takes."""

from __future__ import annotations

from typing import Any

from moetool.cost.parameters import count_parameters


def flops_per_token(model: Any, seq_len: int) -> int:
    """Operations that training on one token takes: 6 per parameter that it uses, and attention.

    Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B: 6 N + 12 L H Q S, here without the input
    embedding, which is looked up. What gradient checkpointing computes twice counts once.

    Args:
        model: without weights, see `parameters`.
        seq_len: tokens of a sequence.
    """
    config = model.config.get_text_config()
    _, active = count_parameters(model)
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(
        6 * (active - looked_up) + 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * seq_len
    )
