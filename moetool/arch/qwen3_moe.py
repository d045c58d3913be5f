"""Qwen3-MoE: norms on queries and keys, softmax over all experts, top-k, renormalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.arch.dense import QKVO, Windows
from moetool.arch.limits import Limit, rope, some, windowed
from moetool.arch.spec import ArchSpec, listed_dense
from moetool.recipe import UpcycleRecipe


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """transformers 5 writes `num_local_experts`, others read `num_experts`: both are there."""
    return {
        "num_experts": recipe.num_experts,
        "norm_topk_prob": True,
        "attention_bias": bool(dense["biases"]),
        "use_sliding_window": dense["sliding_window"] is not None,
        "max_window_layers": 0 if dense["sliding_window"] is not None else dense["num_hidden_layers"],
        "router_aux_loss_coef": 0.001,
    }


SPEC = ArchSpec(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    dense=("qwen3",),
    num_experts_key="num_local_experts",
    keys={"num_experts": "num_local_experts"},
    config_map=config_map,
    moe_layers=listed_dense,
    biases=QKVO,
    windows=Windows.ALL,
    limits=(
        Limit("llama.cpp", "its converter does not support dense layers in this family", some("mlp_only_layers")),
        Limit("llama.cpp", "it ignores the sliding window", windowed),
        Limit("llama.cpp", "it has no attention biases in this family", some("attention_bias")),
        Limit("llama.cpp", "it ignores llama3 position scaling in this family", rope("llama3")),
        Limit("vllm", "it leaves out the attention biases in this family", some("attention_bias")),
        Limit("mlx", "it has no attention biases in this family", some("attention_bias")),
        Limit("mlx", "it ignores llama3 position scaling in this family", rope("llama3")),
    ),
)
