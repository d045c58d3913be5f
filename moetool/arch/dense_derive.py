"""The kinds of layers, derived from a filled dense config in the families with their own keys for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moetool.errors import CheckpointError


def every_fourth(config: Mapping[str, Any]) -> dict[str, Any]:
    """The layer types of a Qwen3.5 whose config.json has none: each `full_attention_interval`-th is full attention."""
    step = config["full_attention_interval"]
    kinds = [("linear" if (i + 1) % step else "full") + "_attention" for i in range(config["num_hidden_layers"])]
    return {"layer_types": _by_layer(config, "layer_types", kinds, ("full_attention", "linear_attention"))}


def granite_hybrid(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Granite 4 without routed experts, whose shared expert is its FFN."""
    names = {"mamba": "linear_attention", "attention": "full_attention"}
    limit = config.get("time_step_limit") or [0.0, math.inf]
    if isinstance(limit, list):  # how transformers writes what JSON has no word for
        limit = [math.inf if end == {"__float__": "Infinity"} else end for end in limit]
    if not isinstance(limit, list) or len(limit) != 2 or not all(type(end) in (int, float) for end in limit):
        raise CheckpointError(f"config.json: time_step_limit is {str(limit)[:60]!r}, expected two numbers")
    kinds = ["mamba"] * config["num_hidden_layers"]
    given = _by_layer(config, "layer_types", kinds, (*names, *names.values()))
    kinds = [names.get(kind, kind) for kind in given]
    return {"layer_types": kinds, "time_step_limit": limit, "intermediate_size": config["shared_intermediate_size"]}


def lfm2(config: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers have attention; and the size of the FFN, of which config.json may give three halves."""
    layers, units, attention = config["num_hidden_layers"], config["intermediate_size"], config.get("full_attn_idxs")
    if attention is not None and not isinstance(attention, list):
        raise CheckpointError(f"config.json: full_attn_idxs is {str(attention)[:60]!r}, expected a list of layers")
    kinds = ["full_attention" if attention is None or i in attention else "conv" for i in range(layers)]
    if config["block_auto_adjust_ff_dim"]:
        multiple = config["block_multiple_of"]
        units = -(-int(config["block_ffn_dim_multiplier"] * int(2 * units / 3)) // multiple) * multiple
    kinds = _by_layer(config, "layer_types", kinds, ("full_attention", "conv"))
    return {"layer_types": kinds, "intermediate_size": units, "hidden_act": "silu"}  # whatever hidden_act says


def fourths_full(config: Mapping[str, Any]) -> dict[str, Any]:
    """Windows in all but layers 0, 4, 8, ... where config.json says nothing."""
    kinds = ["sliding_attention" if i % 4 else "full_attention" for i in range(config["num_hidden_layers"])]
    return {"layer_types": config.get("layer_types") or kinds}


def granite_swa(config: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers have windows, and each one's rotary base: 0 where it has no positions."""
    layers = config["num_hidden_layers"]
    bases = config.get("layer_rope_theta") or config["rotary_bases"]
    if not isinstance(bases, list) or len(bases) != layers or not all(map(_is_base, bases)):
        raise CheckpointError(f"config.json: layer_rope_theta is not a list of {layers} numbers, each 0 or more")
    return {**fourths_full(config), "rotary_bases": bases}


def smollm3(config: Mapping[str, Any]) -> dict[str, Any]:
    """Layers have positions where `no_rope_layers` has 1, and else all but each `no_rope_layer_interval`-th."""
    step = config["no_rope_layer_interval"]
    usual = [int((i + 1) % step != 0) for i in range(config["num_hidden_layers"])]
    kinds = _by_layer(config, "no_rope_layers", usual, (0, 1))
    return {"rotary_bases": [base * kind for base, kind in zip(config["rotary_bases"], kinds, strict=True)]}


def _is_base(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 2**63  # type: ignore[operator]


def _by_layer(config: Mapping[str, Any], key: str, usual: list[Any], kinds: tuple[Any, ...]) -> list[Any]:
    """What config.json says of each layer, or what it means where it says nothing."""
    given = config.get(key) or usual
    if not isinstance(given, list) or len(given) != len(usual) or not all(kind in kinds for kind in given):
        raise CheckpointError(
            f"config.json: {key} is not a list of {len(usual)} {' or '.join(map(str, kinds))} entries"
        )
    return given
