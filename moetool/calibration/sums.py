"""Sums over the tokens that reach each expert of a layer; two texts, or parts of one, merge by addition.

Shapes: E experts, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertSums:
    """Of one layer, float64. X_j are the tokens routed to expert j, f_j its output, g_j the weight of that output.

    Attributes:
        tokens: (), all tokens of the layer.
        routes_E: tokens in X_j.
        gate_E: sum of g_j over X_j.
        norm_E: sum of |f_j|, Euclidean.
        square_E: sum of |f_j|^2.
        weighted_E: sum of g_j |f_j|.
        largest_E: the largest entry of f_j by absolute value; of two texts, the larger.
    """

    tokens: Tensor
    routes_E: Tensor
    gate_E: Tensor
    norm_E: Tensor
    square_E: Tensor
    weighted_E: Tensor
    largest_E: Tensor

    @classmethod
    def zeros(cls, num_experts: int) -> ExpertSums:
        """Of no text."""
        zeros = [torch.zeros(num_experts, dtype=torch.float64) for _ in fields(cls)[1:]]
        return cls(torch.zeros((), dtype=torch.float64), *zeros)

    def __add__(self, other: ExpertSums) -> ExpertSums:
        """Of both texts together."""
        largest_E = torch.maximum(self.largest_E, other.largest_E)
        added = [getattr(self, field.name) + getattr(other, field.name) for field in fields(self)[:-1]]
        return ExpertSums(*[*added, largest_E])


@dataclass(frozen=True)
class Calibration:
    """What a pass over some text gives.

    Attributes:
        sums: layer -> of its experts, over all tokens but those held out.
        fitted: layer -> (T, D), what experts and router receive, of some of the tokens in `sums`.
        held_out: layer -> (T, D), the same of tokens that are in no sum; empty if all texts are too short.
    """

    sums: Mapping[int, ExpertSums]
    fitted: Mapping[int, Tensor]
    held_out: Mapping[int, Tensor]

    def to_tensors(self) -> dict[str, Tensor]:
        """As tensors by name."""
        found = {f"{layer}/{f.name}": getattr(one, f.name) for layer, one in self.sums.items() for f in fields(one)}
        for name in ("fitted", "held_out"):
            found |= {f"{layer}/{name}": rows_TD for layer, rows_TD in getattr(self, name).items()}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Calibration:
        """The inverse of `to_tensors`."""
        layers = sorted({int(name.partition("/")[0]) for name in tensors})
        names = [field.name for field in fields(ExpertSums)]
        sums = {layer: ExpertSums(*(tensors[f"{layer}/{name}"] for name in names)) for layer in layers}
        fitted, held_out = ({layer: tensors[f"{layer}/{name}"] for layer in layers} for name in ("fitted", "held_out"))
        return cls(sums, fitted, held_out)
