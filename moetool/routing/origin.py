"""The origin of an upcycled checkpoint by moetool.json: its recipe, the units it changed, its dense sources.

Shapes: F intermediate units of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetool import __version__, registry
from moetool.arch.dense_config import dense_config, open_dense
from moetool.arch.moe_source import moe_source
from moetool.arch.spec import ArchSpec, dense_ffn, routed_factor
from moetool.checkpoint.hub import find_model
from moetool.checkpoint.reader import CheckpointReader
from moetool.errors import CheckpointError, MoetoolError
from moetool.layers import LayerRatios
from moetool.lineage import LINEAGE, lineage_entries, recorded_sources
from moetool.measured import NOTHING, Measured
from moetool.recipe import PROJECTIONS, UpcycleRecipe
from moetool.routing.alignment import originals
from moetool.units import held_units, redrawn_units, split_digest, units_digest


@dataclass(frozen=True)
class Origin:
    """How a checkpoint was upcycled; checked against the checkpoint.

    Attributes:
        entry: the lineage entry.
        recipe: of the upcycling.
        spec: the family.
        layers: the layers with experts, ascending.
        num_units: intermediate units of an expert (F).
        experts: of each layer, the expert of the upcycling that each expert now comes from: later ones may have been
            copied or left out.
        sources: the dense models as their user named them: DENSE, then the other donors.
        measured: what a pass over text has decided of the upcycling.
    """

    entry: Mapping[str, Any]
    recipe: UpcycleRecipe
    spec: ArchSpec
    layers: tuple[int, ...]
    num_units: int
    experts: tuple[tuple[int, ...], ...]
    sources: tuple[str, ...]
    measured: Measured = NOTHING

    @property
    def drawn(self) -> bool:
        """Whether every tensor was drawn: no expert comes from a dense FFN."""
        return self.recipe.method == "scratch"

    @property
    def num_redrawn(self) -> tuple[int, ...]:
        """For each layer with experts, units changed in each matrix of an expert that was not kept whole: redrawn, or
        given noise."""
        return tuple(self.recipe.num_redrawn(self.num_units, layer) for layer in self.layers)

    @property
    def num_experts(self) -> int:
        """Experts in a layer now."""
        return len(self.experts[0])

    def first(self, layer: int, expert: int) -> int:
        """The expert of the upcycling that an expert comes from."""
        return self.experts[self.layers.index(layer)][expert]

    def parts(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """The experts that hold the same part of the dense FFN, and so have something in common."""
        every, size = range(self.num_experts), 1 if self.drawn else self.recipe.group_size
        found = (tuple(e for e in every if self.first(layer, e) % size == part) for part in range(size))
        return tuple(part for part in found if part)

    @property
    def factor(self) -> float:
        """The factor of the dense FFN's down-projections."""
        return routed_factor(self.recipe, self.spec)

    def redrawn(self, layer: int, expert: int, *projections: str) -> Tensor:
        """Bool (F,): the units, by position in the expert, of which one of these matrices was changed."""
        redrawn_F = torch.zeros(self.num_units, dtype=torch.bool)
        first, size = self.first(layer, expert), self.num_units
        for projection in projections or PROJECTIONS:
            redrawn_F[redrawn_units(self.recipe, layer, first, projection, size, self.measured)] = True
        return redrawn_F

    def held(self, layer: int, expert: int) -> Tensor | None:
        """int64 (F,): the units of the dense FFN that an expert began as; None where they are neighbours."""
        return held_units(self.recipe, self.measured, layer, self.first(layer, expert), self.num_units)


def read_origin(folder: Path) -> Origin | None:
    """The origin of a checkpoint; None where moetool did not upcycle it.

    Raises:
        CheckpointError: moetool.json is damaged, or does not describe this checkpoint: the changed
            units rebuilt from its recipe must have the checksums that it records.
    """
    entry = first_entry(folder)
    if entry is None or entry.get("command") != "upcycle":
        return None
    with CheckpointReader(folder) as reader:
        source = moe_source(reader)
    if source is None or not source.layers:
        return None
    path = folder / LINEAGE
    try:
        recipe = UpcycleRecipe.from_json(entry.get("recipe", {}))
        _check_recipe(recipe)
        measured = Measured.from_json(entry.get("measured", {}), {})
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/{error}; delete it to analyse the checkpoint without it") from None
    found = originals(lineage_entries(folder)[1:], source.num_experts, source.layers, path, recipe.num_experts)
    experts = tuple(tuple(found[layer]) for layer in source.layers)
    sources = recorded_sources(entry)
    named = all(isinstance(source.get("name"), str) and isinstance(source.get("sha256"), dict) for source in sources)
    if not named or len(sources) != recipe.num_donors:
        raise CheckpointError(f"{path} does not name the dense source; delete it to analyse the checkpoint without it")
    names = tuple(source["name"] for source in sources)
    num_units = source.expert(source.layers[0], 0, "gate").shape[0]
    origin = Origin(entry, recipe, source.spec, source.layers, num_units, experts, names, measured)
    if recipe.split != "contiguous":
        _check_split(origin, path)
    if any(origin.num_redrawn):
        _check_digests(origin, path)
    return origin


def _check_recipe(recipe: UpcycleRecipe) -> None:
    """Refuse a recipe that `moetool upcycle` cannot have written: what follows relies on it."""
    for name in ("drop_ratio", "noise_ratio"):
        ratio = getattr(recipe, name)
        if not isinstance(ratio, LayerRatios) and not (ratio.is_finite() and 0 <= ratio <= 1):
            raise CheckpointError(f"{LINEAGE}: {name} is not between 0 and 1")
    donors, shared = recipe.num_donors, recipe.shared_experts or 0
    sound = (
        recipe.method in registry.names("method") and donors >= 1 and recipe.granularity >= 1 and shared >= 0
    ) and (recipe.method == "scratch" or recipe.num_experts % (recipe.group_size * donors) == 0)
    whole = recipe.keep_experts_whole
    if not sound or (whole and not (0 < whole <= recipe.num_experts and whole % (recipe.group_size * donors) == 0)):
        raise CheckpointError(f"{LINEAGE}: moetool upcycle cannot have written this recipe")


def first_entry(folder: Path) -> dict[str, Any] | None:
    """The first entry of a checkpoint's lineage."""
    return next(iter(lineage_entries(folder)), None)


def _check_digests(origin: Origin, path: Path) -> None:
    recorded = origin.entry.get("redrawn_units", {})
    digests = recorded.get("digests")
    shape = [len(row) if isinstance(row, list) else 0 for row in digests] if isinstance(digests, list) else []
    layers, experts = len(origin.layers), origin.recipe.num_experts
    if not isinstance(digests, list) or shape != [experts] * layers or recorded.get("layers") != list(origin.layers):
        raise CheckpointError(
            f"{path} has no checksum for each of {layers} x {experts} experts; delete it to analyse the checkpoint"
            " without it"
        )
    for layer, row in zip(origin.layers, digests, strict=True):
        for expert, digest in enumerate(row):
            if units_digest(origin.recipe, layer, expert, origin.num_units, origin.measured) != digest:
                raise _differing(f"layer {layer}, expert {expert}: the redrawn units", origin, path)


def _check_split(origin: Origin, path: Path) -> None:
    recipe, units = origin.recipe, origin.num_units * origin.recipe.granularity
    try:
        digests = [split_digest(recipe, layer, units, origin.measured) for layer in origin.layers]
    except CheckpointError as error:
        raise CheckpointError(f"{path.parent}/{error}; delete it to analyse the checkpoint without it") from None
    recorded = {"layers": list(origin.layers), "digests": digests}
    if recipe.split == "random" and origin.entry.get("split_units") != recorded:
        raise _differing("the parts of the dense FFN", origin, path)


def _differing(what: str, origin: Origin, path: Path) -> CheckpointError:
    return CheckpointError(
        f"{what} rebuilt from the recipe differ from those in"
        f" {path}; it was written by moetool {str(origin.entry.get('moetool'))[:40]!r} with torch"
        f" {str(origin.entry.get('torch'))[:40]!r}, this is {__version__} with {torch.__version__}; delete"
        " it to analyse the checkpoint without it"
    )


def find_dense(origin: Origin) -> tuple[Path, ...]:
    """The folders of the dense models, if they are on this machine and look like those that were upcycled.

    Looked at are family, the names of the files, and the names and shapes of the FFN matrices; hashing
    the files (`moetool verify`) is left out, since that reads all of them.

    Raises:
        CheckpointError: one is not; says which and why.
    """
    found = []
    for name, expected in zip(origin.sources, recorded_sources(dict(origin.entry)), strict=True):
        try:
            found.append(_find(name, expected, origin))
        except MoetoolError as error:
            raise CheckpointError(f"{name[:200]}: {error}") from None
    return tuple(found)


def _find(name: str, expected: Mapping[str, Any], origin: Origin) -> Path:
    folder = find_model(name)
    if folder is None:
        raise CheckpointError("no such folder here, and not in the hub's cache")
    with open_dense(folder) as reader:
        spec, config = dense_config(reader.config)
    if spec.model_type != expected.get("model_type") or set(reader.shards) != set(expected["sha256"]):
        raise CheckpointError(f"{folder} differs in its family or files from the model that was upcycled")
    units, hidden = origin.num_units * origin.recipe.granularity, config["hidden_size"]
    for layer in origin.layers:
        for projection, tensor in dense_ffn(layer).items():
            info = reader.tensors.get(tensor)
            if info is None or info.shape != ((hidden, units) if projection == "down" else (units, hidden)):
                raise CheckpointError(f"{folder} differs in its FFN matrices from the model that was upcycled")
    return folder
