"""The plan of an operation: every tensor, its content, and its place on disk. Nothing is written."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moetool.checkpoint.header import ITEM_SIZE, TensorInfo
from moetool.checkpoint.reader import BlockFile, CheckpointReader
from moetool.checkpoint.shard import Shard, TensorLayout, lay_out_file, layout_shards
from moetool.checkpoint.step_folder import in_state
from moetool.checkpoint.writer import COMPANIONS
from moetool.errors import CheckpointError
from moetool.lineage import lineage_entries
from moetool.progress import Progress
from moetool.surgery.complete import check_whole
from moetool.surgery.fill import Fill, Place
from moetool.surgery.kinds import Kind


@dataclass(frozen=True)
class Plan:
    """A checkpoint to be written; `lay_out` makes one.

    Attributes:
        command: the operation, a name under `operation` in the registry.
        recipe: of the command, as JSON; with the sources, it determines every byte.
        config: config.json of the result.
        fills: what is written, in the order of the disk.
        tensors: the tensors of the result, in that order.
        shards: the files that they lie in.
        max_shard_size: bytes of tensor data per file.
        kinds: how each kind of fill is made.
        companions: files beside the weights that are carried over.
        model_types: of the sources, for the lineage.
        lineages: of the sources, as the new one records them.
        history: lineage entries that the new one follows.
        fingerprint: of the sources as they were when the plan was made.
        measured: what a pass over text has decided besides, as the lineage records it; it makes another result.
        recorded: what the lineage records beyond that, so that a proof can tell whether it is rebuilt exactly.
        also: checks of the result that only this operation knows; what they found is added to the proof.
        beside: folder -> small files, by path, that are made from the shards there once all are written.
    """

    command: str
    recipe: Mapping[str, Any]
    config: Mapping[str, Any]
    fills: tuple[Fill, ...]
    tensors: tuple[TensorLayout, ...]
    shards: tuple[Shard, ...]
    max_shard_size: int
    kinds: Mapping[str, Kind]
    companions: tuple[str, ...]
    model_types: tuple[str, ...]
    lineages: tuple[list[dict[str, Any]], ...]
    history: list[dict[str, Any]]
    fingerprint: str
    measured: Mapping[str, Any] = field(default_factory=dict)
    recorded: Callable[[], dict[str, Any]] = dict
    also: Callable[[Plan, BlockFile], dict[str, Any]] = lambda plan, written: {}
    beside: Callable[[Path], dict[str, bytes]] | None = None

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    @cached_property
    def model_shards(self) -> tuple[Shard, ...]:
        """The files of the checkpoint itself, without those of a training state."""
        return tuple(shard for shard in self.shards if not in_state(shard.name))

    @cached_property
    def model_tensors(self) -> tuple[TensorLayout, ...]:
        """The tensors in them."""
        return tuple(tensor for tensor in self.tensors if not in_state(tensor.name))

    @cached_property
    def model_fills(self) -> tuple[Fill, ...]:
        """The fills of these tensors."""
        return tuple(fill for fill in self.fills if not in_state(fill.places[0].tensor))

    @cached_property
    def num_parameters(self) -> int:
        """Elements of the checkpoint's tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.model_tensors)

    @cached_property
    def written(self) -> dict[str, TensorInfo]:
        """The place of each tensor in the result."""
        layouts = {layout.name: layout for layout in self.tensors}
        return {
            name: TensorInfo(name, layouts[name].dtype, layouts[name].shape, shard.name, start, layouts[name].size)
            for shard in self.shards
            for name, start in shard.starts.items()
        }

    def place_info(self, fill: Fill, place: Place) -> TensorInfo:
        """Where a destination lies in the result, as if it were a tensor of its own."""
        whole, itemsize = self.written[place.tensor], ITEM_SIZE[fill.dtype]
        start = whole.start + place.start * itemsize
        return TensorInfo(place.tensor, fill.dtype, fill.shape, whole.shard, start, fill.num_elements * itemsize)

    def identity(self) -> dict[str, Any]:
        """The identity of a run: the recipe, the measurements, the sources and the layout on disk."""
        measured = {"measured": dict(self.measured)} if self.measured else {}
        return {
            "recipe": self.recipe,
            "source_fingerprint": self.fingerprint,
            "shards": {shard.name: shard.size for shard in self.shards},
            **measured,
        }


MeasureAgain = Callable[[Sequence[CheckpointReader], Mapping[str, Any], Any, Progress], dict[str, Any]]


@dataclass(frozen=True)
class Operation:
    """A command that rewrites checkpoints, for `moetool verify`; under `operation` in the registry.

    Attributes:
        done: what it does to its source, as messages say it: `upcycled`.
        replan: (sources, lineage entry, max_shard_size) -> the plan that the entry records.
        reader: lineage entry -> what opens its sources, except an adapter.
        one_source: whether it has exactly one.
        measure_again: (sources, lineage entry, texts and how they run, progress) -> what a pass over the same text
            finds of what the entry records; None where it records nothing of text.
    """

    done: str
    replan: Callable[[Sequence[CheckpointReader], Mapping[str, Any], int], Plan]
    reader: Callable[[Mapping[str, Any]], type[CheckpointReader]] = lambda entry: CheckpointReader
    one_source: bool = False
    measure_again: MeasureAgain | None = None


def lay_out(
    command: str,
    recipe: Mapping[str, Any],
    readers: Sequence[CheckpointReader],
    config: Mapping[str, Any],
    fills: Sequence[Fill],
    tensors: Sequence[TensorLayout],
    max_shard_size: int,
    kinds: Mapping[str, Kind],
    model_types: Sequence[str],
    continues: int = 0,
    state: Mapping[str, Sequence[TensorLayout]] | None = None,
    **more: Any,
) -> Plan:
    """Lay fills out on disk; the other arguments are `Plan`'s.

    Args:
        readers: the sources; companions are carried over from the first.
        continues: so many of the first sources are the same model as the result: its lineage continues what theirs
            have in common. The rest of each source's own is recorded in the new entry.
        state: of each file of a training state its tensors, whose names begin with the file's and a slash.

    Raises:
        CheckpointError: tensors of a source are missing, config.json holds a number that JSON does not have, or a
            source's lineage is damaged.
    """
    if continues:  # an upcycling knows each tensor of its sources
        check_whole(config, tensors, readers[0].folder)
    lineages = [lineage_entries(reader.folder) for reader in readers]
    history = _in_common(lineages[:continues])
    for key, value in config.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise CheckpointError(f"config.json: {key} is {str(value)[:60]}; JSON has no NaN or infinity") from None
    return Plan(
        command=command,
        recipe=recipe,
        config=config,
        fills=tuple(fills),
        tensors=(*tensors, *(tensor for one in (state or {}).values() for tensor in one)),
        shards=(
            *layout_shards(tensors, max_shard_size),
            *(lay_out_file(file, one, f"{file}/") for file, one in (state or {}).items()),
        ),
        max_shard_size=max_shard_size,
        kinds=kinds,
        companions=tuple(name for name in COMPANIONS if (readers[0].folder / name).is_file()),
        model_types=tuple(model_types),
        lineages=tuple(found[len(history) * (n < continues) :] for n, found in enumerate(lineages)),
        history=history,
        fingerprint=fingerprint(readers),
        **more,
    )


def _in_common(lineages: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The first entries, as far as all lineages have the same."""
    alike = []
    for entries in zip(*lineages, strict=False):
        if any(entry != entries[0] for entry in entries):
            break
        alike.append(entries[0])
    return alike


def fingerprint(readers: Sequence[CheckpointReader]) -> str:
    """A quick identity of the sources as they are on disk now."""
    return hashlib.sha256("".join(reader.fingerprint() for reader in readers).encode()).hexdigest()


def free_disk(folder: Path) -> int:
    """Free bytes where a folder is or would be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
