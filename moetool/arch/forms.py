"""Sources in other forms: a text model inside a multimodal one, fused matrices, other prefixes of names.

A tensor's rows lie one after another on disk, so a part of a fused matrix is a tensor that begins
later in the same file: nothing is copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from moetool.arch.dense import EMBEDDING, LM_HEAD, DenseSpec, dims, shape
from moetool.checkpoint.header import TensorInfo
from moetool.errors import CheckpointError

# What text models inside multimodal ones are called, before "embed_tokens.weight"; "" where one was saved
# without its head.
PREFIXES = ("model.language_model.", "language_model.model.", "model.text_model.", "language_model.", "model.", "")
HEADS = (LM_HEAD, "language_model.lm_head.weight")
# Families whose published configurations have the text model's settings at the top.
FLAT = ("qwen2_vl", "qwen2_5_vl")
# What transformers assumes of a text model whose sizes are left out, as the first LLaVAs do.
LEFT_OUT = {
    family: {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"intermediate_size": units}
    for family, units in (("llama", 11008), ("mistral", 14336))
}
FROM_OUTSIDE = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the text model inside a multimodal one; any other as it is.

    Args:
        config: config.json.
    """
    inner = config.get("text_config")
    if isinstance(inner, dict):
        outside = {key: config[key] for key in FROM_OUTSIDE if config.get(key) is not None and key not in inner}
        # Where neither says it, what decides is whether there is a head.
        said = [where["tie_word_embeddings"] for where in (config, inner) if "tie_word_embeddings" in where]
        tied = any(said) or not said
        return {**LEFT_OUT.get(str(inner.get("model_type")), {}), **inner, **outside, "tie_word_embeddings": tied}
    if config.get("model_type") in FLAT:
        return {**config, "model_type": f"{config['model_type']}_text"}
    return config


def is_wrapped(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a multimodal model's, whose text model alone is read."""
    return isinstance(config.get("text_config"), dict) or config.get("model_type") in FLAT


def text_names(tensors: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Names of tensors -> those of a language model on its own (`model.layers.0...`).

    Args:
        tensors: the names in a checkpoint.
        config: config.json. Of a multimodal model only what belongs to the text model is in the result.
    """
    tensors = list(tensors)
    embedding = EMBEDDING.removeprefix("model.")
    prefix = next((prefix for prefix in PREFIXES if prefix + embedding in tensors), "model.")
    wrapped, found = is_wrapped(config), {}
    for name in tensors:
        if name in HEADS:
            found[name] = LM_HEAD
        elif name.startswith(prefix) and not (wrapped and name.startswith("model.visual.")):
            found[name] = "model." + name.removeprefix(prefix)
        elif not wrapped:
            found[name] = name
    return found


def family_names(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint under the names of a language model on its own (see `text_names`)."""
    return {usual: tensors[name] for name, usual in text_names(tensors, config).items()}


def dense_tensors(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], spec: DenseSpec, dense: Mapping[str, Any]
) -> dict[str, TensorInfo]:
    """The tensors of a dense source under the names of its family, parts of fused ones apart.

    Args:
        tensors: of the checkpoint.
        config: config.json.
        spec: the dense family.
        dense: the filled dense config.

    Returns:
        Name -> where it lies.

    Raises:
        CheckpointError: a fused tensor does not have as many rows as its parts.
    """
    parts: dict[str, TensorInfo] = {}
    sizes = dims(dense)
    for name, info in family_names(tensors, config).items():
        found = _IN_LAYER.match(name)
        layer, inner = found.groups() if found else ("", name)
        rows = {f"{layer}.{part}": shape(spec.shapes[part], sizes)[0] for part in spec.fused.get(inner, ())}
        parts |= _parts(name, info, rows) if rows else {name: info}
    return parts


_IN_LAYER = re.compile(r"(model\.layers\.\d+)\.(.+)")


def _parts(name: str, info: TensorInfo, rows: Mapping[str, int]) -> dict[str, TensorInfo]:
    total = sum(rows.values())
    if len(info.shape) != 2 or info.shape[0] != total:
        raise CheckpointError(f"tensor {name} has shape {list(info.shape)}, config.json says {total} rows")
    parts, start = {}, info.start
    for part, count in rows.items():
        size = count * (info.size // total)
        parts[part] = TensorInfo(part, info.dtype, (count, info.shape[1]), info.shard, start, size)
        start += size
    return parts
