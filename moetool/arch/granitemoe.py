"""Granite MoE: Granite's multipliers, top-k, then softmax; one tensor holds all experts of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.arch.dense import QKVO
from moetool.arch.limits import Limit, rope, some
from moetool.arch.spec import ArchSpec
from moetool.recipe import UpcycleRecipe


def config_map(dense: Mapping[str, Any], recipe: UpcycleRecipe) -> dict[str, Any]:
    """A Llama's multipliers are 1, and its attention's the usual 1 / sqrt(head_dim)."""
    attention = dense["head_dim"] ** -0.5
    return {
        "attention_bias": bool(dense["biases"]),
        "embedding_multiplier": dense.get("embedding_multiplier", 1.0),
        "logits_scaling": dense.get("logits_scaling", 1.0),
        "residual_multiplier": dense.get("residual_multiplier", 1.0),
        "attention_multiplier": dense["attention_multiplier"] if dense["family"].startswith("granite") else attention,
        "router_aux_loss_coef": 0.001,
    }


MOE = "model.layers.{layer}.block_sparse_moe"
SPEC = ArchSpec(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    dense=("granite", "llama"),
    experts={
        "gate": f"{MOE}.input_linear.weight",
        "up": f"{MOE}.input_linear.weight",
        "down": f"{MOE}.output_linear.weight",
    },
    router=f"{MOE}.router.layer.weight",
    block="block_sparse_moe",
    renamed={f"{MOE}.router.layer.weight": f"{MOE}.router.weight"},
    num_experts_key="num_local_experts",
    units_key="intermediate_size",
    config_map=config_map,
    ranked_by="logits",
    biases=QKVO,
    head_dim=False,
    limits=(
        Limit("llama.cpp", "it does not support llama3 position scaling in this family", rope("llama3")),
        Limit("vllm", "it leaves out the attention biases in this family", some("attention_bias")),
    ),
)
