"""Granite 4's hybrid with attention in every layer: Granite MoE with biases of attention and a shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.arch import granitemoe
from moetool.arch.limits import Limit, none_of, rope
from moetool.arch.spec import ArchSpec, SharedExpert
from moetool.recipe import UpcycleRecipe


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """No layer is Mamba's, but readers ask for its sizes, which must agree with the hidden size."""
    units = dense["intermediate_size"] // recipe.granularity
    heads = dense["num_attention_heads"]
    return granitemoe.config_map(dense, recipe) | {
        "attention_bias": True,
        "shared_intermediate_size": units * (recipe.shared_experts or 0),
        "position_embedding_type": "rope",
        "layer_types": ["attention"] * dense["num_hidden_layers"],
        "mamba_n_heads": heads,
        "mamba_d_head": 2 * dense["hidden_size"] // heads,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }


LAYER = "model.layers.{layer}"
SPEC = ArchSpec(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    dense=("qwen2", "granite", "llama"),
    experts=granitemoe.SPEC.experts,
    router=granitemoe.SPEC.router,
    num_experts_key="num_local_experts",
    top_k_key="num_experts_per_tok",
    units_key="intermediate_size",
    config_map=config_map,
    ranked_by="logits",
    shared=SharedExpert(
        {
            "gate": f"{LAYER}.shared_mlp.input_linear.weight",
            "up": f"{LAYER}.shared_mlp.input_linear.weight",
            "down": f"{LAYER}.shared_mlp.output_linear.weight",
        },
        default=1,
    ),
    biases="qkvo",
    zero_biases="qkvo",  # one switch for all four, and Qwen2 has three
    head_dim=False,
    limits=(
        *(
            Limit(client, "it cannot be without a shared expert", none_of("shared_intermediate_size"))
            for client in ("vllm", "llama.cpp", "mlx")
        ),
        Limit("llama.cpp", "it cannot scale positions as llama3 does in the family", rope("llama3")),
        Limit("mlx", "it ignores llama3's scaling of positions in the family", rope("llama3")),
    ),
)
