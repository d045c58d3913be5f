"""A dense family's config.json: what it may omit, and what it may say that makes no sense."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from moetool.arch.dense import Windows, dims, layer_tensors, shape
from moetool.arch.dense_config import dense_config
from moetool.arch.dense_families import DENSE
from moetool.arch.spec import candidates
from moetool.errors import MoetoolError

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
}
# Set above, read from elsewhere, or compared below in the form in which transformers has it.
ELSEWHERE = {"model_type", "intermediate_size", "num_local_experts", "layer_types", "rope_parameters", "sliding_window"}


def theirs(family: str) -> Any:
    """The configuration that transformers fills in."""
    outer = family.removesuffix("_text")
    if family not in CONFIG_MAPPING:
        return type(CONFIG_MAPPING[outer]().text_config)(**SIZES)
    return CONFIG_MAPPING[family](**SIZES)


@pytest.mark.parametrize("family", DENSE)
def test_what_a_config_omits_is_what_transformers_fills_in(family: str) -> None:
    config = theirs(family)
    _, ours = dense_config({**SIZES, "model_type": family})
    filled = {key: value for key, value in config.to_dict().items() if key in ours and key not in ELSEWHERE}
    if "use_sliding_window" in filled:
        filled["use_sliding_window"] = bool(filled["use_sliding_window"])
    filled["head_dim"] = getattr(config, "head_dim", None) or 16
    assert {key: ours[key] for key in filled} == filled
    rope = config.rope_parameters or ours["rope_parameters"]
    for key in ("rope_theta", "partial_rotary_factor"):
        assert ours["rope_parameters"].get(key, 1.0) == rope.get(key, 1.0)
    if DENSE[family].windows is Windows.BY_LAYER and hasattr(config, "layer_types"):
        assert ours["layer_types"] == config.layer_types


NONSENSE: list[Any] = [None, 0, -1, 1.5, "x", [], {}, [{}], [[1]], [1, 2], ["a", "b"], True, math.nan, 10**30, {"a": 1}]
KEYS = (
    "layer_types", "full_attn_idxs", "no_rope_layers", "no_rope_layer_interval", "layer_rope_theta", "rope_parameters",
    "rope_scaling", "rope_theta", "num_hidden_layers", "block_ff_dim", "norm_eps", "tie_embedding", "conv_L_cache",
    "block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim", "full_attention_interval",
    "shared_intermediate_size", "mamba_n_heads", "text_config", "partial_rotary_factor", "sliding_window", "head_dim",
    "original_max_position_embeddings", "max_position_embeddings", "quantization_config", "model_type", "hidden_act",
)  # fmt: skip


@pytest.mark.parametrize("family", DENSE)
def test_nonsense_is_taken_or_refused_and_never_a_bug(family: str) -> None:
    for key in KEYS:
        for value in NONSENSE:
            with suppress(MoetoolError):
                spec, config = dense_config({**SIZES, "num_hidden_layers": 2, "model_type": family, key: value})
                for layer in range(2):
                    assert [shape(letters, dims(config)) for letters in layer_tensors(spec, config, layer).values()]
                candidates("auto", config)
