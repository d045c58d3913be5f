"""Solar Open: Llama's attention, sigmoid scores, a selection bias, shared experts; router in fp32.

GLM-4-MoE and dots.llm1 have the same experts, with another attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.arch.dense import QKV
from moetool.arch.limits import Limit, none_of
from moetool.arch.spec import ArchSpec, SharedExpert, ffn
from moetool.recipe import UpcycleRecipe


def one_group(recipe: UpcycleRecipe) -> dict[str, Any]:
    """One group of experts; the chosen experts' weights sum to 1 before the factor."""
    return {"n_shared_experts": recipe.shared_experts, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """Positions in all of each head."""
    return {
        **one_group(recipe),
        "attention_bias": bool(dense["biases"]),
        "partial_rotary_factor": 1.0,
        "rope_parameters": dense["rope_parameters"] | {"partial_rotary_factor": 1.0},
    }


def always_shared(*clients: str) -> tuple[Limit, ...]:
    """The limit of clients that need a shared expert."""
    return tuple(Limit(name, "it requires a shared expert", none_of("n_shared_experts")) for name in clients)


SPEC = ArchSpec(
    model_type="solar_open",
    architecture="SolarOpenForCausalLM",
    dense=("llama",),
    config_map=config_map,
    num_experts_key="n_routed_experts",
    router_fp32=True,
    ranked_by="sigmoid",
    selection_bias="model.layers.{layer}.mlp.gate.e_score_correction_bias",
    shared=SharedExpert(ffn("mlp.shared_experts"), default=1),
    scaling_key="routed_scaling_factor",
    biases=QKV,
    limits=(
        Limit("transformers-4", "it does not know the family"),
        Limit("llama.cpp", "its converter needs Solar's special tokens in the tokenizer"),
        *always_shared("vllm", "llama.cpp"),
        Limit("mlx", "it does not know the family"),
    ),
)
