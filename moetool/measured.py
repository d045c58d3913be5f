"""What a pass over text has decided of an upcycling, which its recipe alone does not determine.

It is recorded in the lineage, so that a proof needs no text.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moetool.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MAX_BYTES = 2**31  # of a packed tensor


@dataclass(frozen=True)
class Measured:
    """What an upcycling's lineage entry records under `measured`; all empty where no text was read."""

    def to_json(self) -> dict[str, Any]:
        """For the lineage; {} where nothing was measured."""
        return {}

    @classmethod
    def from_json(cls, document: Any) -> Measured:
        """The inverse of `to_json`.

        Raises:
            CheckpointError: it is damaged.
        """
        if not isinstance(document, Mapping):
            raise CheckpointError(f"moetool.json: measured is {str(document)[:60]!r}, expected an object")
        return cls()


NOTHING = Measured()


def packed(tensor: torch.Tensor) -> str:
    """The numbers of a tensor as text: their bytes, compressed, in base64; dtype and shape are left out."""
    return base64.b64encode(zlib.compress(tensor.contiguous().numpy().tobytes(), 9)).decode()


def unpacked(text: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `packed`.

    Raises:
        CheckpointError: it does not hold so many numbers.
    """
    import math

    import torch

    size = math.prod(shape) * dtype.itemsize
    try:
        if not isinstance(text, str) or size > MAX_BYTES:
            raise ValueError
        reading = zlib.decompressobj()
        raw = reading.decompress(base64.b64decode(text, validate=True), size + 1)
        if len(raw) != size:
            raise ValueError
    except (ValueError, binascii.Error, zlib.error):
        raise CheckpointError(f"moetool.json: measured does not hold {list(shape)} numbers; it was edited") from None
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
