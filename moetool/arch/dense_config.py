"""A dense config.json, checked, and with every default filled in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetool.arch.dense import QKV, DenseSpec, Windows
from moetool.arch.dense_families import DENSE
from moetool.arch.forms import dense_tensors, is_wrapped, text_config
from moetool.arch.unfit import why_unfit
from moetool.checkpoint.reader import CheckpointReader
from moetool.errors import CheckpointError, ConfigError
from moetool.registry import suggest

NUMBERS = (
    "rms_norm_eps", "layer_norm_eps", "initializer_range", "attention_dropout", "embedding_multiplier",
    "logits_scaling", "residual_multiplier", "attention_multiplier", "logit_scale",
    "partial_rotary_factor", "block_ffn_dim_multiplier",
)  # fmt: skip
SIZES = (
    "linear_num_key_heads", "linear_num_value_heads", "linear_conv_kernel_dim", "linear_key_head_dim",
    "linear_value_head_dim", "full_attention_interval", "shared_intermediate_size", "mamba_n_heads", "mamba_n_groups",
    "mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_chunk_size", "conv_L_cache", "block_multiple_of",
    "no_rope_layer_interval",
)  # fmt: skip
# What is used or carried over, by the type that it must have.
KINDS: dict[str, tuple[tuple[type, ...], str]] = (
    dict.fromkeys(
        ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", *SIZES),
        ((int,), "a positive whole number"),
    )
    | dict.fromkeys(NUMBERS, ((int, float), "a positive number"))
    | dict.fromkeys(
        (
            "tie_word_embeddings",
            "attention_bias",
            "attention_out_bias",
            "use_sliding_window",
            "use_cache",
            "mamba_conv_bias",
            "mamba_proj_bias",
        ),
        ((bool,), "true or false"),
    )
    | {"hidden_act": ((str,), "a name")}
)
# Numbers that newer readers want with a point, whatever the source has.
FLOATS = ("rms_norm_eps", "layer_norm_eps", "initializer_range", "attention_dropout")
# A way of scaling positions -> the numbers that it needs.
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": (),
}
ACTIVATIONS = (
    "silu", "swish", "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid",
    "tanh",
)  # fmt: skip
MAX_LAYERS = 10_000
LAYER_TYPES = ("full_attention", "sliding_attention")
NULLABLE = ("sliding_window", "num_key_value_heads", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id")
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def dense_config(config: Mapping[str, Any]) -> tuple[DenseSpec, dict[str, Any]]:
    """The family of a dense config.json, and the config with every default filled in.

    `rope_parameters` holds the rotary settings in transformers 5's form, whichever form was read;
    `layer_types` says of each layer whether it looks back over `sliding_window` tokens only, which is
    null where none does; `rotary_bases` has each layer's, 0 where it has no positions; `biases` names the projections
    of attention that have one.

    Raises:
        ConfigError: the family cannot be upcycled, is an MoE already, or is quantised.
        CheckpointError: a size is missing or is not a positive whole number.
    """
    outer, given = config.get("model_type"), config
    config = text_config(config)
    model_type = config.get("model_type")
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method", "an unnamed method") if isinstance(method, dict) else method
        raise ConfigError(f"the source is quantised ({method}); upcycle the unquantised model it was made from")
    moe = any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    if not isinstance(model_type, str) or model_type not in DENSE or moe:
        inside = f" (the text model in a {str(outer)[:60]})" if outer != model_type else ""
        named = f"model_type {str(model_type)[:60]!r}{inside}"
        why = "it is already a Mixture of Experts" if moe else why_unfit(model_type)
        if why:
            raise ConfigError(f"{named} cannot be upcycled, because {why} (docs/models.md)")
        raise ConfigError(f"{named} is not a family that can be upcycled; the dense families are {', '.join(DENSE)}")
    spec = DENSE[model_type]
    config = {**config, **{usual: config[key] for key, usual in spec.keys.items() if config.get(key) is not None}}
    for key in REQUIRED:
        if type(config.get(key)) is not int or config[key] < 1:
            raise CheckpointError(f"config.json: {key} is {config.get(key)!r}, expected a positive whole number")
    if config["num_hidden_layers"] > MAX_LAYERS:  # before lists of that length are made
        raise CheckpointError(
            f"config.json: num_hidden_layers is {config['num_hidden_layers']}, more than any model has"
        )
    for key, fine in spec.refuse.items():
        if config.get(key, fine) != fine:
            raise ConfigError(f"config.json: {key} = {config[key]!r} has no place in any MoE family of {model_type}")
    # null is a value (no end-of-text token, a window without end), except where the model needs a number.
    full = dict(spec.defaults) | {key: value for key, value in config.items() if value is not None or key in NULLABLE}
    for key, (kind, what) in KINDS.items():
        value = full.get(key)
        if value is not None and not (type(value) in kind and (isinstance(value, (bool, str)) or _is_size(value, key))):
            raise CheckpointError(f"config.json: {key} is {str(value)[:60]!r}, expected {what}")
    full |= {key: float(full[key]) for key in FLOATS if type(full.get(key)) is int}
    if full["hidden_act"] not in ACTIVATIONS:
        name = full["hidden_act"][:60]
        near = suggest(name.lower(), ACTIVATIONS)
        raise ConfigError(f"config.json: hidden_act {name!r} is unknown to transformers{near}")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        tokens = full.get(key)
        several = tokens if isinstance(tokens, list) and key == "eos_token_id" else [tokens]
        if not all(token is None or type(token) is int for token in several):
            raise CheckpointError(f"config.json: {key} is {str(tokens)[:60]!r}, expected a token id")
    full["num_key_value_heads"] = full["num_key_value_heads"] or full["num_attention_heads"]
    full["head_dim"] = full["head_dim"] or full["hidden_size"] // full["num_attention_heads"]
    if not full["head_dim"]:
        raise CheckpointError(
            f"config.json: {full['num_attention_heads']} attention heads do not fit a hidden size of"
            f" {full['hidden_size']}"
        )
    full["text_model_of"] = outer if is_wrapped(given) else None
    full |= {"family": spec.family, "rope_parameters": _rope(spec, full)}
    full["rotary_bases"] = [full["rope_parameters"]["rope_theta"]] * full["num_hidden_layers"]
    full |= spec.derive(full)
    full["biases"] = spec.biases
    if "attention_bias" in spec.defaults:
        full["biases"] = QKV * full["attention_bias"] + ("o",) * full[spec.out_bias]
    if not spec.mixers:
        full["layer_types"] = _layer_types(spec, full)
    if "sliding_attention" not in full["layer_types"]:
        full["sliding_window"] = None  # also a leftover that the family does not read: its target might
    return spec, full


def open_dense(folder: Path) -> CheckpointReader:
    """A dense checkpoint whose tensors have the names of its family."""
    reader = CheckpointReader(folder)
    reader.tensors = dense_tensors(reader.tensors, reader.config, *dense_config(reader.config))
    return reader


def _layer_types(spec: DenseSpec, config: Mapping[str, Any]) -> list[str]:
    """`full_attention` or `sliding_attention` per layer, as transformers fills them in."""
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if spec.windows is Windows.NONE or window is None:
        return ["full_attention"] * layers
    given = config.get("layer_types")  # a Mistral with them is a Ministral, in whatever form it says so
    if spec.windows is Windows.ALL and given is None:
        return ["sliding_attention"] * layers
    if given is not None:
        if not isinstance(given, list) or len(given) != layers or not all(kind in LAYER_TYPES for kind in given):
            raise CheckpointError(
                f"config.json: layer_types is not a list of {layers} {' or '.join(LAYER_TYPES)} entries"
            )
        return given
    for key in ("sliding_window_pattern", "max_window_layers"):
        if key in spec.defaults and (type(config[key]) is not int or config[key] < 0):
            raise CheckpointError(f"config.json: {key} is {str(config[key])[:60]!r}, expected a whole number")
    if "sliding_window_pattern" in spec.defaults:
        pattern = max(1, config["sliding_window_pattern"])
        return [LAYER_TYPES[(i + 1) % pattern != 0] for i in range(layers)]
    return [LAYER_TYPES[i >= config["max_window_layers"]] for i in range(layers)]


def _is_size(value: float, key: str) -> bool:
    if key in ("initializer_range", "attention_dropout") and value == 0:
        return True
    return 0 < value < 2**63  # false for NaN, and exact for whole numbers of any length


def _rope(spec: DenseSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    theta = config["rope_theta"]
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # in transformers' order
    if not isinstance(rope, dict):
        raise CheckpointError(f"config.json: rope_parameters is {str(rope)[:60]!r}, expected an object")
    rope = dict(rope)
    kind = rope.pop("type", None)  # the name before `rope_type`
    rope = {"rope_theta": theta, "rope_type": kind or "default"} | rope
    # Three equal positions for each token of a text: as one.
    rope = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    if rope["rope_type"] == "mrope":
        rope["rope_type"] = "default"
    if rope["rope_type"] in ("su", "yarn") and "short_factor" in rope:  # what Phi-3 called it
        rope["rope_type"] = "longrope"
    if not spec.partial_rotary:  # the family does not read it; its target might
        rope.pop("partial_rotary_factor", None)
    moved = ("original_max_position_embeddings",) * (rope["rope_type"] == "longrope")
    moved += ("partial_rotary_factor",) * spec.partial_rotary
    rope = {key: config[key] for key in moved if config.get(key) is not None} | rope
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in ROPE_NEEDS:
        raise CheckpointError(f"config.json: rope_type is {str(kind)[:60]!r}, expected one of {', '.join(ROPE_NEEDS)}")
    for key in ("rope_theta", *ROPE_NEEDS[kind]):
        value = rope.get(key)
        if type(value) not in (int, float) or not _is_size(value, key):  # type: ignore[arg-type]
            raise CheckpointError(f"config.json: position setting {key} is {str(value)[:60]!r}, not a number above 0")
    part = rope.get("partial_rotary_factor", 1)
    if type(part) not in (int, float) or not 0 < part <= 1:
        raise CheckpointError(f"config.json: partial_rotary_factor is {str(part)[:60]!r}, expected a fraction up to 1")
    return rope
