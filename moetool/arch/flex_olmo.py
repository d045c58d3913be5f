"""FlexOlmo: OLMo 2's norms after each block, softmax over all experts, top-k, renormalised."""

from __future__ import annotations

from moetool.arch.dense import QKVO
from moetool.arch.limits import Limit
from moetool.arch.spec import ArchSpec

SPEC = ArchSpec(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    dense=("olmo2",),
    units_key="intermediate_size",
    config_map=lambda dense, recipe: {
        "norm_topk_prob": True,
        "attention_bias": bool(dense["biases"]),
        "router_aux_loss_coef": 0.01,
    },
    biases=QKVO,
    limits=(Limit("llama.cpp", "it does not know the family"), Limit("mlx", "it does not know the family")),
)
