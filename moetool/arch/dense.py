"""The dense families that can be upcycled: their tensors, and the defaults their config may omit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moetool.errors import CheckpointError, ConfigError

# Letters in the shapes below: V vocabulary, D hidden, F intermediate, H head_dim, Q query heads x head_dim,
# KV key-value heads x head_dim.
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
NORM = "model.norm.weight"
ATTENTION = {
    "self_attn.q_proj.weight": "Q D",
    "self_attn.k_proj.weight": "KV D",
    "self_attn.v_proj.weight": "KV D",
    "self_attn.o_proj.weight": "D Q",
}
BIASES = {
    "q": ("self_attn.q_proj.bias", "Q"),
    "k": ("self_attn.k_proj.bias", "KV"),
    "v": ("self_attn.v_proj.bias", "KV"),
    "o": ("self_attn.o_proj.bias", "D"),
}
PRE_NORM = {"input_layernorm.weight": "D", "post_attention_layernorm.weight": "D"}
POST_NORM = {"post_attention_layernorm.weight": "D", "post_feedforward_layernorm.weight": "D"}
HEAD_NORM = {"self_attn.q_norm.weight": "H", "self_attn.k_norm.weight": "H"}
# gate, up, down: name within a layer -> shape.
FFN = {"mlp.gate_proj.weight": "F D", "mlp.up_proj.weight": "F D", "mlp.down_proj.weight": "D F"}


@dataclass(frozen=True)
class DenseSpec:
    """A dense family.

    Attributes:
        model_type: in config.json.
        defaults: what transformers assumes where config.json is silent.
        layer: names within `model.layers.N.` (without FFN and biases) -> shapes.
        biases: the projections of attention (of "qkvo") that always have a bias; where config.json
            has `attention_bias`, that decides for all four.
        refuse: config keys that change the function in a way no target has -> the value that is fine.
        windows: how config.json says which layers look back over `sliding_window` tokens only: never,
            `all` of them, or by `layer_types`.
    """

    model_type: str
    defaults: Mapping[str, Any]
    layer: Mapping[str, str] = field(default_factory=lambda: ATTENTION | PRE_NORM)
    biases: str = ""
    refuse: Mapping[str, Any] = field(default_factory=dict)
    windows: str | None = None


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

DENSE = {
    spec.model_type: spec
    for spec in (
        DenseSpec("llama", _COMMON | {"attention_bias": False}, refuse={"mlp_bias": False}),
        DenseSpec(
            "mistral",
            _COMMON | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
            windows="all",
        ),
        DenseSpec("qwen2", _QWEN, biases="qkv", windows="layer_types"),
        DenseSpec(
            "qwen3",
            _QWEN | {"head_dim": 128, "attention_bias": False},
            layer=ATTENTION | HEAD_NORM | PRE_NORM,
            windows="layer_types",
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
            windows="layer_types",
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

NUMBERS = (
    "rms_norm_eps", "layer_norm_eps", "initializer_range", "attention_dropout", "embedding_multiplier",
    "logits_scaling", "residual_multiplier", "attention_multiplier", "logit_scale",
)  # fmt: skip
# What is used or carried over, by the type that it must have.
KINDS: dict[str, tuple[tuple[type, ...], str]] = (
    dict.fromkeys(
        ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"),
        ((int,), "a positive whole number"),
    )
    | dict.fromkeys(NUMBERS, ((int, float), "a positive number"))
    | dict.fromkeys(("tie_word_embeddings", "attention_bias", "use_sliding_window"), ((bool,), "true or false"))
    | {"hidden_act": ((str,), "a name")}
)
MAX_LAYERS = 10_000
LAYER_TYPES = ("full_attention", "sliding_attention")
NULLABLE = ("sliding_window", "num_key_value_heads", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id")
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def dense_config(config: Mapping[str, Any]) -> tuple[DenseSpec, dict[str, Any]]:
    """The family of a dense config.json, and the config with every default filled in.

    `rope_parameters` holds the rotary settings in transformers 5's form, whichever form was read;
    `layer_types` says of each layer whether it looks back over `sliding_window` tokens only, which is
    null where none does; `biases` names the projections of attention that have one.

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
    for key, (kind, what) in KINDS.items():
        value = full.get(key)
        if value is not None and not (type(value) in kind and (isinstance(value, (bool, str)) or _is_size(value, key))):
            raise CheckpointError(f"config.json: {key} is {str(value)[:60]!r}, expected {what}")
    full["num_key_value_heads"] = full["num_key_value_heads"] or full["num_attention_heads"]
    full["head_dim"] = full["head_dim"] or full["hidden_size"] // full["num_attention_heads"]
    if not full["head_dim"]:
        raise CheckpointError(
            f"config.json: {full['num_attention_heads']} attention heads do not fit a hidden size of"
            f" {full['hidden_size']}"
        )
    full["rope_parameters"] = _rope(full)
    full["biases"] = ("qkvo" if full["attention_bias"] else "") if "attention_bias" in spec.defaults else spec.biases
    full["layer_types"] = _layer_types(spec, full)
    if "sliding_attention" not in full["layer_types"]:
        full["sliding_window"] = None  # also a leftover that the family does not read: its target might
    return spec, full


def _layer_types(spec: DenseSpec, config: Mapping[str, Any]) -> list[str]:
    """`full_attention` or `sliding_attention` a layer, as transformers fills them in."""
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if layers > MAX_LAYERS:
        raise CheckpointError(f"config.json: num_hidden_layers is {layers}, more than any model has")
    if spec.windows is None or window is None:
        return ["full_attention"] * layers
    given = config.get("layer_types")  # a Mistral with them is a Ministral, in whatever form it says so
    if spec.windows == "all" and given is None:
        return ["sliding_attention"] * layers
    if given is not None:
        if not isinstance(given, list) or len(given) != layers or not all(kind in LAYER_TYPES for kind in given):
            raise CheckpointError(f"config.json: layer_types is no list of {layers} times {' or '.join(LAYER_TYPES)}")
        return given
    for key in ("sliding_window_pattern", "max_window_layers"):
        if key in spec.defaults and (type(config[key]) is not int or config[key] < 0):
            raise CheckpointError(f"config.json: {key} is {str(config[key])[:60]!r}, expected a whole number")
    if "sliding_window_pattern" in spec.defaults:
        pattern = max(1, config["sliding_window_pattern"])
        return [LAYER_TYPES[(i + 1) % pattern != 0] for i in range(layers)]
    return [LAYER_TYPES[i >= config["max_window_layers"]] for i in range(layers)]


def layer_tensors(spec: DenseSpec, config: Mapping[str, Any]) -> dict[str, str]:
    """Names within a layer, without the FFN -> shapes; of a filled config."""
    return dict(spec.layer) | dict(BIASES[projection] for projection in config["biases"])


def _is_size(value: float, key: str) -> bool:
    if key in ("initializer_range", "attention_dropout") and value == 0:
        return True
    return 0 < value < 2**63  # false for NaN, and exact for whole numbers of any length


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
        "H": config["head_dim"],
        "Q": config["num_attention_heads"] * config["head_dim"],
        "KV": config["num_key_value_heads"] * config["head_dim"],
    }


def shape(letters: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """`"F D"` -> (intermediate_size, hidden_size)."""
    return tuple(sizes[letter] for letter in letters.split())
