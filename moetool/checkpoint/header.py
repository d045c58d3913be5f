"""The header of a safetensors file: where each tensor lies.

Every length, offset and shape in it is checked, so that later code never trusts a damaged or hostile file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetool.errors import CheckpointError

# safetensors dtype -> bytes per element, for dtypes of plain weights.
ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MAX_HEADER = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 16  # per tensor; weights have up to five
GIT_LFS = b"version https://git-lfs"  # start of the pointer that git leaves where git-lfs did not fetch a file


@dataclass(frozen=True)
class TensorInfo:
    """The location of a tensor: `start` and `size` in bytes, `start` counted from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    size: int

    @property
    def num_elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        return math.prod(self.shape)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], int]:
    """Read and check the header of one safetensors file.

    Returns:
        The tensors by name, and the header's length in bytes (with its 8-byte prefix).

    Raises:
        CheckpointError: truncated, overlapping, overflowing, duplicated or mistyped entries.
    """

    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: {what}; the file is damaged or not safetensors: fetch or save it again")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    raw, file_size = _header_bytes(path, bad)
    start = 8 + len(raw)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise bad(f"the header is not valid JSON ({str(error)[:100]})") from None
    if not isinstance(header, dict):
        raise bad("the header is not an object")
    header.pop("__metadata__", None)

    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            # Check bounds before multiplying: a product of long numbers takes hours.
            numbers = (*shape, begin, end)
            whole = len(shape) <= MAX_DIMENSIONS and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
            name.encode()
        except (TypeError, KeyError, ValueError):
            raise bad(f"the entry of tensor {name[:100]!r} is malformed") from None
        if not whole or not isinstance(dtype, str):
            raise bad(f"the entry of tensor {name[:100]!r} is malformed")
        if dtype not in ITEM_SIZE:
            raise CheckpointError(
                f"{path}: tensor {name[:100]!r} has dtype {dtype[:20]!r}, not a dtype of plain weights;"
                " dequantise a quantised checkpoint first"
            )
        if end - begin != math.prod(shape) * ITEM_SIZE[dtype]:
            raise bad(f"tensor {name[:100]!r} of {dtype}{shape} does not take {end - begin} bytes")
        tensors[name] = TensorInfo(name, dtype, tuple(shape), path.name, start + begin, end - begin)
    position = start
    for info in sorted(tensors.values(), key=lambda t: (t.start, t.size)):
        if info.start != position:
            raise bad(f"tensor {info.name[:100]!r} starts at byte {info.start}, expected {position}")
        position += info.size
    if position != file_size:
        raise bad(f"its tensors end at byte {position}, but the file has {file_size}")
    return tensors, start


def _header_bytes(path: Path, bad: Callable[[str], CheckpointError]) -> tuple[bytes, int]:
    """The JSON of a header, and the size of its file."""
    try:
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if start == GIT_LFS[:8] and file.read(len(GIT_LFS) - 8) == GIT_LFS[8:]:
                raise CheckpointError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` there")
            length = int.from_bytes(start, "little")
            if file_size < 8 or length > MAX_HEADER or 8 + length > file_size:
                raise bad(f"the header claims {length} bytes, but the file has {file_size}")
            return file.read(length), file_size
    except OSError as error:
        raise CheckpointError(f"{path}: {os.strerror(error.errno or 0).lower()}") from None
