"""Granite MoE with windows and positions by layer, and sinks: SmolLM3's fourth layers have no positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.arch import granitemoe, granitemoehybrid
from moetool.arch.limits import Limit, no_windows, some
from moetool.arch.spec import ArchSpec, SharedExpert
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


MOE = "model.layers.{layer}.block_sparse_moe"
SPEC = ArchSpec(
    model_type="granitemoe_swa",
    architecture="GraniteMoeSWAForCausalLM",
    dense=("smollm3", "granite_swa", "mistral"),
    experts={
        "gate": f"{MOE}.experts.gate_up_proj",
        "up": f"{MOE}.experts.gate_up_proj",
        "down": f"{MOE}.experts.down_proj",
    },
    router=f"{MOE}.router.weight",
    num_experts_key="num_local_experts",
    top_k_key="num_experts_per_tok",
    units_key="intermediate_size",
    config_map=config_map,
    ranked_by="logits",
    shared=SharedExpert(granitemoehybrid.SHARED_MLP),
    biases="qkvo",
    windows="layer_types",
    sinks="self_attn.sinks",
    rotary_bases=True,
    scratch=False,
    head_dim=False,
    limits=(
        Limit("transformers-4", "it does not know the family"),
        Limit("llama.cpp", "it stops where no layer has a sliding window", no_windows),
        Limit("llama.cpp", "it gives the same positions to all layers", lambda c: len(set(c["layer_rope_theta"])) > 1),
        Limit("vllm", "it leaves out the biases of attention in the family", some("attention_bias")),
        Limit("mlx", "it does not know the family"),
    ),
)
