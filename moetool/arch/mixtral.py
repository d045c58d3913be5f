"""Mixtral: Llama's and Mistral's attention, softmax over all experts, top-k, renormalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.arch.spec import ArchSpec, shared_config
from moetool.recipe import UpcycleRecipe


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """MixtralConfig; its defaults differ from Llama's (eps, positions, rope), so every key is written."""
    return shared_config("mixtral", "MixtralForCausalLM", dense) | {
        "num_local_experts": recipe.num_experts,
        "num_experts_per_tok": recipe.top_k,
        "sliding_window": dense.get("sliding_window"),
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }


SPEC = ArchSpec(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    dense=("llama", "mistral"),
    experts={
        "gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        "up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
        "down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
    },
    router="model.layers.{layer}.block_sparse_moe.gate.weight",
    num_experts_key="num_local_experts",
    top_k_key="num_experts_per_tok",
    config_map=config_map,
)
