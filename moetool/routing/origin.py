"""What moetool.json says of an upcycled checkpoint: its recipe, its redrawn units, its dense source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetool import __version__
from moetool.arch.dense import FFN, dense_config
from moetool.arch.spec import ArchSpec, detect
from moetool.checkpoint.hub import find_model
from moetool.checkpoint.reader import CheckpointReader
from moetool.errors import CheckpointError, MoetoolError
from moetool.recipe import LINEAGE, PROJECTIONS, UpcycleRecipe, read_lineage, redrawn_units, units_digest


@dataclass(frozen=True)
class Origin:
    """How a checkpoint was upcycled; checked against the checkpoint.

    Attributes:
        entry: the lineage entry.
        recipe: what was asked.
        spec: the family on disk.
        num_layers: decoder layers.
        num_units: intermediate units of an expert (F).
        source: the dense model as its user named it.
    """

    entry: Mapping[str, Any]
    recipe: UpcycleRecipe
    spec: ArchSpec
    num_layers: int
    num_units: int
    source: str

    @property
    def num_redrawn(self) -> int:
        """Units redrawn in each matrix of an expert."""
        return self.recipe.num_redrawn(self.num_units)

    def redrawn(self, layer: int, expert: int, *projections: str) -> Tensor:
        """Bool (F,): the units, by position in the expert, of which one of these matrices was redrawn."""
        redrawn_F = torch.zeros(self.num_units, dtype=torch.bool)
        for projection in projections or PROJECTIONS:
            redrawn_F[redrawn_units(self.recipe, layer, expert, projection, self.num_units)] = True
        return redrawn_F


def read_origin(folder: Path) -> Origin | None:
    """The origin of a checkpoint; None where moetool did not upcycle it.

    Raises:
        CheckpointError: moetool.json is damaged, or does not describe this checkpoint: the redrawn
            units rebuilt from its recipe must have the checksums that it records.
    """
    entry = first_entry(folder)
    if entry is None or entry.get("command") != "upcycle":
        return None
    with CheckpointReader(folder) as reader:
        spec = detect(reader.config)
        info = reader.tensors.get(spec.experts["gate"].format(layer=0, expert=0)) if spec else None
        if spec is None or info is None or len(info.shape) != 2:
            return None
        num_layers, num_experts = reader.config.get("num_hidden_layers"), reader.config.get(spec.num_experts_key)
    path = folder / LINEAGE
    try:
        recipe = UpcycleRecipe.from_json(entry.get("recipe", {}))
        if not (recipe.drop_ratio.is_finite() and 0 <= recipe.drop_ratio <= 1):
            raise CheckpointError(f"{LINEAGE}: drop_ratio is not between 0 and 1")
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/{error}; delete it to analyse the checkpoint without") from None
    source = entry.get("source")
    shards = source.get("sha256") if isinstance(source, dict) else None
    if not isinstance(source, dict) or not isinstance(shards, dict) or not isinstance(source.get("name"), str):
        raise CheckpointError(f"{path} does not name the dense source; delete it to analyse the checkpoint without")
    if recipe.num_experts != num_experts or type(num_layers) is not int:
        raise CheckpointError(
            f"{path} tells of {recipe.num_experts} experts, config.json of {num_experts!r}; delete it to analyse the"
            " checkpoint without"
        )
    origin = Origin(entry, recipe, spec, num_layers, info.shape[0], source["name"])
    if origin.num_redrawn:
        _check_digests(origin, path)
    return origin


def first_entry(folder: Path) -> dict[str, Any] | None:
    """The first entry of a checkpoint's lineage."""
    lineage = (read_lineage(folder) or {}).get("lineage") or [None]
    return lineage[0]  # type: ignore[no-any-return]


def _check_digests(origin: Origin, path: Path) -> None:
    recorded = origin.entry.get("redrawn_units")
    digests = recorded.get("digests") if isinstance(recorded, dict) else None
    shape = [len(row) if isinstance(row, list) else 0 for row in digests] if isinstance(digests, list) else []
    if not isinstance(digests, list) or shape != [origin.recipe.num_experts] * origin.num_layers:
        raise CheckpointError(
            f"{path} has no checksum for each of {origin.num_layers} x {origin.recipe.num_experts} experts; delete it"
            " to analyse the checkpoint without"
        )
    for layer, experts in enumerate(digests):
        for expert, digest in enumerate(experts):
            if units_digest(origin.recipe, layer, expert, origin.num_units) != digest:
                raise CheckpointError(
                    f"layer {layer}, expert {expert}: the redrawn units rebuilt from the recipe are not those in"
                    f" {path}; it was written by moetool {str(origin.entry.get('moetool'))[:40]!r} with torch"
                    f" {str(origin.entry.get('torch'))[:40]!r}, this is {__version__} with {torch.__version__}; delete"
                    " it to analyse the checkpoint without"
                )


def find_dense(origin: Origin) -> Path:
    """The folder of the dense source, if it is on this machine and looks like the one that was upcycled.

    Looked at are family, the names of its files, and the names and shapes of its FFN matrices; hashing
    the files (`moetool verify`) is left out, since that reads all of them.

    Raises:
        CheckpointError: it is not; says why.
    """
    folder = find_model(origin.source)
    if folder is None:
        raise CheckpointError("no such folder here, and not in the hub's cache")
    expected: Mapping[str, Any] = origin.entry["source"]
    try:
        with CheckpointReader(folder) as reader:
            spec, config = dense_config(reader.config)
    except MoetoolError as error:
        raise CheckpointError(str(error)) from None
    if spec.model_type != expected.get("model_type") or set(reader.shards) != set(expected["sha256"]):
        raise CheckpointError(f"{folder} has another family or other files than the model that was upcycled")
    sizes = {"F": origin.num_units, "D": config["hidden_size"]}
    for layer in range(origin.num_layers):
        for name, letters in FFN.items():
            info = reader.tensors.get(f"model.layers.{layer}.{name}")
            if info is None or info.shape != tuple(sizes[letter] for letter in letters.split()):
                raise CheckpointError(f"{folder} has other FFN matrices than the model that was upcycled")
    return folder
