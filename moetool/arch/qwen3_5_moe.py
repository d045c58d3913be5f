"""Qwen3.5-MoE: linear attention in most layers; softmax, top-k, renormalised; a shared expert behind a sigmoid gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.arch import qwen2_moe
from moetool.arch.limits import Limit
from moetool.arch.spec import ArchSpec
from moetool.recipe import UpcycleRecipe

LINEAR = ("conv_kernel_dim", "key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """The text model's configuration; the router always makes the chosen experts' weights sum to 1."""
    units = dense["intermediate_size"] // recipe.granularity
    return {
        "shared_expert_intermediate_size": units * (recipe.shared_experts or 0),
        "attention_bias": False,
        "layer_types": dense["layer_types"],
        "full_attention_interval": dense["full_attention_interval"],
        "partial_rotary_factor": dense["rope_parameters"]["partial_rotary_factor"],
        "router_aux_loss_coef": 0.001,
        **{f"linear_{name}": dense[f"linear_{name}"] for name in LINEAR},
    }


SPEC = ArchSpec(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    dense=("qwen3_5_text",),
    config_map=config_map,
    shared=qwen2_moe.SPEC.shared,
    partial_rotary=True,
    scratch=False,
    limits=(
        Limit("transformers-4", "it does not know the family"),
        Limit("vllm", "the family is not known to be exact there"),
        Limit("mlx", "it does not know the family's text model"),
        Limit("llama.cpp", "its converter expects layers for multi-token prediction"),
    ),
)
