"""Whether a checkpoint holds every tensor of its model: transformers fills others with random numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from moetool.arch.moe_source import experts_and_top_k
from moetool.arch.spec import ArchSpec, detect
from moetool.checkpoint.model import check_config, without_weights
from moetool.checkpoint.shard import TensorLayout
from moetool.errors import CheckpointError

_EXPERT = re.compile(r"(.*\.experts\.)(\d{1,6})(\..+)")


def check_whole(config: Mapping[str, Any], tensors: Iterable[TensorLayout], folder: Path) -> None:
    """Refuse a checkpoint that lacks tensors. Of a family that transformers does not know, only experts are checked.

    Args:
        config: config.json.
        tensors: of the checkpoint.
        folder: that they come from.

    Raises:
        CheckpointError: names the first that is missing.
    """
    if config.get("quantization_config"):
        return  # tensors have other names
    shapes = {layout.name: layout for layout in tensors}
    missing = _experts_missing(shapes, config, detect(config)) or _model_missing(shapes, config, folder)
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{folder} lacks {missing[0][:100]}{more}, which transformers would fill with random numbers; fetch it"
            " again, or give the model that it was made from"
        )


def _experts_missing(names: Iterable[str], config: Mapping[str, Any], spec: ArchSpec | None) -> list[str]:
    """Tensors of single experts that a layer lacks, but has of other experts."""
    groups: dict[str, dict[str, set[int]]] = {}  # layer -> what an expert has -> the experts that have it
    for name in names:
        if found := _EXPERT.fullmatch(name):
            groups.setdefault(found[1], {}).setdefault(found[3], set()).add(int(found[2]))
    # In a family that moetool does not know, each layer and each matrix may have another number: only a gap tells.
    known = experts_and_top_k(config) if spec else None
    missing: list[tuple[str, int, str]] = []
    for layer, group in groups.items():
        there = set().union(*group.values())
        few = 10 * len(there) + 10  # config.json and names may speak of any number
        for rest, having in group.items():
            expected = range(min(known[0] if known else max(having) + 1, few))
            missing += [(layer, expert, rest) for expert in expected if expert not in having]
    return [f"{layer}{expert}{rest}" for layer, expert, rest in sorted(missing)]


def _model_missing(tensors: Mapping[str, TensorLayout], config: Mapping[str, Any], folder: Path) -> list[str]:
    """What transformers finds missing, under the names of a published checkpoint."""
    try:
        check_config(folder)
    except CheckpointError:  # no other command gives it to transformers
        return []
    found = (_missing_of(model, tensors) for model in without_weights(config, len(tensors)))
    return min(found, key=len, default=[])


def _missing_of(model: Any, tensors: Mapping[str, TensorLayout]) -> list[str]:
    """The same of one model, which is on torch's meta device and stays there."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
    from transformers.modeling_utils import LoadStateDictConfig

    empty = {name: torch.empty(layout.shape, device="meta") for name, layout in tensors.items()}
    settings = LoadStateDictConfig(
        device_map={"": "meta"}, dtype=model.dtype, weight_mapping=get_model_conversion_mapping(model)
    )
    try:
        info, _ = convert_and_load_state_dict_in_model(model, empty, settings)
        model._finalize_model_loading(model, settings, info)
    except Exception:  # it does not load: an error, but not random numbers
        return []
    state = {name: tensor for name, tensor in model.state_dict().items() if name in info.missing_keys}
    try:
        named: Iterable[str] = revert_weight_conversion(model, state)
    except Exception:  # one of several tensors that are one on disk
        named = state
    return sorted(named) or sorted(info.missing_keys)
