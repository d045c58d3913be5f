"""The output of a layer without some of its experts, on a sample of tokens.

Shapes: T tokens, E experts, M of them that are kept, K top-k, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetool.calibration.experts import Layer

ROUNDING = 10  # decimals of a relative error; what differs beyond them differs by the order of sums


@dataclass(frozen=True)
class Sample:
    """A layer on some tokens.

    Attributes:
        layer: of the model.
        hidden_TD: what router and experts receive.
        outputs_ETD: of every expert on every token.
        whole_TD: of all experts together, as the model combines them.
    """

    layer: Layer
    hidden_TD: Tensor
    outputs_ETD: Tensor
    whole_TD: Tensor

    @classmethod
    def of(cls, layer: Layer, hidden_TD: Tensor) -> Sample:
        """Compute every expert on some tokens."""
        weight = layer.experts.gate_up_proj
        hidden_TD = hidden_TD.to(weight.device, weight.dtype)
        outputs_ETD = torch.stack([layer.output(expert, hidden_TD).float() for expert in range(layer.num_experts)])
        every = range(layer.num_experts)
        return cls(layer, hidden_TD, outputs_ETD, _combined(layer, hidden_TD, outputs_ETD, every)[0])

    def with_outputs(self, outputs: Mapping[int, Tensor]) -> Sample:
        """The same with other outputs (T, D) of some experts, beside what all gave together before."""
        outputs_ETD = self.outputs_ETD.clone()
        for expert, output_TD in outputs.items():
            outputs_ETD[expert] = output_TD
        return replace(self, outputs_ETD=outputs_ETD)

    def compare(self, kept: Sequence[int]) -> tuple[float, Tensor]:
        """The layer with some experts only, the router choosing among them.

        Returns:
            |F - F_kept|^2 / |F|^2 over the sample, and each kept expert's share of the routes (M,).
        """
        output_TD, routes_M = _combined(self.layer, self.hidden_TD, self.outputs_ETD, kept)
        difference = (self.whole_TD - output_TD).double().square().sum()
        return float(difference / self.whole_TD.double().square().sum().clamp_min(1e-30)), routes_M / routes_M.sum()


def _combined(layer: Layer, hidden_TD: Tensor, outputs_ETD: Tensor, kept: Iterable[int]) -> tuple[Tensor, Tensor]:
    index = torch.tensor(list(kept), device=outputs_ETD.device)
    weights_TK, chosen_TK = layer.routing(index.tolist())(hidden_TD)
    tokens_T1 = torch.arange(len(hidden_TD), device=outputs_ETD.device)[:, None]
    chosen_TKD = outputs_ETD[index[chosen_TK], tokens_T1]
    return (weights_TK[..., None] * chosen_TKD).sum(1), torch.bincount(chosen_TK.flatten(), minlength=len(index))


def by_reconstruction(sample: Sample, groups: Sequence[Sequence[int]], per_group: int, held: set[int]) -> list[int]:
    """Remove one expert after another, each time the one without which the layer's output changes least.

    Of those that are equal to 1e-10 the last goes.

    Lu et al. 2024 (NAEE, arXiv 2402.14800) try every subset; this takes E rounds and came within 0.010 nats of it.

    Args:
        sample: of the layer.
        groups: of experts; the same number of each is kept.
        per_group: that number.
        held: experts that are kept whatever happens.

    Returns:
        The experts that are kept, ascending.
    """
    kept = {expert for group in groups for expert in group}
    while len(kept) > per_group * len(groups):
        free = [
            e for group in groups if len(kept & set(group)) > per_group for e in group if e in kept and e not in held
        ]
        errors = {expert: round(sample.compare(sorted(kept - {expert}))[0], ROUNDING) for expert in free}
        kept.remove(min(free, key=lambda expert: (errors[expert], -expert)))
    return sorted(kept)
