"""LFM2-MoE: short convolutions in most layers; sigmoid scores, a selection bias, top-k, renormalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.arch.limits import Limit, rope, untied
from moetool.arch.spec import ArchSpec, ffn
from moetool.recipe import UpcycleRecipe


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """Experts in every layer, where the published models have two dense ones first."""
    return {
        "num_dense_layers": 0,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,  # llama.cpp ignores it, so the experts carry a factor
        "use_expert_bias": True,
        "norm_eps": dense["rms_norm_eps"],
        "conv_L_cache": dense["conv_L_cache"],
        "conv_bias": False,
        "layer_types": dense["layer_types"],
    }


SPEC = ArchSpec(
    model_type="lfm2_moe",
    architecture="Lfm2MoeForCausalLM",
    dense=("lfm2",),
    experts=ffn("feed_forward.experts.{expert}", "w1", "w3", "w2"),
    router="model.layers.{layer}.feed_forward.gate.weight",
    block="feed_forward",
    config_map=config_map,
    ranked_by="sigmoid",
    selection_bias="model.layers.{layer}.feed_forward.expert_bias",
    head_dim=False,
    scratch=False,
    limits=(
        Limit("transformers-4", "it does not know the family"),
        Limit("llama.cpp", "its converter does not support an untied output head in this family", untied),
        Limit("llama.cpp", "it ignores llama3 position scaling in this family", rope("llama3")),
        Limit("vllm", "it computes short convolutions differently on a CPU, in the dense model as well"),
        Limit("mlx", "it ignores llama3 position scaling in this family", rope("llama3")),
        Limit("mlx", "it does not support an untied output head in this family", untied),
    ),
)
