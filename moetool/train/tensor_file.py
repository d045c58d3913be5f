"""Files of tensors in the safetensors format: written in any order, hashed while they are written, read in parts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from moetool.checkpoint.file_digest import PIECE, joined
from moetool.checkpoint.folder import naming
from moetool.train.shards import boxes, extent, placed, region

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
    torch.bool: "BOOL",
}
Entry = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor


class TensorFile:
    """A new file, byte for byte that of safetensors' `save_file`, which needs all tensors at once.

    As a context it closes the file.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry], go_on: Callable[[], None]) -> None:
        """Write the header.

        Args:
            path: is made, with its folder.
            entries: of the file, by name.
            go_on: called between pieces of 16 MiB; may raise.
        """
        self._path, self._entries, self._go_on = path, dict(entries), go_on
        order = list(_DTYPES)
        self._names = sorted(entries, key=lambda name: (order.index(entries[name][0]), name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        starts = [0]
        for name in self._names:
            dtype, shape = entries[name]
            starts.append(starts[-1] + torch.empty(shape, dtype=dtype, device="meta").nbytes)
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": starts[-2:]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        text = len(text).to_bytes(8, "little") + text
        self._starts = {name: len(text) + start for name, start in zip(self._names, starts, strict=False)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self._digests = {"": self._write(memoryview(text), 0)}
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one of its tensors, which is on the CPU."""
        if self._entries[name] != (tensor.dtype, tuple(tensor.shape)):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {self._entries[name]}")
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._digests[name] = self._write(data, self._starts[name])

    def _write(self, data: memoryview, at: int) -> bytes:
        hashed = xxhash.xxh3_128()
        with naming(self._path):
            for start in range(0, len(data), PIECE):
                self._go_on()
                piece = data[start : start + PIECE]
                hashed.update(piece)
                while piece:
                    written = os.pwrite(self._file, piece, at)
                    piece, at = piece[written:], at + written
        return hashed.digest()

    def finish(self) -> str:
        """Bring the file to the disk, once all of its tensors are written; returns its digest, see `file_digest`."""
        with naming(self._path):
            os.fsync(self._file)
        return joined(self._digests[name] for name in ("", *self._names))


@dataclass(frozen=True)
class Stored:
    """A tensor in an open file; nothing of it is read yet."""

    slice: Any
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, like: Tensor) -> Tensor:
        """This process's part, placed and sharded like a tensor of the same shape; only that part is read."""
        held = region(like)
        here = torch.empty(extent(held), dtype=self.dtype)
        for there, into in boxes(held):
            here[into] = self.slice[there or ...]
        return placed(here, like)


@contextmanager
def stored(paths: Iterable[Path]) -> Iterator[dict[str, Stored]]:
    """Open files of tensors; yields all that is in them, by name."""
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    with ExitStack() as stack:
        found: dict[str, Stored] = {}
        for path in paths:
            file: Any = stack.enter_context(safe_open(path, "pt"))
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(name)
                found[name] = Stored(part, dtypes[part.get_dtype()], tuple(part.get_shape()))
        yield found
