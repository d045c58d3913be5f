"""ERNIE 4.5 MoE: softmax with a selection bias, renormalised; shared experts; router in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.arch.limits import Limit, rope
from moetool.arch.spec import ArchSpec, SharedExpert, ffn
from moetool.recipe import UpcycleRecipe


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """No bias in any projection."""
    return {
        "moe_num_shared_experts": recipe.shared_experts,
        "moe_norm_min": 1e-12,
        "use_bias": False,
        "router_aux_loss_coef": 0.001,
    }


def moe_layers(moe: frozenset[int], layers: int) -> dict[str, Any]:
    """Layers from a first to a last one, at an interval counted from the first layer of the model."""
    first, last = min(moe), max(moe)
    for interval in range(1, layers + 1):
        if moe == frozenset(i for i in range(first, last + 1) if (i + 1) % interval == 0):
            return {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": interval}
    raise ValueError("it takes all, one range such as 2-11, or every:N")


def other_shared_size(config: Mapping[str, Any]) -> bool:
    """The shared expert does not have the size that llama.cpp assumes."""
    number = config.get("moe_num_shared_experts") or 0
    return bool(number) and number * config["moe_intermediate_size"] != (
        config["intermediate_size"] // config["num_key_value_heads"]
    )


def not_leading(config: Mapping[str, Any]) -> bool:
    """Dense layers lie between those with experts, or after them."""
    end = config.get("moe_layer_end_index", -1)
    return config.get("moe_layer_interval", 1) != 1 or end not in (-1, config["num_hidden_layers"] - 1)


BIAS = "model.layers.{layer}.mlp.moe_statics.e_score_correction_bias"
SPEC = ArchSpec(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    dense=("ernie4_5",),
    num_experts_key="moe_num_experts",
    top_k_key="moe_k",
    config_map=config_map,
    router_fp32=True,
    router_dtype="F32",
    selection_bias=BIAS,
    selection_bias_is_matrix=True,
    renamed={BIAS: "model.layers.{layer}.mlp.gate.moe_statics.e_score_correction_bias"},
    shared=SharedExpert(ffn("mlp.shared_experts")),
    moe_layers=moe_layers,
    limits=(
        Limit("llama.cpp", "its converter needs tokenizer.model", unless="tokenizer.model"),
        Limit("llama.cpp", "it expects shared experts of a different size", other_shared_size),
        Limit("llama.cpp", "it supports dense layers only at the start in this family", not_leading),
        Limit("llama.cpp", "it ignores llama3 position scaling in this family", rope("llama3")),
        Limit("mlx", "it ignores llama3 position scaling in this family", rope("llama3")),
    ),
)
