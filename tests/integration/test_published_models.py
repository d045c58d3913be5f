"""`--plan` of models of published sizes: the keys that their kind of config.json has, and headers of full size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from tests import tiny

pytestmark = pytest.mark.slow
# name -> the target that `auto` takes, billions of parameters (of a multimodal model: of its text model), config.json
PUBLISHED: dict[str, tuple[str, float, dict[str, Any]]] = {
    "SmolLM3-3B": (
        "granitemoe_swa",
        3.08,
        {
            "model_type": "smollm3",
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "vocab_size": 128256,
            "max_position_embeddings": 65536,
            "rope_theta": 5000000.0,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": ["full_attention"] * 36,
            "max_window_layers": 28,
            "attention_bias": False,
            "mlp_bias": False,
            "pad_token_id": 128004,
            "bos_token_id": 128000,
            "eos_token_id": 128012,
        },
    ),
    "LFM2-1.2B": (
        "lfm2_moe",
        1.17,
        {
            "model_type": "lfm2",
            "block_auto_adjust_ff_dim": True,
            "block_dim": 2048,
            "block_ff_dim": 12288,
            "block_ffn_dim_multiplier": 1.0,
            "block_multiple_of": 256,
            "conv_L_cache": 3,
            "conv_bias": False,
            "conv_dim": 2048,
            "full_attn_idxs": [2, 5, 8, 10, 12, 14],
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": 16,
            "norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "vocab_size": 65536,
            "max_position_embeddings": 128000,
            "tie_embedding": True,
        },
    ),
    "Phi-4-mini": (
        "glm4_moe",
        3.84,
        {
            "model_type": "phi3",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "vocab_size": 200064,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-05,
            "attention_bias": False,
            "eos_token_id": 199999,
            "pad_token_id": 199999,
            "bos_token_id": 199999,
        },
    ),
    "Phi-4": (
        "mixtral",
        14.66,
        {
            "model_type": "phi3",
            "hidden_size": 5120,
            "intermediate_size": 17920,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 10,
            "vocab_size": 100352,
            "max_position_embeddings": 16384,
            "original_max_position_embeddings": 16384,
            "rope_scaling": None,
            "rope_theta": 250000,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-05,
            "eos_token_id": 100265,
            "pad_token_id": 100349,
            "bos_token_id": 100257,
        },
    ),
    "Phi-3-mini-4k": (
        "mixtral",
        3.82,
        {
            "model_type": "phi3",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rope_scaling": None,
            "sliding_window": 2047,
            "rms_norm_eps": 1e-05,
        },
    ),
    "Qwen2.5-VL-7B": (
        "qwen2_moe",
        7.62,
        {
            "model_type": "qwen2_5_vl",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "max_window_layers": 28,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": False,
            "vision_config": {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584},
        },
    ),
    "Seed-OSS-36B": (
        "glm4_moe",
        36.15,
        {
            "model_type": "seed_oss",
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 80,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 155136,
            "attention_bias": True,
            "attention_out_bias": False,
            "rope_theta": 10000000.0,
            "max_position_embeddings": 524288,
            "tie_word_embeddings": False,
        },
    ),
    "Granite-4.0-h-micro": (
        "granitemoehybrid",
        3.19,
        {
            "model_type": "granitemoehybrid",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "shared_intermediate_size": 8192,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "layer_types": ["mamba"] * 5 + (["attention"] + ["mamba"] * 9) * 3 + ["attention"] + ["mamba"] * 4,
            "mamba_d_conv": 4,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "mamba_expand": 2,
            "mamba_n_groups": 1,
            "mamba_n_heads": 64,
            "mamba_chunk_size": 256,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            "position_embedding_type": "nope",
            "vocab_size": 100352,
            "attention_multiplier": 0.015625,
            "embedding_multiplier": 12,
            "logits_scaling": 8,
            "residual_multiplier": 0.22,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-05,
            "max_position_embeddings": 131072,
            "rope_theta": 10000,
        },
    ),
    "LLaVA-1.5-7B": (
        "mixtral",
        6.74,
        {
            "model_type": "llava",
            "text_config": {
                "model_type": "llama",
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-05,
                "vocab_size": 32064,
            },
            "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "num_attention_heads": 16},
        },
    ),
    "Mistral-Small-3.1-24B": (
        "mixtral",
        23.57,
        {
            "model_type": "mistral3",
            "tie_word_embeddings": False,
            "text_config": {
                "model_type": "mistral",
                "head_dim": 128,
                "hidden_size": 5120,
                "intermediate_size": 32768,
                "max_position_embeddings": 131072,
                "num_attention_heads": 32,
                "num_hidden_layers": 40,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-05,
                "rope_theta": 1000000000.0,
                "sliding_window": None,
                "vocab_size": 131072,
            },
            "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24},
        },
    ),
}


def save_headers(config: dict[str, Any], folder: Path) -> None:
    """A folder whose shard has the header of the real one; its data is a hole that takes no disk."""
    settings = {key: value for key, value in config.items() if key != "model_type"}
    kind = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(CONFIG_MAPPING[config["model_type"]](**settings))
    entries, end = {}, 0
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight" and config.get("tie_word_embeddings", config.get("tie_embedding")):
            continue
        start, end = end, end + 2 * parameter.numel()
        entries[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    raw = json.dumps(entries).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
        if "lm_head.weight" in entries:  # in a hole it would equal the embeddings, and count as tied to them
            file.seek(8 + len(raw) + entries["lm_head.weight"]["data_offsets"][0])
            file.write(b"\1")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_a_plan(name: str, tmp_path: Path) -> None:
    target, billions, config = PUBLISHED[name]
    save_headers(config, tmp_path / "dense")
    code, out, err = tiny.in_process("upcycle", tmp_path / "dense", tmp_path / "moe", "--plan", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["target"] == target
    assert plan["parameters"]["dense"] / 1e9 == pytest.approx(billions, abs=0.006)
