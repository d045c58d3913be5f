"""The changes of a conversion, as options of `moetool convert`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moetool.errors import CheckpointError
from moetool.option import dtype_option, option, unpickle_option
from moetool.values import FLOAT_DTYPES, short_dtype


@dataclass(frozen=True)
class ConvertRecipe:
    """The changes of a conversion; with the sources, they determine every byte.

    Attributes:
        dtype: as safetensors names it.
        adapter: whether the last source is an adapter that is merged.
    """

    dtype: str = dtype_option("Dtype of the written weights; auto keeps the source's.", make=short_dtype)
    layout: Literal["auto", "per-expert", "fused"] = option(
        "One tensor per expert, or one for all experts of a layer; auto keeps the source's.", "auto"
    )
    unpickle: bool = unpickle_option()
    adapter: bool = False

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ConvertRecipe:
        """The inverse of `asdict`.

        Raises:
            CheckpointError: a field is missing, unknown, or has an invalid value.
        """
        flags = [values.get(name) for name in ("unpickle", "adapter")]
        dtypes, layouts = ("auto", *FLOAT_DTYPES), ("auto", "per-expert", "fused")
        known = values.get("dtype") in dtypes and values.get("layout") in layouts
        if set(values) != set(asdict(cls())) or not known or not all(type(flag) is bool for flag in flags):
            raise CheckpointError(f"moetool.json: the recipe cannot be read ({str(dict(values))[:100]})")
        return cls(**values)
