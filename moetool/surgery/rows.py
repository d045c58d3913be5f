"""Rows of tensors on disk, as torch tensors."""

from __future__ import annotations

import torch

from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.reader import BlockFile

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def raw_bytes(block: torch.Tensor) -> memoryview:
    """A block's bytes as they lie on disk."""
    return memoryview(block.contiguous().view(torch.uint8).view(-1).numpy())  # type: ignore[arg-type]


def is_finite(numbers: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    Its least and its greatest number say so, as NaN is both; they are found 25 times as fast as each number is tested.
    """
    return not numbers.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(numbers))).all())


def read_rows(reader: BlockFile, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a tensor, shape (rows, row length); a vector has rows of one."""
    rows = info.shape[0] if info.shape else 1
    row_bytes = info.size // rows
    buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
    reader.read_into(info, start * row_bytes, raw_bytes(buffer))
    return buffer.view(TORCH_DTYPES[info.dtype]).view(stop - start, -1)


def gather_rows(reader: BlockFile, info: TensorInfo, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a matrix in any order."""
    row_bytes = info.size // info.shape[0]
    buffer = torch.empty((len(rows), row_bytes), dtype=torch.uint8)
    view = raw_bytes(buffer)
    for position, row in enumerate(rows.tolist()):
        reader.read_into(info, row * row_bytes, view[position * row_bytes : (position + 1) * row_bytes])
    return buffer.view(TORCH_DTYPES[info.dtype])


def select(block: torch.Tensor, axis: int, units: torch.Tensor) -> torch.Tensor:
    """Like `index_select`, which takes three times as long on columns."""
    return block.index_select(0, units) if axis == 0 else block.gather(1, units.expand(len(block), -1))


def replace(block: torch.Tensor, axis: int, units: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Like `index_copy`, which takes twice as long on columns."""
    return block.index_copy(0, units, values) if axis == 0 else block.scatter(1, units.expand(len(block), -1), values)
