"""What would be written: every tensor, its source, its place on disk. Checks everything, writes nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moetool.arch.dense import EMBEDDING, LM_HEAD
from moetool.arch.dense_config import dense_config
from moetool.arch.spec import ArchSpec, routed_factor, scales
from moetool.checkpoint.folder import beside
from moetool.checkpoint.reader import CheckpointReader, TensorInfo
from moetool.checkpoint.writer import COMPANIONS, Shard, TensorLayout, layout_shards
from moetool.errors import CheckpointError, ConfigError
from moetool.recipe import UpcycleRecipe
from moetool.upcycle.check import FLOAT_DTYPES, check_donor, check_tensors
from moetool.upcycle.layout import BLOCK_ELEMENTS, Fill, lay_out
from moetool.upcycle.target import settle


@dataclass(frozen=True)
class Plan:
    """Everything that `run_plan` and `verify` need; see `build_plan`.

    Attributes:
        recipe: with the family's name for `auto`, and a number of shared experts.
        spec: the family to write.
        dense: the filled dense config.
        config: config.json of the result.
        moe_layers: layers with experts, ascending.
        fills: what is written, in the order of the disk.
        tensors: the tensors of the result, in that order.
        shards: the files that they lie in.
        companions: files beside the weights that are carried over.
        fingerprint: of the sources.
        max_shard_size: bytes of tensor data a file.
        num_dense_parameters: of DENSE.
        clients: client -> why it does not compute the result as transformers 5 does, None where it does.
    """

    recipe: UpcycleRecipe
    spec: ArchSpec
    dense: Mapping[str, Any]
    config: Mapping[str, Any]
    moe_layers: tuple[int, ...]
    fills: tuple[Fill, ...]
    tensors: tuple[TensorLayout, ...]
    shards: tuple[Shard, ...]
    companions: tuple[str, ...]
    fingerprint: str
    max_shard_size: int
    num_dense_parameters: int
    clients: Mapping[str, str | None]

    @property
    def intermediate_size(self) -> int:
        """Units of the dense FFN."""
        return int(self.dense["intermediate_size"])

    @property
    def num_units(self) -> int:
        """Units of one expert."""
        return self.intermediate_size // self.recipe.granularity

    @property
    def num_redrawn(self) -> int:
        """Units changed in each expert (each matrix of it, with per-matrix indices)."""
        return self.recipe.num_redrawn(self.num_units)

    def donor(self, expert: int) -> int:
        """The dense model that an expert comes from."""
        return self.recipe.donor(expert)

    def first_unit(self, expert: int) -> int:
        """The unit of the dense FFN that is an expert's first; the shared expert's is 0."""
        return self.recipe.first_unit(expert, self.num_units)

    @cached_property
    def draws_per_matrix(self) -> int:
        """Random streams set aside for each matrix of an expert: the blocks of the one that has most."""
        return max(len(fill.blocks) for fill in self.fills if len(fill.places) > 1)

    def factor(self, fill: Fill) -> float:
        """What the source is multiplied with in a fill; only down-projections carry one.

        The FFN is linear in down (and in up), not in gate: SiLU is not homogeneous.
        """
        if fill.projection != "down":
            return 1.0
        return scales(self.recipe, self.spec)[1] if fill.kind == "shared" else routed_factor(self.recipe, self.spec)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Dense, total and active parameters (active: without the experts a token does not go to)."""
        total = sum(fill.num_elements * len(fill.places) for fill in self.fills)
        return {"dense": self.num_dense_parameters, "total": total, "active": total - self._idle}

    @property
    def _idle(self) -> int:
        experts = sum(fill.num_elements for fill in self.fills if len(fill.places) > 1)
        return experts * (self.recipe.num_experts - self.recipe.top_k)

    @property
    def flops_per_token(self) -> dict[str, int]:
        """Of a forward, 2 for each weight that a token is multiplied with, of the dense model and of this.

        Attention's products of queries, keys and values are left out: they are the same in both.
        """
        head = self.dense["vocab_size"] * self.dense["hidden_size"]
        ffn = 3 * self.intermediate_size * self.dense["hidden_size"]
        carried = sum(
            fill.num_elements
            for fill in self.fills
            if len(fill.shape) == 2 and fill.layer is None and fill.places[0].tensor not in (EMBEDDING, LM_HEAD)
        )
        moe = sum(fill.num_elements * len(fill.places) for fill in self.fills if fill.layer is not None)
        return {
            "dense": 2 * (carried + len(self.moe_layers) * ffn + head),
            "moe": 2 * (carried + moe - self._idle + head),
        }

    def peak_memory(self, workers: int) -> int:
        """Resident bytes that writing takes, about.

        The interpreter with torch; a few blocks a worker: what is read, its fp32 and fp64 forms while it
        is summed, what is drawn; sums of FFN units, and a digest of each block: 1 % of the model, or less.
        """
        blocks = sum(len(fill.blocks) * len(fill.places) for fill in self.fills)
        sums = 2 * 8 * 3 * self.intermediate_size * len(self.moe_layers) * self.recipe.num_donors
        return 270_000_000 + workers * 160 * BLOCK_ELEMENTS + 300 * blocks + sums * bool(self.num_redrawn)

    @property
    def common_share(self) -> float:
        """Expected share of units that two experts have in common, unchanged in all three matrices.

        (1 - |S| / F)^2 for shared index sets; each of three independent sets must miss a unit in both
        experts with per-matrix ones. It holds for experts of the same part of the same donor's FFN.
        """
        if self.recipe.method == "scratch":
            return 0.0
        kept = 1 - self.num_redrawn / self.num_units
        return kept ** (6 if self.recipe.drop_index == "per-matrix" else 2)

    @cached_property
    def written(self) -> dict[str, TensorInfo]:
        """Where each tensor lies in the result."""
        layouts = {layout.name: layout for layout in self.tensors}
        return {
            name: TensorInfo(name, layouts[name].dtype, layouts[name].shape, shard.name, start, layouts[name].size)
            for shard in self.shards
            for name, start in shard.starts.items()
        }

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: the recipe, the source and the layout on disk."""
        return {
            "recipe": self.recipe.to_json(),
            "source_fingerprint": self.fingerprint,
            "shards": {shard.name: shard.size for shard in self.shards},
        }


def fingerprint(readers: Sequence[CheckpointReader]) -> str:
    """A quick identity of the sources as they are on disk now."""
    return hashlib.sha256("".join(reader.fingerprint() for reader in readers).encode()).hexdigest()


def build_plan(
    readers: Sequence[CheckpointReader], recipe: UpcycleRecipe, max_shard_size: int, clients: Sequence[str] = ()
) -> Plan:
    """Check sources and a recipe against each other and lay out the result.

    Args:
        readers: the dense checkpoint, and the other donors.
        recipe: `target` may be `auto`, `shared_experts` None; the plan's recipe has the family's.
        max_shard_size: bytes of tensor data a file.
        clients: programs in which the result must run, names in `arch/clients.py`.

    Raises:
        ConfigError: the family cannot be served, the recipe contradicts itself or the source, or the result
            would not run in a client.
        CheckpointError: a tensor is missing, unknown, of another shape than config.json says, or
            holds no plain floating-point numbers.
    """
    dense_spec, dense = dense_config(readers[0].config)
    near = beside(readers[0].folder)
    settled = settle(recipe, dense, clients, near)  # before any tensor is looked at
    sources = [check_tensors(readers[0], dense_spec, dense)]
    if dense["tie_word_embeddings"] and LM_HEAD in sources[0]:  # it has a head of its own, whatever it says
        settled = settle(recipe, dense | {"tie_word_embeddings": False}, clients, near)
    recipe, spec, moe, config = settled.recipe, settled.spec, settled.moe, settled.config
    for key, value in config.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise CheckpointError(f"config.json: {key} is {str(value)[:60]}; JSON has no NaN and no infinity") from None
    for reader in readers[1:]:
        other_spec, other = dense_config(reader.config)
        if other_spec is not dense_spec:
            raise ConfigError(f"--donor {reader.folder} is a {other_spec.model_type}, not a {dense_spec.model_type}")
        configs = [{k: v for k, v in c.items() if not k.endswith("token_id")} for c in (dense, other)]
        # Rotary settings are in rope_parameters, in whatever form they were read.
        no_matter = {"use_cache", "architectures", "rope_theta", "rope_scaling"}
        keys = (set(config) | set(dense_spec.defaults)) - no_matter
        check_donor(readers[0], reader, tuple({k: c.get(k) for k in sorted(keys)} for c in configs))  # type: ignore[arg-type]
        sources.append(check_tensors(reader, dense_spec, other))
        if set(sources[-1]) != set(sources[0]):
            raise ConfigError(f"--donor {reader.folder} has tied embeddings where {readers[0].folder} has not")
    num_dense_parameters = sum(info.num_elements for info in sources[0].values())
    if not spec.ties:
        sources = [{LM_HEAD: source[EMBEDDING]} | source for source in sources]
    fills, tensors = lay_out(sources, spec, recipe, dense, moe)
    if spec.scaling_key:
        config[spec.scaling_key] = scales(recipe, spec)[0]
    dtypes = {fill.dtype for fill in fills if fill.kind not in ("router", "constant")}
    if len(dtypes) == 1:
        config["dtype"] = config["torch_dtype"] = FLOAT_DTYPES[dtypes.pop()]
    return Plan(
        recipe=recipe,
        spec=spec,
        dense=dense,
        config=config,
        moe_layers=tuple(sorted(moe)),
        fills=tuple(fills),
        tensors=tuple(tensors),
        shards=tuple(layout_shards(tensors, max_shard_size)),
        companions=tuple(name for name in COMPANIONS if (readers[0].folder / name).is_file()),
        fingerprint=fingerprint(readers),
        max_shard_size=max_shard_size,
        num_dense_parameters=num_dense_parameters,
        clients=settled.clients,
    )


def free_disk(folder: Path) -> int:
    """Free bytes where a folder is or would be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
