"""Granite 4: Granite MoE with a shared expert, biases of attention, and Mamba in some layers or none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moetool.arch import granitemoe
from moetool.arch.dense import QKVO
from moetool.arch.limits import Limit, none_of, rope
from moetool.arch.spec import SharedExpert
from moetool.recipe import UpcycleRecipe

NO_LIMIT = [0.0, math.inf]  # of Mamba's time steps: what readers assume, and JSON has no word for


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """Where no layer is Mamba's, readers still ask for its sizes, which must agree with the hidden size."""
    units, heads = dense["intermediate_size"] // recipe.granularity, dense["num_attention_heads"]
    unused = {
        "mamba_n_heads": heads,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }
    mamba = {key: dense.get(key, value) for key, value in unused.items()}
    limit = {"time_step_limit": dense["time_step_limit"]} if dense.get("time_step_limit", NO_LIMIT) != NO_LIMIT else {}
    return {
        **granitemoe.config_map(dense, recipe),
        **mamba,
        **limit,
        "mamba_d_head": mamba["mamba_expand"] * dense["hidden_size"] // mamba["mamba_n_heads"],
        "attention_bias": True,
        "shared_intermediate_size": units * (recipe.shared_experts or 0),
        "position_embedding_type": dense.get("position_embedding_type", "rope"),
        # The names that vLLM and llama.cpp know.
        "layer_types": ["mamba" if kind == "linear_attention" else "attention" for kind in dense["layer_types"]],
    }


LAYER = "model.layers.{layer}"
SHARED_MLP = {
    "gate": f"{LAYER}.shared_mlp.input_linear.weight",
    "up": f"{LAYER}.shared_mlp.input_linear.weight",
    "down": f"{LAYER}.shared_mlp.output_linear.weight",
}
SPEC = replace(
    granitemoe.SPEC,
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    dense=("qwen2", "granite", "llama", "granitemoehybrid"),
    config_map=config_map,
    shared=SharedExpert(SHARED_MLP, default=1),
    zero_biases=QKVO,  # one switch for all four, and Qwen2 has three
    scratch=False,
    limits=(
        *(
            Limit(client, "it requires a shared expert", none_of("shared_intermediate_size"))
            for client in ("vllm", "llama.cpp", "mlx")
        ),
        Limit("llama.cpp", "it does not support llama3 position scaling in this family", rope("llama3")),
        Limit("mlx", "it computes Mamba differently", lambda config: "mamba" in config.get("layer_types", ())),
        Limit("mlx", "it ignores llama3 position scaling in this family", rope("llama3")),
    ),
)
