"""What would be written: every tensor, its source, its place on disk. Checks everything, writes nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moetool.arch.dense import EMBEDDING, FFN, LM_HEAD, DenseSpec, dense_config, dims, shape
from moetool.arch.spec import ArchSpec, choose
from moetool.checkpoint.reader import CheckpointReader, TensorInfo
from moetool.checkpoint.writer import COMPANIONS, Shard, TensorLayout, layout_shards
from moetool.errors import CheckpointError, ConfigError
from moetool.recipe import PROJECTIONS, UpcycleRecipe

# Tensors are read, drawn and written in blocks of whole rows of about this many elements. It is part
# of the format: each block of redrawn values has its own random stream.
BLOCK_ELEMENTS = 1 << 20

FLOAT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
MAX_ROUTER_STD = 1000
# Left behind by old exporters; models compute it.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Fill:
    """One source tensor and the tensors that it fills.

    Attributes:
        source: in the dense checkpoint; None for a router, which is drawn.
        targets: names, by expert where `projection` is set; else one name.
        dtype: of the targets.
        shape: of each target.
        layer: of a router or an FFN matrix.
        projection: gate, up or down for an FFN matrix, else None.
    """

    source: TensorInfo | None
    targets: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    layer: int | None = None
    projection: str | None = None

    @property
    def row_length(self) -> int:
        """Elements in a row; a vector counts as rows of one."""
        size = 1
        for n in self.shape[1:]:
            size *= n
        return size

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """First and one-past-last row of each block."""
        rows = self.shape[0] if self.shape else 1
        step = max(1, BLOCK_ELEMENTS // max(1, self.row_length))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)] if self.row_length else []


@dataclass(frozen=True)
class Plan:
    """Everything that `run_plan` and `verify` need; see `build_plan`."""

    recipe: UpcycleRecipe
    spec: ArchSpec
    dense: Mapping[str, Any]
    config: Mapping[str, Any]
    fills: tuple[Fill, ...]
    shards: tuple[Shard, ...]
    companions: tuple[str, ...]
    fingerprint: str
    max_shard_size: int

    @property
    def num_layers(self) -> int:
        """Decoder layers, all of them MoE."""
        return int(self.dense["num_hidden_layers"])

    @property
    def intermediate_size(self) -> int:
        """Units of one expert."""
        return int(self.dense["intermediate_size"])

    @property
    def num_redrawn(self) -> int:
        """Units redrawn in each expert (each matrix of it, with per-matrix indices)."""
        return self.recipe.num_redrawn(self.intermediate_size)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Dense, total and active parameters (active: without the experts a token does not go to)."""

        def count(fill: Fill) -> int:
            return fill.row_length * (fill.shape[0] if fill.shape else 1)

        total = sum(count(fill) * len(fill.targets) for fill in self.fills)
        expert = sum(count(fill) for fill in self.fills if fill.projection)
        return {
            "dense": sum(count(fill) for fill in self.fills if fill.source),
            "total": total,
            "active": total - expert * (self.recipe.num_experts - self.recipe.top_k),
        }

    @cached_property
    def written(self) -> dict[str, TensorInfo]:
        """Where each tensor lies in the result."""
        places = {tensor: shard for shard in self.shards for tensor in shard.starts}
        return {
            target: TensorInfo(
                target, fill.dtype, fill.shape, places[target].name, places[target].starts[target],
                TensorLayout(target, fill.dtype, fill.shape).size,
            )
            for fill in self.fills
            for target in fill.targets
        }  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: the recipe, the source and the layout on disk."""
        return {
            "recipe": self.recipe.to_json(),
            "source_fingerprint": self.fingerprint,
            "shards": {shard.name: shard.size for shard in self.shards},
        }


def natural(name: str) -> list[Any]:
    """A sort key that puts layer 2 before layer 10, and the tensors outside layers around them."""
    place = 0 if name.startswith("model.embed") else 1 if ".layers." in name else 2
    return [place, *(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))]


def build_plan(reader: CheckpointReader, recipe: UpcycleRecipe, max_shard_size: int) -> Plan:
    """Check a source and a recipe against each other and lay out the result.

    Args:
        reader: the dense checkpoint.
        recipe: `target` may be `auto`; the plan's recipe names the family.
        max_shard_size: bytes of tensor data a file.

    Raises:
        ConfigError: the family cannot be served, or the recipe contradicts itself or the source.
        CheckpointError: a tensor is missing, unknown, of another shape than config.json says, or
            holds no plain floating-point numbers.
    """
    dense_spec, dense = dense_config(reader.config)
    spec = choose(recipe.target, dense_spec.model_type)
    recipe = replace(recipe, target=spec.model_type)
    _check_recipe(recipe)
    sources = _check_tensors(reader, dense_spec, dense)
    fills = _fills(sources, spec, recipe, dense)
    config = dict(spec.config_map(dense, recipe))
    if LM_HEAD in sources:
        config["tie_word_embeddings"] = False
    dtypes = {fill.dtype for fill in fills if fill.source}
    if len(dtypes) == 1:
        config["dtype"] = config["torch_dtype"] = FLOAT_DTYPES[dtypes.pop()]
    layouts = [TensorLayout(target, fill.dtype, fill.shape) for fill in fills for target in fill.targets]
    return Plan(
        recipe=recipe,
        spec=spec,
        dense=dense,
        config=config,
        fills=tuple(fills),
        shards=tuple(layout_shards(layouts, max_shard_size)),
        companions=tuple(name for name in COMPANIONS if (reader.folder / name).is_file()),
        fingerprint=reader.fingerprint(),
        max_shard_size=max_shard_size,
    )


def _check_recipe(recipe: UpcycleRecipe) -> None:
    if not 0 <= recipe.drop_ratio <= 1:
        raise ConfigError(f"drop ratio {recipe.drop_ratio} is not between 0 and 1")
    if not 0 <= recipe.router_std <= MAX_ROUTER_STD:  # far above any use; fp16 ends at 65504
        raise ConfigError(f"router std {recipe.router_std} is not between 0 and {MAX_ROUTER_STD}")
    if recipe.num_experts < 2:
        raise ConfigError(f"{recipe.num_experts} experts: a Mixture of Experts has at least 2")
    if not 1 <= recipe.top_k <= recipe.num_experts:
        raise ConfigError(f"top-k {recipe.top_k} is not between 1 and the number of experts, {recipe.num_experts}")


def _check_tensors(reader: CheckpointReader, dense_spec: DenseSpec, dense: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Hold every tensor of the source against the family and config.json; return those to carry over."""
    if dense["num_hidden_layers"] > len(reader.tensors):  # before names are made of a number that may be anything
        raise CheckpointError(
            f"{reader.folder}: config.json says {dense['num_hidden_layers']} layers, there are only"
            f" {len(reader.tensors)} tensors; some are missing: fetch the checkpoint again"
        )
    sizes = dims(dense)
    expected = {EMBEDDING: "V D", "model.norm.weight": "D", LM_HEAD: "V D"}
    for layer in range(dense["num_hidden_layers"]):
        expected |= {
            f"model.layers.{layer}.{name}": letters for name, letters in (*dense_spec.layer.items(), *FFN.items())
        }
    found = {name: info for name, info in reader.tensors.items() if not IGNORED.search(name)}
    for name, info in found.items():
        if name not in expected:
            raise CheckpointError(f"{reader.folder}: tensor {name[:100]} has no place in a {dense_spec.model_type}")
        if info.shape != shape(expected[name], sizes):
            raise CheckpointError(
                f"{reader.folder}: tensor {name} has shape {list(info.shape)},"
                f" config.json says {list(shape(expected[name], sizes))}"
            )
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{reader.folder}: tensor {name} has dtype {info.dtype}; only {', '.join(FLOAT_DTYPES)} can be upcycled"
            )
    missing = [name for name in expected if name not in found and name != LM_HEAD]
    if LM_HEAD not in found and not dense["tie_word_embeddings"]:
        missing.append(LM_HEAD)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{reader.folder}: tensor {missing[0]}{more} is missing; fetch the checkpoint again")
    # A head saved beside tied embeddings is dropped only if it is the same tensor; transformers
    # unties them when it is not, and so do we.
    if LM_HEAD in found and dense["tie_word_embeddings"] and _equal(reader, found[LM_HEAD], found[EMBEDDING]):
        del found[LM_HEAD]
    return dict(sorted(found.items(), key=lambda item: natural(item[0])))


def _equal(reader: CheckpointReader, a: TensorInfo, b: TensorInfo) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = 1 << 20
    for offset in range(0, a.size, step):
        length = min(step, a.size - offset)
        blocks = []
        for info in (a, b):
            buffer = bytearray(length)
            reader.read_into(info, offset, memoryview(buffer))
            blocks.append(buffer)
        if blocks[0] != blocks[1]:
            return False
    return True


_FFN_NAME = re.compile(r"^model\.layers\.(\d+)\.(mlp\.\w+\.weight)$")


def _fills(
    sources: Mapping[str, TensorInfo], spec: ArchSpec, recipe: UpcycleRecipe, dense: Mapping[str, Any]
) -> list[Fill]:
    fills = []
    for name, info in sources.items():
        dtype = info.dtype if recipe.dtype == "auto" else recipe.dtype
        match = _FFN_NAME.match(name)
        if not match:
            fills.append(Fill(info, (name,), dtype, info.shape))
            continue
        layer, projection = int(match[1]), PROJECTIONS[list(FFN).index(match[2])]
        if projection == "down":  # the first of the three in natural order: the router goes before the experts
            router = spec.router.format(layer=layer)
            fills.append(Fill(None, (router,), dtype, (recipe.num_experts, dense["hidden_size"]), layer))
        targets = (spec.experts[projection].format(layer=layer, expert=e) for e in range(recipe.num_experts))
        fills.append(Fill(info, tuple(targets), dtype, info.shape, layer, projection))
    return fills


def free_disk(folder: Path) -> int:
    """Free bytes where a folder is or would be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
