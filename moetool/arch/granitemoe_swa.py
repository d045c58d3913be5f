"""Granite MoE with windows and positions by layer, and sinks: SmolLM3's fourth layers have no positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moetool.arch import granitemoe, granitemoehybrid
from moetool.arch.dense import Windows
from moetool.arch.limits import Limit, no_windows, some
from moetool.arch.spec import SharedExpert
from moetool.recipe import UpcycleRecipe


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """Multipliers as Granite MoE has them; a rotary base for each layer, 0 where it has no positions."""
    units = dense["intermediate_size"] // recipe.granularity
    return granitemoe.config_map(dense, recipe) | {
        "shared_intermediate_size": units * (recipe.shared_experts or 0),
        "layer_rope_theta": dense["rotary_bases"],
        # It wants a number even where no layer has a window.
        "sliding_window": dense["sliding_window"] or dense["max_position_embeddings"],
    }


SPEC = replace(
    granitemoe.SPEC.in_memory,
    model_type="granitemoe_swa",
    architecture="GraniteMoeSWAForCausalLM",
    dense=("smollm3", "granite_swa", "mistral"),
    config_map=config_map,
    shared=SharedExpert(granitemoehybrid.SHARED_MLP),
    windows=Windows.BY_LAYER,
    sinks="self_attn.sinks",
    rotary_bases=True,
    scratch=False,
    limits=(
        Limit("transformers-4", "it does not know the family"),
        Limit("llama.cpp", "it fails if no layer has a sliding window", no_windows),
        Limit("llama.cpp", "it uses the same positions in all layers", lambda c: len(set(c["layer_rope_theta"])) > 1),
        Limit("vllm", "it leaves out the attention biases in this family", some("attention_bias")),
        Limit("mlx", "it does not know the family"),
    ),
)
