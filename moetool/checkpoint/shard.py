"""The files of tensors that a checkpoint will have: their headers, and where each tensor lies; nothing is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetool.checkpoint.header import ITEM_SIZE, read_header
from moetool.checkpoint.reader import INDEX, SINGLE
from moetool.errors import CheckpointError


@dataclass(frozen=True)
class TensorLayout:
    """A tensor to be written; dtype is the safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return ITEM_SIZE[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """A file to be written: its header's bytes and the start of each tensor in the file."""

    name: str
    header: bytes
    starts: Mapping[str, int]
    size: int


def layout_shards(tensors: Sequence[TensorLayout], max_shard_size: int) -> list[Shard]:
    """Cut tensors, in the given order, into files of at most `max_shard_size` bytes of tensor data.

    A larger tensor gets its own file. One file is called model.safetensors, several
    model-00001-of-0000N.safetensors, as in transformers.
    """
    groups: list[list[TensorLayout]] = []
    filled = 0
    for tensor in tensors:
        if not groups or (filled and filled + tensor.size > max_shard_size):
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.size
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    names = [SINGLE] if len(groups) == 1 else names
    return [lay_out_file(name, group) for name, group in zip(names, groups, strict=True)]


def lay_out_file(name: str, tensors: Sequence[TensorLayout], prefix: str = "") -> Shard:
    """One file of tensors, in the given order; a prefix of their names is left out in the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, offsets = 0, {}
    for tensor in tensors:
        entries[tensor.name.removeprefix(prefix)] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offsets[tensor.name] = offset
        offset += tensor.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    starts = {tensor: len(header) + start for tensor, start in offsets.items()}
    return Shard(name, header, starts, len(header) + offset)


def index_file(shards: Sequence[Shard]) -> dict[str, bytes]:
    """The index by its file name; empty if there is one shard."""
    if len(shards) == 1:
        return {}
    weight_map = {tensor: shard.name for shard in shards for tensor in shard.starts}
    total = sum(shard.size - len(shard.header) for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX: json.dumps(index, indent=2).encode() + b"\n"}


def check_written(folder: Path, shards: Sequence[Shard]) -> None:
    """Re-read every header of a finished folder and compare it with the layout.

    Raises:
        CheckpointError: a shard is absent, damaged or differs.
    """
    for shard in shards:
        tensors, length = read_header(folder / shard.name)
        planned = json.loads(shard.header[8:])
        planned.pop("__metadata__")
        found = {
            name: {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": [info.start - length, info.start - length + info.size],
            }
            for name, info in tensors.items()
        }
        if found != planned or length != len(shard.header):
            shapes = [{name: (entry["dtype"], entry["shape"]) for name, entry in e.items()} for e in (found, planned)]
            what = (
                "holds the planned tensors in another layout, so another program has saved it again"
                if shapes[0] == shapes[1]
                else "does not hold the planned tensors"
            )
            raise CheckpointError(f"{folder / shard.name} {what}")
