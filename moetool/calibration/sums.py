"""Sums over tokens of a text; two texts, or parts of one, merge by addition.

Shapes: E experts, T tokens, D hidden, F intermediate units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Self

import torch
from torch import Tensor

ROWS = 64  # tokens whose units are summed at a time


@dataclass(frozen=True)
class ExpertSums:
    """Sums of the experts of one layer, float64.

    X_j are the tokens routed to expert j, f_j is its output, and g_j the weight of that output.

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
        """The sums of no text."""
        zeros = [torch.zeros(num_experts, dtype=torch.float64) for _ in fields(cls)[1:]]
        return cls(torch.zeros((), dtype=torch.float64), *zeros)

    def __add__(self, other: ExpertSums) -> ExpertSums:
        """The sums of both texts together."""
        largest_E = torch.maximum(self.largest_E, other.largest_E)
        added = [getattr(self, field.name) + getattr(other, field.name) for field in fields(self)[:-1]]
        return ExpertSums(*[*added, largest_E])


@dataclass(frozen=True)
class InputSums:
    """Sums of x, the input of a layer's FFN and router, from which moments of any router's logits follow.

    Attributes:
        tokens: (), float64.
        sum_D: sum of x, float64.
        second_DD: sum of x x^T, float32: 64 MB at 4096.
    """

    tokens: Tensor
    sum_D: Tensor
    second_DD: Tensor

    @classmethod
    def of(cls, hidden_TD: Tensor) -> InputSums:
        """The sums of some tokens."""
        hidden_TD = hidden_TD.float()
        tokens = torch.tensor(float(len(hidden_TD)), dtype=torch.float64)
        return cls(tokens, hidden_TD.sum(0).double().cpu(), (hidden_TD.T @ hidden_TD).cpu())

    def __add__(self, other: InputSums) -> InputSums:
        """The sums of both texts together."""
        return InputSums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class UnitSums:
    """Sums of the units of one dense layer's FFN, h = act(gate x) * up x, float64.

    A unit's mean contribution to the FFN's output is the mean of |h_i| times the norm of its column of `down`.

    Attributes:
        absolute_F: sum of |h_i|.
        square_F: sum of h_i^2.
    """

    absolute_F: Tensor
    square_F: Tensor

    @classmethod
    def of(cls, units_TF: Tensor) -> UnitSums:
        """The sums of some tokens."""
        zeros = torch.zeros(units_TF.shape[1], dtype=torch.float64, device=units_TF.device)
        absolute_F, square_F = zeros, zeros.clone()
        # Of a processor, they stay in its cache: a tenth of the time. A GPU would wait for its next work.
        for rows_TF in units_TF.split(ROWS if units_TF.device.type == "cpu" else max(1, len(units_TF))):
            size_TF = rows_TF.float().abs()
            absolute_F += size_TF.sum(0).double()
            square_F += size_TF.square_().sum(0).double()
        return cls(absolute_F.cpu(), square_F.cpu())

    def __add__(self, other: UnitSums) -> UnitSums:
        """The sums of both texts together."""
        return UnitSums(self.absolute_F + other.absolute_F, self.square_F + other.square_F)


@dataclass(frozen=True)
class Calibration:
    """The result of a pass over a text.

    Attributes:
        sums: layer -> sums of its experts, over all tokens but those held out; empty for a dense model.
        fitted: layer -> (T, D), inputs of its FFN (experts and router), for some of the tokens in `sums`.
        held_out: layer -> (T, D), the same for tokens that are in no sum; empty if all texts are too short.
        inputs: layer -> sums of its FFN's inputs, over the tokens in `sums`; empty unless requested.
        units: layer -> sums of the units of its dense FFN, over the same tokens; empty unless requested.
        first: layer -> the same sums over those of these tokens that lie in the first half of each text.
    """

    sums: Mapping[int, ExpertSums]
    fitted: Mapping[int, Tensor]
    held_out: Mapping[int, Tensor]
    inputs: Mapping[int, InputSums] = field(default_factory=dict)
    units: Mapping[int, UnitSums] = field(default_factory=dict)
    first: Mapping[int, UnitSums] = field(default_factory=dict)

    def to_tensors(self) -> dict[str, Tensor]:
        """The calibration as tensors by name."""
        found = {f"{layer}/{name}": rows_TD for name in _SAMPLES for layer, rows_TD in getattr(self, name).items()}
        for name in _SUMS:
            for layer, one in getattr(self, name).items():
                found |= {f"{layer}/{name}/{part.name}": getattr(one, part.name) for part in fields(one)}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `to_tensors`."""
        layers = sorted({int(name.partition("/")[0]) for name in tensors})
        found = {name: {layer: tensors[f"{layer}/{name}"] for layer in layers} for name in _SAMPLES}
        sums = {
            name: {
                layer: kind(**{part.name: tensors[f"{layer}/{name}/{part.name}"] for part in fields(kind)})
                for layer in layers
                if f"{layer}/{name}/{fields(kind)[0].name}" in tensors
            }
            for name, kind in _SUMS.items()
        }
        return cls(**found, **sums)  # type: ignore[arg-type]


_SAMPLES = ("fitted", "held_out")
_SUMS = {"sums": ExpertSums, "inputs": InputSums, "units": UnitSums, "first": UnitSums}
