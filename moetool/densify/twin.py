"""The dense family of a Mixture of Experts, and its config.json: the pairs of `arch/` reversed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool.arch.dense_families import DENSE
from moetool.arch.spec import SHARED_KEYS, ArchSpec
from moetool.errors import ConfigError

# Keys that dense families read beside those whose defaults `arch/dense_families.py` knows.
_ALSO = {
    "rope_parameters", "rope_theta", "rope_scaling", "layer_types", "sliding_window", "dtype", "torch_dtype",
    "eod_token_id",
}  # fmt: skip
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "olmo2": "Olmo2ForCausalLM", "granite": "GraniteForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM", "cohere2": "Cohere2ForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM", "qwen3_5_text": "Qwen3_5ForCausalLM",
}  # fmt: skip


def twin(config: Mapping[str, Any], spec: ArchSpec) -> str:
    """The dense family with a model's attention and norms.

    Raises:
        ConfigError: there is none that its layers fit.
    """
    family = spec.model_type
    if family == "mixtral":
        return "mistral" if config.get("sliding_window") else "llama"
    if family == "glm4_moe":
        found = "qwen3" if config.get("use_qk_norm") else "qwen2" if config.get("attention_bias") else "llama"
        rope = config.get("rope_parameters")
        half = rope.get("partial_rotary_factor", 0.5) if isinstance(rope, dict) else 0.5  # GLM's own default
        if config.get("partial_rotary_factor", half) == 1:
            return found
    elif family == "granitemoehybrid":
        if "mamba" not in (config.get("layer_types") or ()):
            return "granite"
    elif family == "solar_open":
        if not config.get("attention_bias"):
            return "llama"
    elif spec.dense[0] in _ARCHITECTURES:
        return spec.dense[0]
    raise ConfigError(f"this {family} has no dense family with its attention, so it cannot be densified")


def dense_config_of(config: Mapping[str, Any], family: str, units: int) -> dict[str, Any]:
    """config.json of the dense model.

    Args:
        config: of the Mixture of Experts.
        family: of the result.
        units: of its FFN.
    """
    known = {*DENSE[family].defaults, *SHARED_KEYS, *_ALSO}
    found = {key: value for key, value in config.items() if key in known}
    if isinstance(found.get("rope_parameters"), dict) and not DENSE[family].partial_rotary:
        rope = found["rope_parameters"]
        found["rope_parameters"] = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    return found | {"model_type": family, "architectures": [_ARCHITECTURES[family]], "intermediate_size": units}
