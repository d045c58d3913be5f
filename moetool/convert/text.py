"""config.json of a converted checkpoint: the source's own, or that of a multimodal model's text model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetool import registry
from moetool.arch.dense_config import dense_config
from moetool.arch.dense_families import DENSE
from moetool.arch.forms import is_wrapped, text_config
from moetool.errors import ConfigError

# Of a multimodal model only; and names of code, which is never carried over.
LEFT_OUT = ("auto_map", "vision_config", "text_config", "transformers_version")


def result_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the model that a checkpoint is converted to.

    Raises:
        ConfigError: it is quantised, or moetool does not know the family of its text model.
    """
    if config.get("quantization_config"):
        raise ConfigError("the source is quantised; convert the unquantised model that it was made from")
    if not is_wrapped(config):
        return {key: value for key, value in config.items() if key != "auto_map"}
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ARCHITECTURES

    text = {key: value for key, value in text_config(config).items() if key not in LEFT_OUT}
    model_type = str(text.get("model_type"))
    if model_type not in DENSE and model_type not in registry.names("target"):
        known = ", ".join(sorted({*DENSE, *registry.names("target")}))
        raise ConfigError(
            f"the text model in this {str(config.get('model_type'))[:60]} is a {model_type[:60]}; moetool knows {known}"
        )
    if model_type not in ARCHITECTURES:  # its class is a part of the multimodal one; it is another family on its own
        spec, dense = dense_config(config)
        model_type = spec.family
        text |= {key: dense[key] for key in spec.defaults}
        text |= {"rope_parameters": dense["rope_parameters"], "rope_scaling": None, "layer_types": dense["layer_types"]}
    return text | {"model_type": model_type, "architectures": [ARCHITECTURES[model_type]]}
