"""FlexOlmo: OLMo 2's norms after each block, softmax over all experts, top-k, renormalised."""

from __future__ import annotations

from moetool.arch.limits import Limit
from moetool.arch.spec import ArchSpec, ffn

SPEC = ArchSpec(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    dense=("olmo2",),
    experts=ffn("mlp.experts.{expert}"),
    router="model.layers.{layer}.mlp.gate.weight",
    num_experts_key="num_experts",
    top_k_key="num_experts_per_tok",
    units_key="intermediate_size",
    config_map=lambda dense, recipe: {
        "norm_topk_prob": True,
        "attention_bias": bool(dense["biases"]),
        "router_aux_loss_coef": 0.01,
    },
    biases="qkvo",
    limits=(Limit("llama.cpp", "it does not know the family"), Limit("mlx", "it does not know the family")),
)
