"""A Mixture of Experts as a source: where a checkpoint holds its routers and the matrices of its experts.

A checkpoint has either the names under which its family is published, or those of transformers 5's modules, as
`save_pretrained(save_original_format=False)` and mergekit write them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from moetool.arch.forms import family_names
from moetool.arch.spec import ArchSpec, detect
from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.reader import CheckpointReader
from moetool.errors import CheckpointError
from moetool.recipe import PROJECTIONS

# Under which published checkpoints have the numbers of experts, and of those that a token goes to.
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k")
_LAYER = re.compile(r"^model\.layers\.(\d{1,6})\.")


@dataclass(frozen=True)
class MoESource:
    """The sparse layers of a checkpoint. A matrix that is part of a tensor begins later in its file.

    Attributes:
        reader: of the checkpoint.
        spec: the family, with the names that the checkpoint has.
        tensors: of the checkpoint, under those names.
        layers: those with a router and experts, ascending; none where the experts have other names or are packed.
        num_experts: routed experts per layer.
        top_k: routed experts per token.
    """

    reader: CheckpointReader
    spec: ArchSpec
    tensors: Mapping[str, TensorInfo]
    layers: tuple[int, ...]
    num_experts: int
    top_k: int

    def router(self, layer: int) -> TensorInfo:
        """(num_experts, hidden_size)."""
        return self.tensors[self.spec.router.format(layer=layer)]

    def selection_bias(self, layer: int) -> TensorInfo | None:
        """(num_experts,) or (1, num_experts); None where there is none."""
        name = self.spec.selection_bias
        return self.tensors.get(name.format(layer=layer)) if name else None

    def expert(self, layer: int, expert: int, projection: str) -> TensorInfo:
        """A matrix of a routed expert: (units, hidden_size), of `down` (hidden_size, units).

        Raises:
            CheckpointError: it is not there, or its tensor does not have the expected number of dimensions or experts.
        """
        names = self.spec.experts
        info = self.tensors.get(names[projection].format(layer=layer, expert=expert))
        first = (self.num_experts,) if self.spec.fused else ()
        if info is None or len(info.shape) != len(first) + 2 or info.shape[: len(first)] != first:
            name = names[projection].format(layer=layer, expert=expert).partition(".layers.")[2]
            raise CheckpointError(f"layer {layer}: the files do not hold {name} as plain weights of one shape")
        return expert_part(info, names, projection, *((expert, self.num_experts) if self.spec.fused else (0, 1)))

    def shared(self, layer: int, projection: str) -> TensorInfo | None:
        """The same of the shared expert; None where there is none."""
        names = self.spec.shared.tensors if self.spec.shared else {}
        info = self.tensors.get(names[projection].format(layer=layer)) if names else None
        return expert_part(info, names, projection) if info and len(info.shape) == 2 else None

    @property
    def num_routed(self) -> int:
        """Elements of the routed experts of all layers."""
        experts, templates = range(1 if self.spec.fused else self.num_experts), set(self.spec.experts.values())
        named = ((t.format(layer=layer, expert=e) for e in experts) for layer in self.layers for t in templates)
        # Up to the first that is missing: config.json may speak of any number of experts.
        return sum(self.tensors[name].num_elements for names in named for name in takewhile(self.tensors.get, names))


def moe_source(reader: CheckpointReader) -> MoESource | None:
    """The sparse layers of a checkpoint; None where moetool has no spec of its family.

    Raises:
        CheckpointError: config.json does not say how many experts there are, and how many a token goes to.
    """
    spec = detect(reader.config)
    if spec is None:
        return None
    tensors = family_names(reader.tensors, reader.config)
    keys = spec.num_experts_key, spec.top_k_key
    num_experts, top_k = (config_number(reader.config, spec, key, reader.folder) for key in keys)
    for named in (spec, spec.in_memory):
        if layers := tuple(layer for layer in layers_of(tensors) if _is_sparse(tensors, named, layer)):
            return MoESource(reader, named, tensors, layers, num_experts, top_k)
    return MoESource(reader, spec, tensors, (), num_experts, top_k)


def _is_sparse(tensors: Mapping[str, TensorInfo], spec: ArchSpec, layer: int) -> bool:
    gate = tensors.get(spec.experts["gate"].format(layer=layer, expert=0))
    return spec.router.format(layer=layer) in tensors and gate is not None and len(gate.shape) == 2 + spec.fused


def layers_of(names: Iterable[str]) -> list[int]:
    """The layers that tensors belong to, ascending."""
    return sorted({int(found[1]) for name in names if (found := _LAYER.match(name))})


def expert_part(
    info: TensorInfo, names: Mapping[str, str], projection: str, expert: int = 0, experts: int = 1
) -> TensorInfo:
    """The matrix of an expert in a tensor that may hold several experts, and several projections of each."""
    together = [other for other in PROJECTIONS if names[other] == names[projection]]
    parts = experts * len(together)
    rows, size = math.prod(info.shape[:-1]) // parts, info.size // parts
    start = info.start + (expert * len(together) + together.index(projection)) * size
    return replace(info, shape=(rows, info.shape[-1]), start=start, size=size)


def config_number(config: Mapping[str, Any], spec: ArchSpec, key: str, folder: Path) -> int:
    """A number of a family's config.json, under any of the names that published checkpoints have for it.

    Raises:
        CheckpointError: it is not there, is not a positive whole number, or is not the same in all layers.
    """
    names = [key, *(other for other, ours in spec.keys.items() if ours == key)]
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]  # once per layer, all alike
    if type(value) is not int or not 0 < value < 2**31:
        raise CheckpointError(f"{folder}/config.json: {key} is {str(value)[:60]!r}, expected a positive whole number")
    return value


def experts_and_top_k(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Experts and top-k of a config.json of any family; None where it does not say them under a known name."""
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    found = []
    for names in (NUM_EXPERTS, TOP_K):
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # once per layer, all alike
        found.append(value)
    experts, top_k = found
    return (experts, top_k) if type(experts) is type(top_k) is int and 0 < top_k <= experts < 2**31 else None
