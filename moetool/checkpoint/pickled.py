"""Find the tensors in a file of `torch.save` with torch's restricted unpickler, without loading any weights.

Such a file is a zip archive that stores each tensor's bytes as they are, beside a pickle that says which is
which. A pickle can run code; torch's unpickler with `weights_only` makes tensors and plain containers, and
refuses everything else.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moetool.checkpoint.header import ITEM_SIZE, TensorInfo
from moetool.errors import CheckpointError

MAX_PICKLE = 100_000_000  # bytes of the pickle alone, as of a safetensors header
# What torch says of a pickle, after its advice how to load the file nevertheless.
_REASON = re.compile(r"(?:WeightsUnpickler error: |trusted source\. )(?!\(2\))(.+?)(?:\. |$)")
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def read_pickle(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file of `torch.save`, by name.

    Raises:
        CheckpointError: it is not a zip archive of stored tensors, its pickle asks for anything but tensors, or a
            tensor lies outside the archive, overlaps another, or is not a plain one.
    """

    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: {what}; load it with transformers in a safe place, then save_pretrained")

    records = _records(path, bad)
    try:
        with FakeTensorMode():  # storages know where they lie in the file and hold nothing
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle fails in a dozen ways
        text = " ".join(str(error).split())
        said = _REASON.search(text)
        reason = (said[1] if said else text)[:200] or type(error).__name__
        raise bad(f"torch's restricted unpickler refuses it ({reason})") from None
    if not isinstance(found, dict):
        raise bad(f"it holds a {type(found).__name__}, not tensors by name")
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise bad(f"its entry {str(name)[:100]!r} is not a tensor")
        if tensor.layout != torch.strided or tensor.dtype not in _NAMES or not tensor.is_contiguous():
            raise bad(f"its tensor {name[:100]!r} is not a plain tensor")
        dtype, base = _NAMES[tensor.dtype], getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        start = tensor.storage_offset() * ITEM_SIZE[dtype]
        size = tensor.numel() * ITEM_SIZE[dtype]
        if base not in records or start + size > records[base]:
            raise bad(f"its tensor {name[:100]!r} lies outside the archive")
        tensors[name] = TensorInfo(name, dtype, tuple(tensor.shape), path.name, base + start, size)
    _check_overlaps(tensors, bad)
    return tensors


def _records(path: Path, bad: Callable[[str], CheckpointError]) -> dict[int, int]:
    """The start of each file in the archive -> its size in bytes."""
    records = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for entry in archive.infolist():
                name = entry.filename.rpartition("/")[2]
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise bad("its archive is compressed")
                if name == "data.pkl" and entry.file_size > MAX_PICKLE:
                    raise bad(f"its pickle has {entry.file_size} bytes, more than {MAX_PICKLE}")
                if name == "byteorder" and archive.read(entry) != b"little":
                    raise bad("its numbers are big-endian")
                file.seek(entry.header_offset)
                local = file.read(30)  # its last two fields: how long are the name and the extra field after it
                start = entry.header_offset + 30 + sum(int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
                records[start] = entry.file_size
            end = os.fstat(file.fileno()).st_size
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise bad(f"it is not an archive of torch 1.6 or newer ({reason})") from None
    if any(start + size > end for start, size in records.items()):
        raise bad("it ends before its tensors do")
    return records


def _check_overlaps(tensors: dict[str, TensorInfo], bad: Callable[[str], CheckpointError]) -> None:
    """Tied weights have the same bytes; other tensors have bytes of their own."""
    end, last = 0, (-1, -1)
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.size)):
        if info.size and (info.start, info.size) != last and info.start < end:
            raise bad(f"its tensor {info.name[:100]!r} shares some of its bytes with another")
        end, last = max(end, info.start + info.size), (info.start, info.size)
