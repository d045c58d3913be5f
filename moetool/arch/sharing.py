"""How transformers shares each family between processes: its plans as data, without loading it.

The plans of a Mixture of Experts name modules and parameters, with `*` for a layer. A test compares them with those of
the installed transformers, as far as they name what a model has.
"""

from __future__ import annotations

from collections.abc import Mapping

FSDP = {
    "model.embed_tokens": "free_full_weight",
    "model.layers.*": "free_full_weight",
    "model.norm": "keep_full_weight",
    "lm_head": "keep_full_weight",
}
_LAYER = "model.layers.*."
_HEAD = {"lm_head": "colwise_gather_output"}
_ENDS = {**_HEAD, "model.embed_tokens": "embedding_rowwise"}
_ATTENTION = {
    **{f"{_LAYER}self_attn.{name}_proj": "colwise" for name in "qkv"},
    f"{_LAYER}self_attn.o_proj": "rowwise",
}
_GATHERED = {  # norms over all heads need them together
    **{f"{_LAYER}self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"},
    f"{_LAYER}self_attn.o_proj": "rowwise_split_input",
}
_HEAD_NORMS = {f"{_LAYER}self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
_SINKS = {f"{_LAYER}self_attn.sinks": "colwise", f"{_LAYER}self_attn": "local_params"}
_LINEAR = {
    f"{_LAYER}linear_attn.{name}": "colwise_gather_output"
    for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
}


def _ffn(block: str) -> dict[str, str]:
    names = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    return {f"{_LAYER}{block}.{name}": style for name, style in names.items()}


def _experts(block: str) -> dict[str, str]:
    experts = f"{_LAYER}{block}.experts"
    return {
        f"{experts}.gate_up_proj": "packed_colwise",
        f"{experts}.down_proj": "rowwise",
        experts: "moe_tp_experts",
    }


_DENSE = {**_ENDS, **_ATTENTION, **_ffn("mlp")}
_MOE = {**_ENDS, **_ATTENTION, **_experts("mlp")}
_GRANITE = _experts("block_sparse_moe")
_PLAIN = (
    "llama", "mistral", "qwen2", "ernie4_5", "granite", "cohere2", "smollm3", "cwm", "internlm3", "iquestcoder",
    "seed_oss", "helium", "cohere", "ministral",
)  # fmt: skip
# Family -> module or parameter -> style of tensor parallelism.
TENSOR_PARALLEL: dict[str, Mapping[str, str]] = {
    "mixtral": _MOE,
    "solar_open": _MOE,
    "qwen2_moe": {**_MOE, **_ffn("mlp")},
    "qwen3_moe": {**_MOE, **_ffn("mlp"), **_HEAD_NORMS},
    "cohere2_moe": {**_MOE, **_ffn("mlp")},
    "flex_olmo": {**_ENDS, **_GATHERED, **_experts("mlp")},
    "qwen3_5_moe_text": {**_MOE, **_HEAD_NORMS, **_ffn("mlp.shared_expert"), **_LINEAR},
    "glm4_moe": {**_MOE, **_ffn("mlp.shared_experts"), **_ffn("mlp")},
    "ernie4_5_moe": {**_MOE, **_ffn("mlp.shared_experts"), **_ffn("mlp")},
    "dots1": {**_MOE, **_HEAD_NORMS, **_ffn("mlp.shared_experts"), **_ffn("mlp")},
    "lfm2_moe": {**_ENDS, **_experts("feed_forward")},
    "hunyuan_v1_moe": {**_ENDS, **_experts("mlp")},
    "granitemoe": {**_ENDS, **_GRANITE},
    "granitemoehybrid": {**_ENDS, **_GRANITE},
    "granitemoe_swa": {**_ENDS, **_ATTENTION, **_SINKS, **_GRANITE},
    **dict.fromkeys(_PLAIN, _DENSE),
    "qwen3": {**_DENSE, **_HEAD_NORMS},
    "qwen3_5_text": {**_DENSE, **_HEAD_NORMS, **_LINEAR},
    "olmo2": {**_ENDS, **_GATHERED, **_ffn("mlp")},
    "granite_swa": {**_DENSE, **_SINKS},
    "lfm2": _HEAD,
    "hunyuan_v1_dense": _HEAD,
    "phi3": {
        **_ENDS,
        f"{_LAYER}self_attn.qkv_proj": "colwise_gather_output",
        f"{_LAYER}self_attn.o_proj": "rowwise_split_input",
        f"{_LAYER}mlp.gate_up_proj": "colwise_gather_output",
        f"{_LAYER}mlp.down_proj": "rowwise_split_input",
    },
}
