"""A target family as data, and how one is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moetool import registry
from moetool.errors import ConfigError
from moetool.recipe import UpcycleRecipe


@dataclass(frozen=True)
class ArchSpec:
    """How a family of Mixture-of-Experts models is named, shaped and configured on disk.

    Attributes:
        model_type: in config.json.
        architecture: the transformers class of the causal language model.
        dense: the dense families whose attention and norms line up with it.
        experts: projection (gate, up, down) -> tensor name with `{layer}` and `{expert}`.
        router: tensor name with `{layer}`.
        num_experts_key: the config key of the number of routed experts.
        top_k_key: the config key of the experts a token goes to.
        config_map: (filled dense config, recipe) -> config.json of the result; pure.
    """

    model_type: str
    architecture: str
    dense: tuple[str, ...]
    experts: Mapping[str, str]
    router: str
    num_experts_key: str
    top_k_key: str
    config_map: Callable[[Mapping[str, Any], UpcycleRecipe], dict[str, Any]]


# The keys that every decoder of these families shares.
SHARED_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
    "attention_dropout",
)  # fmt: skip


def shared_config(spec_type: str, architecture: str, dense: Mapping[str, Any]) -> dict[str, Any]:
    """The part of config.json that is carried over, in the form that old and new readers know.

    transformers 5 reads `rope_parameters` and `dtype`; older versions, vLLM and llama.cpp read
    `rope_theta`, `rope_scaling` and `torch_dtype`. `auto_map` (remote code) is never carried over.
    """
    config: dict[str, Any] = {"architectures": [architecture], "model_type": spec_type}
    config |= {key: dense[key] for key in SHARED_KEYS if key in dense}
    rope = dense["rope_parameters"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    config["rope_parameters"] = rope
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    return config


def choose(target: str, dense_type: str) -> ArchSpec:
    """The spec of a target name; `auto` is the first that lists the dense family.

    Raises:
        ConfigError: the target is unknown, or does not fit the dense family.
    """
    specs = {name: registry.load("target", name) for name in registry.names("target")}
    fitting = [name for name, spec in specs.items() if dense_type in spec.dense]
    if target == "auto":
        if not fitting:
            raise ConfigError(f"no target family fits a dense {dense_type}")
        return specs[fitting[0]]  # type: ignore[no-any-return]
    registry.check("target", target)
    if target not in fitting:
        raise ConfigError(
            f"--target {target} does not fit a dense {dense_type}; choose from {', '.join(fitting) or 'none'}"
        )
    return specs[target]  # type: ignore[no-any-return]


def detect(config: Mapping[str, Any]) -> ArchSpec | None:
    """The spec of a Mixture of Experts' config.json, None where moetool has none for it."""
    for name in registry.names("target"):
        spec: ArchSpec = registry.load("target", name)
        if spec.model_type == config.get("model_type"):
            return spec
    return None
