"""The models of docs/recipes.md: their published sizes, as checkpoints of headers whose weights are holes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"

_LLAMA3: dict[str, Any] = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
_QWEN25: dict[str, Any] = {"model_type": "qwen2", "use_sliding_window": False}
_QWEN3: dict[str, Any] = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
_OLMO2: dict[str, Any] = {"model_type": "olmo2", "vocab_size": 100352, "tie_word_embeddings": False}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B": _LLAMA3 | _sizes(2048, 8192, 16, 32) | {"head_dim": 64, "tie_word_embeddings": True},
    "meta-llama/Llama-3.1-8B": _LLAMA3 | _sizes(4096, 14336, 32, 32) | {"head_dim": 128, "tie_word_embeddings": False},
    "Qwen/Qwen2.5-1.5B": _QWEN25
    | _sizes(1536, 8960, 28, 12)
    | {"vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen/Qwen2.5-7B": _QWEN25
    | _sizes(3584, 18944, 28, 28)
    | {"vocab_size": 152064, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "Qwen/Qwen3-0.6B-Base": _QWEN3 | _sizes(1024, 3072, 28, 16) | {"tie_word_embeddings": True},
    "Qwen/Qwen3-1.7B-Base": _QWEN3 | _sizes(2048, 6144, 28, 16) | {"tie_word_embeddings": True},
    "Qwen/Qwen3-8B-Base": _QWEN3 | _sizes(4096, 12288, 36, 32) | {"tie_word_embeddings": False},
    "allenai/OLMo-2-0425-1B": _OLMO2 | _sizes(2048, 8192, 16, 16) | {"num_key_value_heads": 16},
    "allenai/OLMo-2-1124-7B": _OLMO2 | _sizes(4096, 11008, 32, 32) | {"num_key_value_heads": 32},
}
# Of the same page, at paper scale.
LARGE: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-70B": _LLAMA3 | _sizes(8192, 28672, 80, 64) | {"head_dim": 128, "tie_word_embeddings": False},
    "Qwen/Qwen3-32B": _QWEN3 | _sizes(5120, 25600, 64, 64) | {"tie_word_embeddings": False},
}
POSITIONS = {"llama": 131072, "qwen2": 131072, "qwen3": 32768, "olmo2": 4096}


def config(name: str) -> dict[str, Any]:
    """config.json of a model, as far as it decides sizes."""
    found = (CONFIGS | LARGE)[name]
    family = found["model_type"]
    architecture = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "olmo2": "Olmo2"}[family] + "ForCausalLM"
    return {
        **found, "architectures": [architecture], "max_position_embeddings": POSITIONS[family], "dtype": "bfloat16",
        "hidden_act": "silu", "rope_theta": 500000.0,
    }  # fmt: skip


def save_headers(name: str, folder: Path) -> Path:
    """A checkpoint of a model's shapes in bf16 whose weights are a hole that takes no disk."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    folder.mkdir(parents=True)
    settings = config(name)
    (folder / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[settings["model_type"]](**settings))
    entries, end = {}, 0
    for tensor, value in model.state_dict().items():
        if tensor != "lm_head.weight" or not settings["tie_word_embeddings"]:
            size = 2 * value.numel()
            entries[tensor] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [end, end + size]}
            end += size
    raw = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return folder


def table(name: str = "sizes") -> list[dict[str, str]]:
    """The rows of one of the page's tables."""
    text = PAGE.read_text(encoding="utf-8")
    block = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    assert block
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block[1].strip().splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]
