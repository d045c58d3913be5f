"""The dense families that can be upcycled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moetool.arch import dense_derive as derive
from moetool.arch.dense import (
    ATTENTION,
    FFN,
    HEAD_NORM,
    LINEAR_ATTENTION,
    MAMBA,
    POST_NORM,
    PRE_NORM,
    QKV,
    SHORT_CONVOLUTION,
    SINKS,
    DenseSpec,
    Windows,
)

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": None,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
}
_QWEN = _COMMON | {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

DENSE: dict[str, DenseSpec] = {
    spec.model_type: spec
    for spec in (
        DenseSpec("llama", _COMMON | {"attention_bias": False}, refuse={"mlp_bias": False}),
        DenseSpec(
            "mistral",
            _COMMON | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
            windows=Windows.ALL,
        ),
        DenseSpec("qwen2", _QWEN, biases=QKV, windows=Windows.BY_LAYER),
        DenseSpec(
            "qwen3",
            _QWEN | {"head_dim": 128, "attention_bias": False},
            layer=ATTENTION | HEAD_NORM | PRE_NORM,
            windows=Windows.BY_LAYER,
        ),
        DenseSpec(
            "olmo2",
            _COMMON
            | {"rms_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 50279}
            | {"attention_bias": False},
            layer=ATTENTION | {"self_attn.q_norm.weight": "Q", "self_attn.k_norm.weight": "KV"} | POST_NORM,
        ),
        DenseSpec(
            "ernie4_5",
            _COMMON
            | {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128}
            | {"pad_token_id": 0, "tie_word_embeddings": True, "rope_theta": 500000.0},
            refuse={"use_bias": False},
        ),
        DenseSpec(
            "granite",
            _COMMON
            | {"attention_bias": False, "embedding_multiplier": 1.0, "logits_scaling": 1.0}
            | {"residual_multiplier": 1.0, "attention_multiplier": 1.0},
            refuse={"mlp_bias": False},
        ),
        DenseSpec(
            "cohere2",
            {key: value for key, value in _COMMON.items() if key != "rms_norm_eps"}
            | {"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "max_position_embeddings": 8192}
            | {"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 255001, "tie_word_embeddings": True}
            | {"attention_bias": False, "sliding_window": 4096, "sliding_window_pattern": 4},
            layer=ATTENTION | {"input_layernorm.weight": "D"},
            windows=Windows.BY_LAYER,
        ),
        DenseSpec(
            "qwen3_5_text",
            _COMMON
            | {"max_position_embeddings": 32768, "num_key_value_heads": 4, "head_dim": 256, "attention_bias": False}
            | {"bos_token_id": None, "eos_token_id": None, "partial_rotary_factor": 0.25}
            | {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_conv_kernel_dim": 4}
            | {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "full_attention_interval": 4},
            layer=PRE_NORM,
            mixers={
                "full_attention": ATTENTION | HEAD_NORM | {"self_attn.q_proj.weight": "2Q D"},  # with a gate
                "linear_attention": LINEAR_ATTENTION,
            },
            refuse={"attention_bias": False},
            partial_rotary=True,
            derive=derive.every_fourth,
        ),
        DenseSpec(
            "granite_swa",
            _COMMON
            | {"attention_bias": False, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "rms_norm_eps": 1e-5}
            | {"residual_multiplier": 1.0, "attention_multiplier": 1.0, "max_position_embeddings": 8192}
            | {"num_key_value_heads": 4, "bos_token_id": 100257, "eos_token_id": 100257, "tie_word_embeddings": True}
            | {"sliding_window": 128},
            layer=ATTENTION | SINKS | PRE_NORM,
            refuse={"mlp_bias": False},
            windows=Windows.BY_LAYER,
            derive=derive.granite_swa,
        ),
        DenseSpec(
            "smollm3",
            _COMMON
            | {"max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2000000.0}
            | {"pad_token_id": 128004, "bos_token_id": 128000, "eos_token_id": 128001, "tie_word_embeddings": True}
            | {"attention_bias": False, "no_rope_layer_interval": 4},
            refuse={"mlp_bias": False, "use_sliding_window": False},
            derive=derive.smollm3,
        ),
        DenseSpec(
            "granitemoehybrid",
            _COMMON
            | {"attention_bias": False, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "head_dim": None}
            | {"residual_multiplier": 1.0, "attention_multiplier": 1.0, "position_embedding_type": None}
            | {"shared_intermediate_size": 1024, "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256}
            | {"mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256}
            | {"mamba_conv_bias": True, "mamba_proj_bias": False},
            layer=PRE_NORM,
            mixers={"full_attention": ATTENTION, "linear_attention": MAMBA},
            fused={
                "shared_mlp.input_linear.weight": tuple(FFN)[:2],
                "shared_mlp.output_linear.weight": tuple(FFN)[2:],
            },
            derive=derive.granite_hybrid,
        ),
        DenseSpec(
            "lfm2",
            _COMMON
            | {"rms_norm_eps": 1e-5, "max_position_embeddings": 128000, "num_key_value_heads": 8, "pad_token_id": 0}
            | {"tie_word_embeddings": True, "rope_theta": 1000000.0, "conv_L_cache": 3, "block_multiple_of": 256}
            | {"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0},
            layer={"operator_norm.weight": "D", "ffn_norm.weight": "D"},
            mixers={
                "full_attention": {
                    "self_attn.q_proj.weight": "Q D",
                    "self_attn.k_proj.weight": "KV D",
                    "self_attn.v_proj.weight": "KV D",
                    "self_attn.out_proj.weight": "D Q",
                    "self_attn.q_layernorm.weight": "H",
                    "self_attn.k_layernorm.weight": "H",
                },
                "conv": SHORT_CONVOLUTION,
            },
            refuse={"conv_bias": False},
            fused={f"feed_forward.{ours}.weight": (name,) for ours, name in zip(("w1", "w3", "w2"), FFN, strict=True)},
            derive=derive.lfm2,
            keys={
                "norm_eps": "rms_norm_eps",
                "block_ff_dim": "intermediate_size",
                "tie_embedding": "tie_word_embeddings",
            },
            norm="model.embedding_norm.weight",
        ),
        DenseSpec(
            "hunyuan_v1_dense",
            _COMMON | {"rms_norm_eps": 1e-5, "pad_token_id": 0, "eod_token_id": 3} | {"attention_bias": False},
            layer=ATTENTION
            | {"self_attn.query_layernorm.weight": "H", "self_attn.key_layernorm.weight": "H"}
            | PRE_NORM,
        ),
    )
}

# Families that are another one, once their tensors have its names.
_QWEN_VL = (
    dict(DENSE["qwen2"].defaults)
    | {"num_key_value_heads": 8, "max_window_layers": 80, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0}
    | {"bos_token_id": 151643, "eos_token_id": 151645}
)
CWM_ROPE = {
    "rope_type": "llama3", "rope_theta": 1000000.0, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_ALIKE = (
    replace(
        DENSE["mistral"],
        model_type="phi3",
        like="mistral",
        defaults=_COMMON
        | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "eos_token_id": 32000, "pad_token_id": 32000}
        | {"sliding_window": None, "original_max_position_embeddings": 4096},
        derive=lambda config: {"layer_types": None},  # it does not read them: a window is in all layers
        partial_rotary=True,
        fused={
            "self_attn.qkv_proj.weight": tuple(ATTENTION)[:3],  # q, k, v
            "mlp.gate_up_proj.weight": tuple(FFN)[:2],
        },
    ),
    replace(DENSE["mistral"], model_type="ministral", like="mistral"),
    replace(
        DENSE["mistral"],
        model_type="cwm",
        like="mistral",
        windows=Windows.BY_LAYER,
        derive=derive.fourths_full,
        defaults=_COMMON
        | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
        | {"sliding_window": 8192, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
        | {"rope_theta": 1000000.0, "rope_parameters": CWM_ROPE},
        refuse={"mlp_bias": False},
    ),
    *(
        replace(
            DENSE["llama"],
            model_type=name,
            like="llama",
            defaults=dict(DENSE["llama"].defaults) | {"rms_norm_eps": 1e-5, "head_dim": 128} | more,
            refuse={"mlp_bias": False, "bias": False},
        )
        for name, more in (
            ("internlm3", {"max_position_embeddings": 32768, "num_key_value_heads": 2, "pad_token_id": 2}),
            ("iquestcoder", {"max_position_embeddings": 131072, "num_key_value_heads": 8}),
        )
    ),
    replace(
        DENSE["qwen2"],
        model_type="seed_oss",
        like="qwen2",
        defaults=_COMMON
        | {"max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128, "pad_token_id": 1}
        | {"bos_token_id": 0, "attention_bias": True, "attention_out_bias": False, "attention_dropout": 0.1},
        refuse={"mlp_bias": False},
        windows=Windows.NONE,
        out_bias="attention_out_bias",
    ),
    replace(
        DENSE["ernie4_5"],
        model_type="helium",
        like="ernie4_5",
        defaults=_COMMON
        | {"max_position_embeddings": 4096, "num_key_value_heads": 20, "head_dim": 128, "rms_norm_eps": 1e-8}
        | {"pad_token_id": 3, "rope_theta": 100000.0},
        refuse={"mlp_bias": False, "attention_bias": False},
    ),
    replace(
        DENSE["cohere2"],
        model_type="cohere",
        like="cohere2",
        defaults=dict(DENSE["cohere2"].defaults) | {"rope_theta": 500000.0},
        refuse={"use_qk_norm": False},
        # Cohere2 has positions in the layers with a window only, Cohere in all: a window over everything.
        derive=lambda config: {
            "sliding_window": config["max_position_embeddings"],
            "layer_types": ["sliding_attention"] * config["num_hidden_layers"],
        },
    ),
    *(
        replace(DENSE["qwen2"], model_type=name, like="qwen2", defaults=_QWEN_VL)
        for name in ("qwen2_vl_text", "qwen2_5_vl_text")
    ),
    replace(
        DENSE["qwen3"],
        model_type="qwen3_vl_text",
        like="qwen3",
        defaults=dict(DENSE["qwen3"].defaults) | {"max_position_embeddings": 128000, "rope_theta": 500000.0},
        windows=Windows.NONE,
    ),
)
DENSE |= {spec.model_type: spec for spec in _ALIKE}
