"""The decisions of a pass over text, which an upcycling's recipe alone does not determine.

It is recorded in the lineage, so that a proof needs no text.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from moetool.errors import CheckpointError
from moetool.outside import fits

if TYPE_CHECKING:
    import torch

MAX_BYTES = 2**31  # of a packed tensor


@dataclass(frozen=True, eq=False)
class RouterRows:
    """How a layer's router is made of random rows R and a few directions: row e is factor_G[e] R[e] + mix_GV[e] V.

    Random rows come from the recipe's seed, so that little has to be recorded. G groups of experts have a row each.

    Attributes:
        directions_VD: bfloat16.
        factor_G: float64.
        mix_GV: float64.
        bias_G: float32, the selection bias; None where the family has none or it stays 0.
    """

    directions_VD: torch.Tensor
    factor_G: torch.Tensor
    mix_GV: torch.Tensor
    bias_G: torch.Tensor | None = None

    def rows(self, drawn_GD: torch.Tensor) -> torch.Tensor:
        """(G, D) in float32; each product and sum is rounded by itself in float64, so any machine gets the same."""
        made_GD = drawn_GD.double() * self.factor_G[:, None]
        for mix_G, direction_D in zip(self.mix_GV.T, self.directions_VD.double(), strict=True):
            product_GD = mix_G[:, None] * direction_D
            made_GD = made_GD + product_GD
        return made_GD.float()

    def to_json(self) -> dict[str, Any]:
        """For the lineage."""
        return {
            "groups": len(self.factor_G),
            "hidden_size": self.directions_VD.shape[1],
            "directions": packed(self.directions_VD),
            "factors": self.factor_G.tolist(),
            "mix": self.mix_GV.tolist(),
            "bias": None if self.bias_G is None else self.bias_G.tolist(),
        }

    @classmethod
    def from_json(cls, document: Any) -> RouterRows:
        """The inverse of `to_json`.

        Raises:
            CheckpointError: it is damaged.
        """
        import torch

        numbers = [float]
        shape = {"groups": int, "hidden_size": int, "directions": str, "factors": numbers, "mix": [numbers]}
        bias = document.get("bias") if isinstance(document, Mapping) else None
        if not fits(document, shape) or not (bias is None or fits(bias, numbers)):
            raise _damaged("a router")
        groups, hidden = document["groups"], document["hidden_size"]
        lengths = {len(row) for row in document["mix"]}
        if not (len(document["factors"]) == len(document["mix"]) == groups and len(lengths) == 1):
            raise _damaged("a router")
        if min(groups, hidden) < 1 or (bias is not None and len(bias) != groups):
            raise _damaged("a router")
        directions_VD = unpacked(document["directions"], torch.bfloat16, (lengths.pop(), hidden))
        factor_G, mix_GV = (torch.tensor(document[key], dtype=torch.float64) for key in ("factors", "mix"))
        return cls(directions_VD, factor_G, mix_GV, None if bias is None else torch.tensor(bias, dtype=torch.float32))


@dataclass(frozen=True, eq=False)
class Measured:
    """The record `measured` of an upcycling's lineage entry; all empty if no text was read.

    Attributes:
        split: layer -> the packed part of each unit of its dense FFN (`units.order_of`).
        contributions: layer -> packed codes (donors, units) of what each unit contributes (`units.least_used`).
        routers: layer -> how its router is made.
        loads: layer -> text -> the share of the layer's routes that each expert gets of held-out tokens, as predicted.
        halves: layer -> text -> the largest difference between an expert's loads in the two halves of those tokens.
        texts_read: the texts' digests and how much of them was read, which the lineage has in the recipe.
        units_apart: by what share the units' contributions differ in the two halves of the texts, in the layer in which
            they differ most. It determines nothing, so the lineage does not have it.
    """

    split: Mapping[int, str] = field(default_factory=dict)
    contributions: Mapping[int, str] = field(default_factory=dict)
    routers: Mapping[int, RouterRows] = field(default_factory=dict)
    loads: Mapping[int, Mapping[str, list[float]]] = field(default_factory=dict)
    halves: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    texts_read: Mapping[str, Any] = field(default_factory=dict)
    units_apart: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """For the lineage; {} where nothing was measured."""
        document: dict[str, dict[str, Any]] = {
            "split": {str(layer): text for layer, text in self.split.items()},
            "contributions": {str(layer): text for layer, text in self.contributions.items()},
            "routers": {str(layer): rows.to_json() for layer, rows in self.routers.items()},
            "loads": {str(layer): dict(loads) for layer, loads in self.loads.items()},
            "halves": {str(layer): dict(halves) for layer, halves in self.halves.items()},
        }
        return {name: layers for name, layers in document.items() if layers}

    @classmethod
    def from_json(cls, document: Any, texts_read: Any) -> Measured:
        """The inverse of `to_json`.

        Args:
            document: what it gave.
            texts_read: of the attributes.

        Raises:
            CheckpointError: it is damaged.
        """
        if not isinstance(document, dict) or not isinstance(texts_read, dict):
            raise _damaged("what was")
        split, contributions, routers, loads, halves = (
            _by_layer(document.get(field.name, {})) for field in fields(cls)[:-2]
        )
        if not all(isinstance(text, str) for text in (*split.values(), *contributions.values())):
            raise _damaged("units")
        if not all(isinstance(one, dict) and all(fits(row, [float]) for row in one.values()) for one in loads.values()):
            raise _damaged("loads")
        if not all(fits(one, {"*": float}) for one in halves.values()):
            raise _damaged("loads")
        read = {layer: RouterRows.from_json(rows) for layer, rows in routers.items()}
        return cls(split, contributions, read, loads, halves, texts_read)

    def check_routers(self, groups: int, hidden: int) -> None:
        """Check that routers are of a recipe.

        Args:
            groups: of experts.
            hidden: size.

        Raises:
            CheckpointError: they are not.
        """
        if any((len(rows.factor_G), rows.directions_VD.shape[1]) != (groups, hidden) for rows in self.routers.values()):
            raise _damaged("a router")


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
