"""Qwen2-MoE: softmax over all experts, top-k, renormalised; a shared expert behind a sigmoid gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.arch.dense import QKV, Windows
from moetool.arch.limits import Limit, none_of, windowed_in_some
from moetool.arch.spec import ArchSpec, SharedExpert, ffn, listed_dense
from moetool.recipe import UpcycleRecipe


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """Without `norm_topk_prob` the chosen experts' weights would not sum to 1."""
    units = dense["intermediate_size"] // recipe.granularity
    return {
        "shared_expert_intermediate_size": units * (recipe.shared_experts or 0),
        "norm_topk_prob": True,
        "qkv_bias": True,
        "use_sliding_window": dense["sliding_window"] is not None,
        "max_window_layers": dense.get("max_window_layers", dense["num_hidden_layers"]),
        "router_aux_loss_coef": 0.001,
    }


SPEC = ArchSpec(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    dense=("qwen2", "llama", "mistral"),
    config_map=config_map,
    shared=SharedExpert(ffn("mlp.shared_expert"), gate="model.layers.{layer}.mlp.shared_expert_gate.weight", default=1),
    moe_layers=listed_dense,
    biases=QKV,
    zero_biases=QKV,  # vLLM has them whatever qkv_bias says, and would leave them as the memory was
    windows=Windows.BY_LAYER,
    head_dim=False,
    limits=(
        Limit("llama.cpp", "it never normalises the weights of the chosen experts to sum to 1"),
        Limit("mlx", "it never normalises the weights of the chosen experts to sum to 1"),
        Limit("transformers-4", "it cannot mix layers with and without a window in this family", windowed_in_some),
        Limit("vllm", "it cannot mix layers with and without a window in this family", windowed_in_some),
        Limit("vllm", "it requires a shared expert", none_of("shared_expert_intermediate_size")),
    ),
)
