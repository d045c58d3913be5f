"""What a pass over text has decided of an upcycling, which its recipe alone does not determine.

It is recorded in the lineage, so that a proof needs no text.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moetool.errors import CheckpointError
from moetool.outside import fits

if TYPE_CHECKING:
    import torch

MAX_BYTES = 2**31  # of a packed tensor


@dataclass(frozen=True)
class Measured:
    """What an upcycling's lineage entry records under `measured`; all empty where no text was read.

    Attributes:
        texts: name -> SHA-256 of the tokens, of each text that was read.
        split: layer -> the packed shard of each unit of its dense FFN (`units.order_of`).
        contributions: layer -> packed codes (donors, units) of what each unit contributes (`units.least_used`).
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    split: Mapping[int, str] = field(default_factory=dict)
    contributions: Mapping[int, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For the lineage; {} where nothing was measured."""
        document = {
            "texts": dict(self.texts),
            "split": {str(layer): text for layer, text in self.split.items()},
            "contributions": {str(layer): text for layer, text in self.contributions.items()},
        }
        return {name: values for name, values in document.items() if values}

    @classmethod
    def from_json(cls, document: Any) -> Measured:
        """The inverse of `to_json`.

        Raises:
            CheckpointError: it is damaged.
        """
        if not isinstance(document, Mapping):
            raise CheckpointError(f"moetool.json: measured is {str(document)[:60]!r}, expected an object")
        for name, values in document.items():
            if name not in ("texts", "split", "contributions") or not fits(values, {"*": str}):
                raise CheckpointError(f"moetool.json: measured has {str(name)[:60]!r} that cannot be read")
        split, contributions = (_by_layer(document.get(name, {})) for name in ("split", "contributions"))
        return cls(dict(document.get("texts", {})), split, contributions)


def _by_layer(values: Mapping[str, str]) -> dict[int, str]:
    try:
        return {int(layer): text for layer, text in values.items()}
    except ValueError:
        raise CheckpointError("moetool.json: measured names a layer that is no number; it was edited") from None


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
