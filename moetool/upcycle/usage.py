"""The contributions of dense FFNs' units on texts, and their use for an upcycling.

Shapes: F units, N of them that are dealt out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moetool.calibration.ffn import FFN, dense_ffns
from moetool.calibration.measure import calibration_of, load
from moetool.calibration.options import Run
from moetool.calibration.sums import UnitSums
from moetool.data.tokens import TokenStream
from moetool.errors import CheckpointError, ConfigError
from moetool.measured import Measured, packed
from moetool.progress import Progress
from moetool.units import contribution_codes, part_dtype
from moetool.upcycle.plan import Upcycling


def measure_units(
    upcycling: Upcycling,
    folders: Sequence[Path],
    texts: Mapping[str, TokenStream],
    run: Run,
    progress: Progress,
) -> Measured:
    """Run every dense model on all texts, and decide the split and the redrawn units.

    Args:
        upcycling: planned without.
        folders: DENSE, and the other donors. Their units correspond, because they come from one model, so that
            contributions add up, and one split holds for all of them.
        texts: as tokens.
        run: how they run.
        progress: of each pass.

    Returns:
        What the upcycling has measured already, and its units.

    Raises:
        ConfigError: a model is a multimodal one, whose text model transformers does not run by itself.
        CheckpointError: transformers cannot run a model in layers, or builds its FFNs in a way that is not known,
            or what its units give is not finite.
        DataError: a text has no tokens, or one that the models do not know.
    """
    recipe, layers = upcycling.recipe, upcycling.moe_layers
    if outer := upcycling.dense["text_model_of"]:
        raise ConfigError(
            f"--calibrate runs {folders[0]} as it is, but it is a {outer}; take its text model out first: moetool"
            f" convert {folders[0]} TEXT_MODEL"
        )
    contributions: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    apart = 0.0
    for folder in folders:
        model = load(folder, run)
        found = calibration_of(model, folder, texts, run, progress, moments=True)
        ffns = dense_ffns(model.core)
        for done, layer in enumerate(layers):
            progress("reading units", done, len(layers))
            model.load(layer)
            tokens, sums = float(found.inputs[layer].tokens), found.units[layer]
            contributions[layer].append(contribution(ffns[layer], sums, tokens))
            apart = max(apart, difference(ffns[layer], sums, found.first[layer]))
            if not contributions[layer][-1].isfinite().all():
                raise CheckpointError(
                    f"{folder}: layer {layer}: the outputs of its units on the texts are not finite; look for NaN or"
                    " overflow in its weights, or leave out --split and --drop-units"
                )
        progress("reading units", len(layers), len(layers))
        model.free()
        del model
    split, use = {}, {}
    for done, layer in enumerate(layers):
        progress("splitting FFNs", done, len(layers))
        if recipe.split == "activation":
            part_F = by_activation(
                sum(contributions[layer][1:], contributions[layer][0]), recipe.shared_parts, recipe.granularity
            )
            split[layer] = packed(part_F.to(part_dtype(recipe.granularity)))
        if recipe.drop_units == "least-used":
            use[layer] = packed(torch.stack([contribution_codes(one_F) for one_F in contributions[layer]]))
    progress("splitting FFNs", len(layers), len(layers))
    return replace(upcycling.measured, split=split, contributions=use, units_apart=apart)


def difference(ffn: FFN, sums: UnitSums, first: UnitSums) -> float:
    """Which share of the units' contributions lies in other units in the first half of the texts than in the second.

    Args:
        ffn: of a layer.
        sums: over whole texts.
        first: over their first halves.

    Returns:
        The total variation distance of the two halves' shares: 0 for the same, 1 where a half has none.
    """
    both = [
        contribution(ffn, UnitSums(absolute_F, absolute_F), 1.0)
        for absolute_F in (first.absolute_F, sums.absolute_F - first.absolute_F)
    ]
    if not all(float(one_F.sum()) > 0 for one_F in both):
        return 1.0
    shares = [one_F / one_F.sum() for one_F in both]
    return float((shares[0] - shares[1]).abs().sum()) / 2


def contribution(ffn: FFN, sums: UnitSums, tokens: float) -> Tensor:
    """(F,) float64: the mean of |h| of each unit, times the norm of its column of `down`."""
    norm_F: Tensor = ffn.down.weight.detach().double().norm(dim=0).cpu()
    return sums.absolute_F / tokens * norm_F


def by_activation(contribution_F: Tensor, shared: int, parts: int) -> Tensor:
    """The part of each unit, int64 (F,): the first parts have the largest contributions, the others equal ones.

    Units are dealt in the order of their contribution, to one part after the other, there and back, so that no part
    always gets the larger one. MoEBERT (Zuo et al. 2022, arXiv 2204.07675, section 3) deals in one direction. Any
    split starts exactly as the dense model, because the sum over parts does not depend on the order of units.

    Args:
        contribution_F: of each unit.
        shared: the first so many parts are shared by all tokens.
        parts: how many there are; divides F.
    """
    F, size, routed = len(contribution_F), len(contribution_F) // parts, parts - shared
    ranked_F = contribution_F.sort(descending=True, stable=True).indices
    part_F = torch.full((F,), -1)
    part_F[ranked_F[: shared * size].sort().values] = torch.arange(shared * size) // size
    place_N = torch.arange(F - shared * size)
    lap_N, place_N = place_N // routed, place_N % routed
    part_F[ranked_F[shared * size :]] = shared + torch.where(lap_N % 2 == 0, place_N, routed - 1 - place_N)
    return part_F
