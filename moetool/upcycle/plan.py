"""A dense model's recipe as a plan: checks everything, writes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from moetool.arch.dense import EMBEDDING, LM_HEAD
from moetool.arch.dense_config import dense_config
from moetool.arch.spec import ArchSpec, scales
from moetool.checkpoint.folder import beside
from moetool.checkpoint.reader import BlockFile, CheckpointReader
from moetool.checkpoint.step_folder import TrainingReader, state_document
from moetool.errors import CheckpointError, ConfigError
from moetool.measured import NOTHING, Measured
from moetool.progress import Progress
from moetool.recipe import CALIBRATE, PROJECTIONS, UpcycleRecipe
from moetool.surgery.plan import Operation, Plan, lay_out
from moetool.units import redrawn_units, split_digest, units_digest
from moetool.upcycle.blocks import kinds
from moetool.upcycle.check import check_donor, check_tensors
from moetool.upcycle.groups import split_share
from moetool.upcycle.layout import fills_of, with_head
from moetool.upcycle.state import DenseState, carried_state, dense_state
from moetool.upcycle.target import settle
from moetool.upcycle.texts import TextOptions
from moetool.values import FLOAT_DTYPES


@dataclass(frozen=True)
class Upcycling:
    """The result of a recipe for a dense model; see `plan_upcycling`.

    Attributes:
        recipe: with the family's name for `auto`, and a number of shared experts.
        spec: the family to write.
        dense: the filled dense config.
        moe_layers: layers with experts, ascending.
        num_dense_parameters: of DENSE.
        clients: client -> why it does not compute the result as transformers 5 does, None where it does.
        plan: what is written.
        measured: what a pass over text has decided.
        state: the training state of DENSE that goes along.
    """

    recipe: UpcycleRecipe
    spec: ArchSpec
    dense: Mapping[str, Any]
    moe_layers: tuple[int, ...]
    num_dense_parameters: int
    clients: Mapping[str, str | None]
    plan: Plan
    measured: Measured = NOTHING
    state: DenseState | None = None

    @property
    def intermediate_size(self) -> int:
        """Units of the dense FFN."""
        return int(self.dense["intermediate_size"])

    @property
    def num_units(self) -> int:
        """Units of one expert."""
        return self.intermediate_size // self.recipe.granularity

    @property
    def num_redrawn(self) -> list[int]:
        """For each MoE layer, units changed in an expert (in each of its matrices, with per-matrix indices); experts
        that are kept whole do not count."""
        return [self.recipe.num_redrawn(self.num_units, layer) for layer in self.moe_layers]

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Dense, total and active parameters (active: those used per token)."""
        total = self.plan.num_parameters
        return {"dense": self.num_dense_parameters, "total": total, "active": total - self._idle}

    @property
    def _idle(self) -> int:
        experts = sum(fill.num_elements for fill in self.plan.model_fills if len(fill.places) > 1)
        return experts * (self.recipe.num_experts - self.recipe.top_k)

    @property
    def flops_per_token(self) -> dict[str, int]:
        """Operations of a forward pass per token, 2 per weight used, for the dense model and the result.

        Attention's products of queries, keys and values are left out: they are the same in both.
        """
        head = self.dense["vocab_size"] * self.dense["hidden_size"]
        ffn = 3 * self.intermediate_size * self.dense["hidden_size"]
        carried = sum(
            fill.num_elements
            for fill in self.plan.model_fills
            if len(fill.shape) == 2 and fill.layer is None and fill.places[0].tensor not in (EMBEDDING, LM_HEAD)
        )
        moe = sum(fill.num_elements * len(fill.places) for fill in self.plan.model_fills if fill.layer is not None)
        return {
            "dense": 2 * (carried + len(self.moe_layers) * ffn + head),
            "moe": 2 * (carried + moe - self._idle + head),
        }

    @property
    def common_shares(self) -> list[float]:
        """For each MoE layer, the expected share of units that two experts have in common, unchanged in all matrices.

        (1 - |S| / F)^2 for shared index sets; each of three independent sets must miss a unit in both
        experts with per-matrix ones. A unit of an expert that is kept whole is missed by all sets. It holds for
        experts of the same part of the same donor's FFN, and is the mean over pairs of them.
        """
        recipe, sets = self.recipe, 3 if self.recipe.drop_index == "per-matrix" else 1
        if recipe.method == "scratch":
            return [0.0] * len(self.moe_layers)
        if recipe.drop_units == "least-used" and self.measured.contributions:
            return [self._common_share_found(layer) for layer in self.moe_layers]
        alike = recipe.num_experts // (recipe.num_donors * recipe.group_size)
        whole = sum(map(recipe.is_whole, range(alike * recipe.group_size))) // recipe.group_size
        # Pairs of which none, one or both are changed.
        pairs = [math.comb(whole, 2), whole * (alike - whole), math.comb(alike - whole, 2)] if whole else [0, 0, 1]
        kept = [1 - num / self.num_units for num in self.num_redrawn]
        return [
            sum(n * share ** (sets * changed) for changed, n in enumerate(pairs)) / sum(pairs) if sum(pairs) else 1.0
            for share in kept
        ]

    def _common_share_found(self, layer: int) -> float:
        """The share of units that two experts of one part of one donor's FFN have kept, on average over such pairs."""
        recipe, units, found = self.recipe, self.num_units, []
        keeping_F: dict[tuple[int, int], list[torch.Tensor]] = {}
        for expert in range(recipe.num_experts):
            kept_F = torch.ones(units)
            kept_F[redrawn_units(recipe, layer, expert, PROJECTIONS[0], units, self.measured)] = 0
            keeping_F.setdefault((recipe.donor(expert), recipe.first_unit(expert, units)), []).append(kept_F)
        for alike in keeping_F.values():
            count_F, n = torch.stack(alike).sum(0), len(alike)
            found += [float((count_F * (count_F - 1)).sum()) / (n * (n - 1) * units)] if n > 1 else []
        return sum(found) / len(found) if found else (1 - recipe.num_redrawn(units, layer) / units) ** 2


def plan_upcycling(
    readers: Sequence[CheckpointReader],
    recipe: UpcycleRecipe,
    max_shard_size: int,
    clients: Sequence[str] = (),
    measured: Measured = NOTHING,
    keep_optimizer: bool = False,
) -> Upcycling:
    """Check sources and a recipe against each other and lay out the result.

    Args:
        readers: the dense checkpoint, and the other donors.
        recipe: `target` may be `auto`, `shared_experts` None; the plan's recipe has the family's.
        max_shard_size: bytes of tensor data per file.
        clients: programs in which the result must run, names in `arch/clients.py`.
        measured: what a pass over text has decided.
        keep_optimizer: whether the training state of DENSE, a step folder, goes along.

    Raises:
        ConfigError: the family cannot be served, the recipe contradicts itself or the source, or the result
            would not run in a client.
        CheckpointError: a tensor is missing, unknown, of another shape than config.json says, or
            does not hold plain floating-point numbers.
    """
    dense_spec, dense = dense_config(readers[0].config)
    near = beside(readers[0].folder)
    settled = settle(recipe, dense, clients, near)  # before any tensor is looked at
    sources = [check_tensors(readers[0], dense_spec, dense)]
    if dense["tie_word_embeddings"] and LM_HEAD in sources[0]:  # it has a head of its own, whatever it says
        settled = settle(recipe, dense | {"tie_word_embeddings": False}, clients, near)
    recipe, spec, moe, config = settled.recipe, settled.spec, settled.moe, settled.config
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
            raise ConfigError(f"--donor {reader.folder} has tied embeddings, but {readers[0].folder} does not")
    measured.check_routers(recipe.num_experts // recipe.group_size, dense["hidden_size"])
    num_dense_parameters = sum(info.num_elements for info in sources[0].values())
    state = dense_state(readers, dense_spec, dense, sources[0]) if keep_optimizer else None
    fills, tensors = fills_of([with_head(source, spec) for source in sources], spec, recipe, dense, moe)
    if spec.scaling_key:
        config[spec.scaling_key] = scales(recipe, spec)[0]
    dtypes = {fill.dtype for fill in fills if fill.kind not in ("router", "selection bias", "constant")}
    if len(dtypes) == 1:
        config["dtype"] = config["torch_dtype"] = FLOAT_DTYPES[dtypes.pop()]
    layers = tuple(sorted(moe))
    document = recipe.to_json() | ({CALIBRATE: dict(measured.texts_read)} if measured.texts_read else {})
    more: dict[str, Any] = {}
    if state:
        rounded = config.get("dtype") != "float32"
        others, files = carried_state(state, spec, recipe, dense, moe, sources[0], rounded)
        fills = [*state.exact(fills, sources[0]), *others]
        more = {"state": files, "beside": partial(state_document, state.reader, tuple(files))}
    plan = lay_out(
        "upcycle", document, readers, config, fills, tensors, max_shard_size, kinds(recipe, measured),
        model_types=[dense["model_type"]] * len(readers),
        recorded=partial(
            _recorded, recipe, measured, dense["intermediate_size"] // recipe.granularity, layers, bool(state)
        ),
        measured=measured.to_json(), also=partial(_also, recipe, spec), **more,
    )  # fmt: skip
    return Upcycling(recipe, spec, dense, layers, num_dense_parameters, settled.clients, plan, measured, state)


def _recorded(
    recipe: UpcycleRecipe, measured: Measured, units: int, layers: Sequence[int], training_state: bool
) -> dict[str, Any]:
    """The decisions of a pass over text, and checksums of the redrawn units, which tell whether a proof rebuilds them
    exactly."""
    document = measured.to_json()
    recorded: dict[str, Any] = {"measured": document} if document else {}
    recorded |= {"training_state": True} if training_state else {}
    if recipe.split == "random":
        digests = [split_digest(recipe, layer, units * recipe.granularity) for layer in layers]
        recorded["split_units"] = {"layers": list(layers), "digests": digests}
    redrawn = [recipe.num_redrawn(units, layer) for layer in layers]
    if not any(redrawn):
        return recorded
    experts = range(recipe.num_experts)
    return recorded | {
        "redrawn_units": {
            "num_units": units,
            "num_redrawn": redrawn[0] if len(set(redrawn)) == 1 else redrawn,
            "matrices": list(PROJECTIONS),
            "layers": list(layers),
            "digests": [
                [units_digest(recipe, layer, expert, units, measured) for expert in experts] for layer in layers
            ],
        }
    }


def _also(recipe: UpcycleRecipe, spec: ArchSpec, plan: Plan, written: BlockFile) -> dict[str, Any]:
    return {"split_groups": split_share(recipe, spec, plan, written)}


def replan(readers: Sequence[CheckpointReader], entry: Mapping[str, Any], max_shard_size: int) -> Plan:
    """The plan that a lineage entry records.

    Raises:
        CheckpointError: the entry is damaged.
        ConfigError: see `plan_upcycling`.
    """
    recipe = UpcycleRecipe.from_json(entry.get("recipe", {}))
    if recipe.num_donors != len(readers):
        raise CheckpointError(f"moetool.json records {recipe.num_donors} donors but names {len(readers)}")
    measured = Measured.from_json(entry.get("measured", {}), entry.get("recipe", {}).get(CALIBRATE, {}))
    keep_optimizer = entry.get("training_state") is True
    return plan_upcycling(readers, recipe, max_shard_size, measured=measured, keep_optimizer=keep_optimizer).plan


def reader_of(entry: Mapping[str, Any]) -> type[CheckpointReader]:
    """The reader for the sources of a lineage entry: with their training state if the result has one."""
    return TrainingReader if entry.get("training_state") is True else CheckpointReader


def _measure_again(
    readers: Sequence[CheckpointReader], entry: Mapping[str, Any], run: TextOptions, progress: Progress
) -> dict[str, Any]:
    from moetool.upcycle.measure import measure_again  # loads transformers

    return measure_again(readers, entry, run, progress)


OPERATION = Operation("upcycled", replan, reader_of, measure_again=_measure_again)
