"""What a pass over text has decided of an upcycling, which its recipe alone does not determine.

It is recorded in the lineage, so that a proof needs no text.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moetool.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MAX_BYTES = 2**31  # of a packed tensor


@dataclass(frozen=True, eq=False)
class Measured:
    """What an upcycling's lineage entry records under `measured`; all empty where no text was read.

    Attributes:
        split: layer -> the packed shard of each unit of its dense FFN (`units.order_of`).
        contributions: layer -> packed codes (donors, units) of what each unit contributes (`units.least_used`).
        asked: the texts' digests and how much of them was read, which the lineage has in the recipe.
    """

    split: Mapping[int, str] = field(default_factory=dict)
    contributions: Mapping[int, str] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For the lineage; {} where nothing was measured."""
        document = {
            name: {str(layer): text for layer, text in getattr(self, name).items()}
            for name in ("split", "contributions")
        }
        return {name: layers for name, layers in document.items() if layers}

    @classmethod
    def from_json(cls, document: Any, asked: Any) -> Measured:
        """The inverse of `to_json`.

        Args:
            document: what it gave.
            asked: of the attributes.

        Raises:
            CheckpointError: it is damaged.
        """
        if not isinstance(document, dict) or not isinstance(asked, dict):
            raise _damaged("what was")
        split, contributions = (_by_layer(document.get(key, {})) for key in ("split", "contributions"))
        if not all(isinstance(text, str) for text in (*split.values(), *contributions.values())):
            raise _damaged("units")
        return cls(split, contributions, asked)


def _by_layer(document: Any) -> dict[int, Any]:
    if not isinstance(document, dict) or not all(key.isdecimal() for key in document):
        raise _damaged("layers")
    return {int(key): value for key, value in document.items()}


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(f"moetool.json: {what} measured on text cannot be read; it was edited")


NOTHING = Measured()


def packed(tensor: torch.Tensor) -> str:
    """The numbers of a tensor as text: their bytes, compressed, in base64; dtype and shape are left out."""
    import torch

    return base64.b64encode(zlib.compress(tensor.contiguous().view(torch.uint8).numpy().tobytes(), 9)).decode()


def unpacked(text: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `packed`.

    Raises:
        CheckpointError: it does not hold so many numbers.
    """
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
        raise _damaged(f"a {list(shape)} of numbers") from None
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
