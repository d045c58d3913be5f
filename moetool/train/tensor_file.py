"""Files of tensors in the safetensors format, hashed while they are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

_PIECE = 1 << 24  # bytes
# safetensors sorts a file's tensors by dtype in this order, then by name.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def write(path: Path, tensors: Mapping[str, Tensor], go_on: Callable[[], None]) -> str:
    """Write a file, byte for byte that of safetensors' `save_file`, which neither hashes nor can be ended.

    Args:
        path: is made.
        tensors: contiguous, on the CPU.
        go_on: called between pieces.

    Returns:
        The digest of the file, see `digest`.
    """
    order = list(_DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor, start, end = tensors[name], end, end + tensors[name].nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    hashed = xxhash.xxh3_128()
    with path.open("wb", buffering=0) as file:
        for data in (memoryview(len(text).to_bytes(8, "little") + text), *(_raw(tensors[name]) for name in names)):
            for at in range(0, len(data), _PIECE):
                go_on()
                piece = data[at : at + _PIECE]
                hashed.update(piece)
                while piece:
                    piece = piece[file.write(piece) :]
    return hashed.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def digest(path: Path, go_on: Callable[[], None] = lambda: None) -> str:
    """XXH3-128 of a file's bytes, in hexadecimal digits; `go_on` is called between pieces."""
    hashed = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            go_on()
            hashed.update(piece)
    return hashed.hexdigest()
