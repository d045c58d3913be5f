"""Hunyuan MoE: norms on queries and keys, softmax, top-k, renormalised; always one shared expert; router in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.arch.dense import QKVO
from moetool.arch.limits import Limit
from moetool.arch.spec import ArchSpec, SharedExpert, ffn
from moetool.recipe import UpcycleRecipe


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """The shared expert has the size of a routed one; other readers want some numbers once per layer."""
    layers = dense["num_hidden_layers"]
    return {
        "moe_topk": [recipe.top_k] * layers,
        "moe_intermediate_size": [dense["intermediate_size"] // recipe.granularity] * layers,
        "num_shared_expert": [recipe.shared_experts] * layers,
        "attention_bias": bool(dense["biases"]),
        "eod_token_id": dense["eod_token_id"],
        "pretraining_tp": 1,
    }


SPEC = ArchSpec(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    dense=("hunyuan_v1_dense",),
    router="model.layers.{layer}.mlp.gate.wg.weight",
    top_k_key="moe_topk",
    units_key="intermediate_size",
    config_map=config_map,
    router_fp32=True,
    router_dtype="F32",
    shared=SharedExpert(ffn("mlp.shared_mlp"), default=1, sizes=(1,)),
    biases=QKVO,
    limits=(
        Limit("llama.cpp", "its converter reads only the tiktoken vocabulary of Hunyuan's own code"),
        Limit("mlx", "it does not read the family's current configuration"),
    ),
)
