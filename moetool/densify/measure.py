"""The experts of which a dense model is made, and their weights.

Shapes: E experts, T tokens, D hidden.
"""

from __future__ import annotations

import torch

from moetool.arch.moe_source import MoESource
from moetool.calibration.sums import Calibration
from moetool.densify.plan import LayerParts
from moetool.prune.choose import highest
from moetool.prune.scores import weighted_ean
from moetool.surgery.rows import read_rows


def parts_of(source: MoESource, calibration: Calibration, keep: int) -> dict[int, LayerParts]:
    """The experts with the largest sum of g_j |f_j|, each with its mean weight over the tokens, E[g_j].

    Args:
        source: the experts, as files.
        calibration: of the model.
        keep: experts of each layer.
    """
    shared = source.spec.shared
    averaged = shared is not None and shared.averaged
    averaged &= source.reader.config.get("shared_expert_combination_strategy", "average") == "average"
    found = {}
    for layer, sums in calibration.sums.items():
        own = source.shared(layer, "down")
        weight = 1.0 if own and own.num_elements else None
        half = 0.5 if averaged and weight else 1.0  # the mean of both is what such a layer gives
        gate = source.tensors.get(shared.gate.format(layer=layer)) if shared and shared.gate else None
        if weight and gate:
            row_1D = read_rows(source.reader, gate, 0, 1).double()
            weight = float(torch.sigmoid(calibration.fitted[layer].double() @ row_1D[0]).mean())
        experts = highest(weighted_ean(sums), [range(source.num_experts)], keep, set())
        weights_E = half * sums.gate_E / sums.tokens.clamp(min=1)
        weights = [float(weights_E[expert]) for expert in experts]
        found[layer] = LayerParts(experts, weights, half * weight if weight else None)
    return found
