"""Mixtral: Llama's and Mistral's attention, softmax over all experts, top-k, renormalised."""

from __future__ import annotations

from moetool.arch.dense import Windows
from moetool.arch.limits import Limit, not_silu, own_head_dim, rope, windowed
from moetool.arch.spec import ArchSpec, ffn

ROUTER = "model.layers.{layer}.block_sparse_moe.gate.weight"
SPEC = ArchSpec(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    dense=("llama", "mistral"),
    experts=ffn("block_sparse_moe.experts.{expert}", "w1", "w3", "w2"),
    router=ROUTER,
    renamed={ROUTER: "model.layers.{layer}.mlp.gate.weight"},
    num_experts_key="num_local_experts",
    units_key="intermediate_size",
    config_map=lambda dense, recipe: {"router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0},
    windows=Windows.ALL,
    limits=(
        Limit("llama.cpp", "it ignores the sliding window", windowed),
        Limit("llama.cpp", "it computes SiLU whatever hidden_act says", not_silu),
        Limit("mlx", "it does not support head_dim", own_head_dim),
        Limit("mlx", "it ignores position scaling in this family", rope("llama3", "yarn")),
    ),
)
