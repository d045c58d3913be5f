"""Cohere2 MoE: attention and experts side by side behind one norm, top-k, then softmax; shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.arch.dense import QKVO, Windows
from moetool.arch.limits import Limit, no_windows, rope, some, untied, windowed
from moetool.arch.spec import ArchSpec, SharedExpert, ffn
from moetool.recipe import UpcycleRecipe


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """The mean of shared and routed experts, the family's default, is all that llama.cpp's converter reads."""
    return {
        "num_shared_experts": recipe.shared_experts,
        "shared_expert_combination_strategy": "average",
        "expert_selection_fn": "softmax",
        "norm_topk_prob": True,
        "attention_bias": bool(dense["biases"]),
        "layer_norm_eps": dense["layer_norm_eps"],
        "logit_scale": dense["logit_scale"],
        # It wants a number even where no layer has a window.
        "sliding_window": dense["sliding_window"] or dense["max_position_embeddings"],
        "sliding_window_pattern": dense["sliding_window_pattern"],
        "prefix_dense_intermediate_size": dense["intermediate_size"],
        # 1 would give dense layers without a window the rotary positions that they never had.
        "prefix_dense_sliding_window_pattern": 2,
    }


def not_leading(config: Mapping[str, Any]) -> bool:
    """Dense layers lie between those with experts, not only before them."""
    kinds: list[str] = config.get("mlp_layer_types", [])
    return kinds != sorted(kinds)


SPEC = ArchSpec(
    model_type="cohere2_moe",
    architecture="Cohere2MoeForCausalLM",
    dense=("cohere2",),
    units_key="intermediate_size",
    config_map=config_map,
    ranked_by="logits",
    shared=SharedExpert(ffn("mlp.shared_experts"), averaged=True),
    moe_layers=lambda moe, layers: {"mlp_layer_types": ["sparse" if i in moe else "dense" for i in range(layers)]},
    biases=QKVO,
    windows=Windows.BY_LAYER,
    limits=(
        Limit("transformers-4", "it does not know the family"),
        Limit("llama.cpp", "it fails if no layer has a sliding window", no_windows),
        Limit("llama.cpp", "it supports dense layers only at the start in this family", not_leading),
        Limit("llama.cpp", "it ignores llama3 position scaling in this family", rope("llama3")),
        Limit("llama.cpp", "it has no attention biases in this family", some("attention_bias")),
        Limit("vllm", "it computes windows differently, in the dense model as well", windowed),
        Limit("vllm", "it leaves out the attention biases in this family", some("attention_bias")),
        Limit("vllm", "it always ties the output head to the embedding in this family", untied),
        Limit("mlx", "it does not know the family"),
    ),
)
