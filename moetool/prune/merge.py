"""Merging removed experts into kept ones: the groups, and the resulting layer.

Shapes: T tokens, E experts, D hidden, F intermediate units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moetool.calibration.experts import Layer
from moetool.calibration.sums import Calibration
from moetool.progress import Progress, silent
from moetool.prune.align import Order
from moetool.prune.choose import Choice, router_groups
from moetool.prune.group import Group, group_up
from moetool.prune.reroute import Sample


@torch.inference_mode()
def merge(
    layers: Mapping[int, Layer],
    calibration: Calibration,
    choice: Choice,
    num_groups: int,
    order: Order,
    progress: Progress = silent,
) -> Choice:
    """A choice whose experts that are left out are merged into those that are kept.

    Args:
        layers: of the model that was calibrated.
        calibration: of it.
        choice: of its experts.
        num_groups: of experts next to each other, among which a router chooses; merges stay within one.
        order: of the experts' units.
        progress: reports layers.

    Returns:
        Its rows have `groups`, and `merged_error`: as `error`, of the layer with merged experts.
    """
    rows = []
    for done, row in enumerate(choice.layers):
        progress("merging experts", done, len(choice.layers))
        number = row["layer"]
        layer, apart_TD = layers[number], calibration.held_out[number]
        # The other ways to choose give no scores of their own.
        scores = row["scores"].get(choice.score, row["scores"]["weighted-ean"])
        groups, error = merge_layer(
            layer, row["kept"], scores, router_groups(layer.num_experts, num_groups), row["super"],
            calibration.fitted[number], apart_TD if len(apart_TD) else calibration.fitted[number],
            partial(order, number),
        )  # fmt: skip
        rows.append({**row, "groups": [asdict(group) for group in groups], "merged_error": error})
    progress("merging experts", len(rows), len(rows))
    return replace(choice, layers=rows)


def merge_layer(
    layer: Layer,
    kept: Sequence[int],
    saliency: Sequence[float],
    within: Sequence[range],
    apart: Sequence[int],
    fitted_TD: Tensor,
    held_out_TD: Tensor,
    order: Callable[[int, int], Tensor],
) -> tuple[list[Group], float]:
    """Group the experts of one layer, and measure the resulting layer.

    Args:
        layer: of the model.
        kept: experts, ascending.
        saliency: of all experts.
        within: the groups of experts among which the router chooses.
        apart: experts that nothing is merged into.
        fitted_TD: what experts and router receive, of the tokens on which experts are compared.
        held_out_TD: the same of those on which the result is measured.
        order: of the units of an expert beside another one.

    Returns:
        The groups of more than one expert, and |F - F_merged|^2 / |F|^2, the router choosing among the kept ones.
    """
    groups = group_up(distances(layer, fitted_TD), kept, saliency, within, apart)
    sample = Sample.of(layer, held_out_TD)
    outputs = {group.experts[0]: merged_output(layer, group, order, sample.hidden_TD) for group in groups}
    return groups, sample.with_outputs(outputs).compare(kept)[0]


def distances(layer: Layer, hidden_TD: Tensor) -> Tensor:
    """(E, E), how far apart the experts of a layer are: 1 - (similarity of outputs + similarity of logits) / 2.

    The similarity of outputs is the cosine of the mean outputs of two experts over all tokens, scaled to [0, 1]. That
    of logits is 1 - d / (largest d), d the distance between the two experts' router logits over all tokens, each of
    length 1.

    Args:
        layer: of the model.
        hidden_TD: what its experts and its router receive.
    """
    weight = layer.experts.gate_up_proj
    hidden_TD = hidden_TD.to(weight.device, weight.dtype)
    mean_ED = torch.stack([layer.output(expert, hidden_TD).float().mean(0) for expert in range(layer.num_experts)])
    direction_ED, profile_ET = normalize(mean_ED), normalize(layer.logits(hidden_TD).T)
    apart_EE = torch.cdist(profile_ET, profile_ET, compute_mode="donot_use_mm_for_euclid_dist")
    logits_EE = 1 - apart_EE / apart_EE.max().clamp_min(1e-30)
    outputs_EE = (1 + direction_ED @ direction_ED.T) / 2
    return (1 - (outputs_EE + logits_EE) / 2).cpu()


def merged_output(layer: Layer, group: Group, order: Callable[[int, int], Tensor], hidden_TD: Tensor) -> Tensor:
    """(T, D), the merged expert's output for some tokens."""
    centroid, *members = group.experts
    both, down = layer.experts.gate_up_proj, layer.experts.down_proj
    first_GD, first_DF = both[centroid].float(), down[centroid].float()  # G: gate and up, 2 F
    mean_GD, mean_DF = first_GD.clone(), first_DF.clone()
    for member, weight in zip(members, group.weights[1:], strict=True):
        order_F = order(centroid, member).to(both.device)
        order_G = torch.cat([order_F, order_F + len(order_F)])
        mean_GD += weight * (both[member][order_G].float() - first_GD)
        mean_DF += weight * (down[member][:, order_F].float() - first_DF)
    return layer.ffn(mean_GD.to(both.dtype), mean_DF.to(down.dtype), hidden_TD).float()
