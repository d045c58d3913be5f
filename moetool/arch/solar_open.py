"""Solar Open: Llama's attention, sigmoid scores, a selection bias, shared experts; router in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.arch.limits import Limit, none_of
from moetool.arch.spec import ArchSpec, SharedExpert, ffn
from moetool.recipe import UpcycleRecipe


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """One group of experts; positions in all of each head."""
    return {
        "n_shared_experts": recipe.shared_experts,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "attention_bias": bool(dense["biases"]),
        "partial_rotary_factor": 1.0,
        "rope_parameters": dense["rope_parameters"] | {"partial_rotary_factor": 1.0},
    }


NO_ZERO = ("vllm", "llama.cpp")
SPEC = ArchSpec(
    model_type="solar_open",
    architecture="SolarOpenForCausalLM",
    dense=("llama",),
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
    biases="qkv",
    limits=(
        Limit("transformers-4", "it does not know the family"),
        Limit("llama.cpp", "its converter needs Solar's special tokens in the tokenizer"),
        *(Limit(client, "it cannot be without a shared expert", none_of("n_shared_experts")) for client in NO_ZERO),
        Limit("mlx", "it does not know the family"),
    ),
)
