"""The dense families that can be upcycled: their tensors, and the defaults their config may omit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moetool.errors import CheckpointError, ConfigError

# Letters in the shapes below: V vocabulary, D hidden, F intermediate, Q query heads x head_dim,
# KV key-value heads x head_dim.
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
ATTENTION = {
    "self_attn.q_proj.weight": "Q D",
    "self_attn.k_proj.weight": "KV D",
    "self_attn.v_proj.weight": "KV D",
    "self_attn.o_proj.weight": "D Q",
}
PRE_NORM = {"input_layernorm.weight": "D", "post_attention_layernorm.weight": "D"}
# gate, up, down: name within a layer -> shape.
FFN = {"mlp.gate_proj.weight": "F D", "mlp.up_proj.weight": "F D", "mlp.down_proj.weight": "D F"}


@dataclass(frozen=True)
class DenseSpec:
    """A dense family.

    Attributes:
        model_type: in config.json.
        defaults: what transformers assumes where config.json is silent.
        layer: names within `model.layers.N.` (without the FFN) -> shapes.
        refuse: config keys that change the function in a way no target has -> the value that is fine.
    """

    model_type: str
    defaults: Mapping[str, Any]
    layer: Mapping[str, str] = field(default_factory=lambda: ATTENTION | PRE_NORM)
    refuse: Mapping[str, Any] = field(default_factory=dict)


_COMMON = {
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
}

DENSE = {
    "llama": DenseSpec(
        "llama",
        _COMMON | {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "num_key_value_heads": None},
        refuse={"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": DenseSpec(
        "mistral",
        _COMMON
        | {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
}

# What is used or carried over, by the type that it must have.
KINDS: dict[str, tuple[tuple[type, ...], str]] = (
    dict.fromkeys(
        ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"),
        ((int,), "a positive whole number"),
    )
    | dict.fromkeys(("rms_norm_eps", "initializer_range", "attention_dropout"), ((int, float), "a positive number"))
    | {"hidden_act": ((str,), "a name"), "tie_word_embeddings": ((bool,), "true or false")}
)
NULLABLE = ("sliding_window", "num_key_value_heads", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id")
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def dense_config(config: Mapping[str, Any]) -> tuple[DenseSpec, dict[str, Any]]:
    """The family of a dense config.json, and the config with every default filled in.

    `rope_parameters` holds the rotary settings in transformers 5's form, whichever form was read.

    Raises:
        ConfigError: the family cannot be upcycled, is an MoE already, or is quantised.
        CheckpointError: a size is missing or no positive whole number.
    """
    model_type = config.get("model_type")
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        method = method.get("quant_method", "an unnamed method") if isinstance(method, dict) else method
        raise ConfigError(f"the source is quantised ({method}); upcycle the unquantised model it was made from")
    if not isinstance(model_type, str) or model_type not in DENSE:
        known = ", ".join(DENSE)
        moe = any(key in config for key in ("num_local_experts", "num_experts", "n_routed_experts"))
        why = "is a Mixture of Experts already" if moe else "is no family that can be upcycled"
        raise ConfigError(f"model_type {str(model_type)[:60]!r} {why}; the dense families are {known}")
    spec = DENSE[model_type]
    for key in REQUIRED:
        if type(config.get(key)) is not int or config[key] < 1:
            raise CheckpointError(f"config.json: {key} is {config.get(key)!r}, expected a positive whole number")
    for key, fine in spec.refuse.items():
        if config.get(key, fine) != fine:
            raise ConfigError(f"config.json: {key} = {config[key]!r} has no place in any MoE family of {model_type}")
    # null is a value (no end-of-text token, a window without end), except where the model needs a number.
    full = dict(spec.defaults) | {key: value for key, value in config.items() if value is not None or key in NULLABLE}
    if "sliding_window" not in spec.defaults:
        full.pop("sliding_window", None)  # a leftover that the family does not read; its target might
    for key, (kind, what) in KINDS.items():
        value = full.get(key)
        if value is not None and not (type(value) in kind and (isinstance(value, (bool, str)) or _is_size(value, key))):
            raise CheckpointError(f"config.json: {key} is {str(value)[:60]!r}, expected {what}")
    full["num_key_value_heads"] = full["num_key_value_heads"] or full["num_attention_heads"]
    full["head_dim"] = full["head_dim"] or full["hidden_size"] // full["num_attention_heads"]
    full["rope_parameters"] = _rope(full)
    return spec, full


def _is_size(value: float, key: str) -> bool:
    if key in ("initializer_range", "attention_dropout") and value == 0:
        return True
    return 0 < value < math.inf  # false for NaN, and exact for whole numbers of any length


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    theta = config["rope_theta"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"config.json: rope_parameters is {rope!r}, expected an object")
    rope = dict(rope)
    kind = rope.pop("type", None)  # the name before `rope_type`
    rope = {"rope_theta": theta, "rope_type": kind or "default"} | rope
    if type(rope["rope_theta"]) not in (int, float) or not _is_size(rope["rope_theta"], "rope_theta"):
        raise CheckpointError(f"config.json: rope_theta is {str(rope['rope_theta'])[:60]!r}, expected a number above 0")
    return rope


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """What the letters in a shape stand for."""
    return {
        "V": config["vocab_size"],
        "D": config["hidden_size"],
        "F": config["intermediate_size"],
        "Q": config["num_attention_heads"] * config["head_dim"],
        "KV": config["num_key_value_heads"] * config["head_dim"],
    }


def shape(letters: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """`"F D"` -> (intermediate_size, hidden_size)."""
    return tuple(sizes[letter] for letter in letters.split())
