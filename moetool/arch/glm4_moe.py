"""GLM-4-MoE: sigmoid scores, a selection bias, shared experts, a factor on the routed output; router in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.arch.limits import Limit, none_of, rope
from moetool.arch.spec import ArchSpec, SharedExpert, ffn, leading_dense
from moetool.recipe import UpcycleRecipe


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """One group of experts, and positions in as much of each head as before: GLM's own default is half of it."""
    part = dense["rope_parameters"].get("partial_rotary_factor", 1.0)
    return {
        "n_shared_experts": recipe.shared_experts,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "use_qk_norm": dense["family"] == "qwen3",
        "attention_bias": bool(dense["biases"]),
        "partial_rotary_factor": part,
        "rope_parameters": dense["rope_parameters"] | {"partial_rotary_factor": part},
        "num_nextn_predict_layers": 0,
    }


NO_ZERO = ("vllm", "llama.cpp", "mlx")
SPEC = ArchSpec(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    dense=("llama", "mistral", "qwen2", "qwen3"),
    experts=ffn("mlp.experts.{expert}"),
    router="model.layers.{layer}.mlp.gate.weight",
    num_experts_key="n_routed_experts",
    top_k_key="num_experts_per_tok",
    units_key="moe_intermediate_size",
    config_map=config_map,
    partial_rotary=True,
    router_fp32=True,
    ranked_by="sigmoid",
    selection_bias=("model.layers.{layer}.mlp.gate.e_score_correction_bias", "E"),
    shared=SharedExpert(ffn("mlp.shared_experts"), default=1),
    scaling_key="routed_scaling_factor",
    moe_layers=leading_dense("first_k_dense_replace"),
    biases="qkv",
    ties=False,  # vLLM and mlx-lm never tie, and would compute with a head that nobody wrote
    limits=(
        Limit("llama.cpp", "its converter needs GLM's special token [gMASK] in the tokenizer", unless="[gMASK]"),
        Limit("llama.cpp", "it ignores llama3's scaling of positions in the family", rope("llama3")),
        *(Limit(client, "it cannot be without a shared expert", none_of("n_shared_experts")) for client in NO_ZERO),
        Limit("mlx", "it ignores llama3's scaling of positions in the family", rope("llama3")),
    ),
)
