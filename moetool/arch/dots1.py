"""dots.llm1: Qwen3's attention, and experts as Solar Open has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moetool.arch import solar_open
from moetool.arch.dense import QKVO, Windows
from moetool.arch.limits import Limit, grouped_queries, some, tied
from moetool.arch.spec import leading_dense
from moetool.recipe import UpcycleRecipe


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """Windows are counted from a layer on."""
    return {
        **solar_open.one_group(recipe),
        "scoring_func": "sigmoid",  # transformers has no other; llama.cpp must be told
        "attention_bias": bool(dense["biases"]),
        "max_window_layers": dense["max_window_layers"],
    }


SPEC = replace(
    solar_open.SPEC,
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    dense=("qwen3",),
    config_map=config_map,
    moe_layers=leading_dense("first_k_dense_replace"),
    biases=QKVO,
    windows=Windows.BY_LAYER,
    limits=(
        Limit("llama.cpp", "it supports only one key-value head per attention head in this family", grouped_queries),
        Limit("llama.cpp", "it does not support tied embeddings in this family", tied),
        Limit("mlx", "it has no attention biases in this family", some("attention_bias")),
        *solar_open.always_shared("vllm", "llama.cpp", "mlx"),
    ),
)
