"""GLM-4-MoE: experts as Solar Open has them, behind the attention of several dense families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moetool.arch import solar_open
from moetool.arch.limits import Limit, rope
from moetool.arch.spec import leading_dense
from moetool.recipe import UpcycleRecipe


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """Positions in as much of each head as before: GLM's own default is half of it."""
    part = dense["rope_parameters"].get("partial_rotary_factor", 1.0)
    return {
        **solar_open.one_group(recipe),
        "use_qk_norm": dense["family"] == "qwen3",
        "attention_bias": bool(dense["biases"]),
        "partial_rotary_factor": part,
        "rope_parameters": dense["rope_parameters"] | {"partial_rotary_factor": part},
        "num_nextn_predict_layers": 0,
    }


SPEC = replace(
    solar_open.SPEC,
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    dense=("llama", "mistral", "qwen2", "qwen3"),
    config_map=config_map,
    partial_rotary=True,
    moe_layers=leading_dense("first_k_dense_replace"),
    ties=False,  # vLLM and mlx-lm never tie, and would compute with a head that nobody wrote
    limits=(
        Limit("llama.cpp", "its converter needs GLM's special token [gMASK] in the tokenizer", unless="[gMASK]"),
        Limit("llama.cpp", "it ignores llama3 position scaling in this family", rope("llama3")),
        *solar_open.always_shared("vllm", "llama.cpp", "mlx"),
        Limit("mlx", "it ignores llama3 position scaling in this family", rope("llama3")),
    ),
)
