"""dots.llm1: Qwen3's attention, sigmoid scores, a selection bias, shared experts; router in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.arch.limits import Limit, grouped_queries, none_of, some, tied
from moetool.arch.spec import ArchSpec, SharedExpert, ffn, leading_dense
from moetool.recipe import UpcycleRecipe


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """One group of experts; the chosen experts' weights sum to 1 before the factor."""
    return {
        "n_shared_experts": recipe.shared_experts,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",  # transformers has no other; llama.cpp must be told
        "attention_bias": bool(dense["biases"]),
        "max_window_layers": dense["max_window_layers"],
    }


NO_ZERO = ("vllm", "llama.cpp", "mlx")
SPEC = ArchSpec(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    dense=("qwen3",),
    experts=ffn("mlp.experts.{expert}"),
    router="model.layers.{layer}.mlp.gate.weight",
    num_experts_key="n_routed_experts",
    top_k_key="num_experts_per_tok",
    units_key="moe_intermediate_size",
    config_map=config_map,
    router_fp32=True,
    ranked_by="sigmoid",
    selection_bias=("model.layers.{layer}.mlp.gate.e_score_correction_bias", "E"),
    shared=SharedExpert(ffn("mlp.shared_experts"), default=1),
    scaling_key="routed_scaling_factor",
    moe_layers=leading_dense("first_k_dense_replace"),
    biases="qkvo",
    windows="layer_types",
    limits=(
        Limit("llama.cpp", "it knows only as many key-value heads as heads in the family", grouped_queries),
        Limit("llama.cpp", "it knows no tied embeddings in the family", tied),
        Limit("mlx", "it has no biases of attention in the family", some("attention_bias")),
        *(Limit(client, "it cannot be without a shared expert", none_of("n_shared_experts")) for client in NO_ZERO),
    ),
)
