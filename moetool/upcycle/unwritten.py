"""A planned checkpoint as a model, before it is written: each tensor is made when it is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from moetool.calibration.by_layer import LayeredModel
from moetool.calibration.store import cache_folder
from moetool.checkpoint.header import ITEM_SIZE, TensorInfo
from moetool.checkpoint.reader import CheckpointReader
from moetool.checkpoint.shard import index_file
from moetool.surgery.examine import unit_sums
from moetool.surgery.fill import Fill, Place
from moetool.surgery.kinds import Block, Cache
from moetool.surgery.plan import Plan
from moetool.surgery.rows import raw_bytes

SUMS = 64  # pieces whose sums are kept: those of a layer


@contextmanager
def unwritten(plan: Plan, readers: Sequence[CheckpointReader], device: str) -> Iterator[LayeredModel]:
    """The model that a plan would write, one decoder layer in memory at a time.

    transformers reads configuration and headers from a folder; the weights in it are holes, which take no disk.

    Args:
        plan: of an upcycling.
        readers: its sources.
        device: on which it runs.
    """
    cache_folder().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache_folder()) as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(plan.config))
        for shard in plan.model_shards:
            with (folder / shard.name).open("wb") as file:
                file.write(shard.header)
                file.truncate(shard.size)
        for index, content in index_file(plan.model_shards).items():
            (folder / index).write_bytes(content)
        made = _Made(plan, readers)
        model = LayeredModel(folder, "auto", device, lambda folder: made)
    yield model  # without the folder, which a kill during the pass would leave behind


class _Made:
    """The bytes of tensors as the plan's fills make them."""

    def __init__(self, plan: Plan, readers: Sequence[CheckpointReader]) -> None:
        self._plan, self._readers = plan, readers
        self._fills: dict[str, list[tuple[Fill, list[Place]]]] = {}
        for fill in plan.fills:
            places: dict[str, list[Place]] = {}
            for place in fill.places:
                places.setdefault(place.tensor, []).append(place)
            for tensor, those in places.items():
                self._fills.setdefault(tensor, []).append((fill, those))
        self._sums = lru_cache(SUMS)(partial(unit_sums, readers))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def read_into(self, info: TensorInfo, offset: int, out: memoryview) -> None:
        """Make a whole tensor."""
        for fill, places in self._fills[info.name]:
            sums = {piece: self._sums(piece, fill) for piece in fill.sources} if fill.summed else {}
            size = ITEM_SIZE[fill.dtype]
            for index, (start, stop) in enumerate(fill.blocks):
                cache = Cache()
                for place in places:
                    block = Block(fill, place, index, start, stop, self._readers, sums, cache)
                    raw = raw_bytes(self._plan.kinds[fill.kind].make(block))
                    first = (place.start + start * fill.row_length) * size - offset
                    out[first : first + len(raw)] = raw
