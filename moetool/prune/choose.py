"""The experts of each layer to keep.

Shapes: E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetool import registry
from moetool.calibration.experts import Layer
from moetool.calibration.sums import Calibration
from moetool.errors import ConfigError
from moetool.progress import Progress, silent
from moetool.prune.group import Group
from moetool.prune.reroute import Sample, by_reconstruction
from moetool.recipe import generator


@dataclass(frozen=True)
class Choice:
    """Which experts are kept, and how that was found.

    Attributes:
        score: the name of the score that was taken.
        errors: score -> the relative squared error of layers' outputs on held-out tokens, mean over layers.
        held_out: how many tokens that were; 0: the texts are too short, and the errors are of tokens in the scores.
        layers: of each layer `layer`, `kept` (experts, ascending), `error`, `mass_kept` (the share of all weights that
            went to them), `unused` (experts without a token), `super` (protected ones), `load` (share of the routes of
            each kept expert once the others are gone) and `scores` (of all experts); where experts are merged, also
            `groups` (see `Group`) and `merged_error` (as `error`, once they are).
    """

    score: str
    errors: Mapping[str, float]
    held_out: int
    layers: Sequence[Mapping[str, Any]]

    @property
    def kept(self) -> dict[int, list[int]]:
        """Layer -> experts, ascending."""
        return {row["layer"]: row["kept"] for row in self.layers}

    @property
    def groups(self) -> dict[int, list[Group]] | None:
        """Layer -> experts that become one; None where none are merged."""
        if not all("groups" in row for row in self.layers):
            return None
        return {row["layer"]: [Group(**one) for one in row["groups"]] for row in self.layers}


def super_experts(calibration: Calibration) -> dict[int, list[int]]:
    """Experts with an extreme entry in their output, which few models survive without (REAP's rule).

    Above both the 99.5 % quantile over all experts and layers and a tenth of the largest, in the first three quarters
    of the layers.
    """
    layers = sorted(calibration.sums)
    largest_LE = torch.stack([calibration.sums[layer].largest_E for layer in layers])
    bound = max(float(largest_LE.flatten().quantile(0.995)), float(largest_LE.max()) / 10)
    first = layers[: len(layers) * 3 // 4]
    return {layer: (calibration.sums[layer].largest_E > bound).nonzero()[:, 0].tolist() for layer in first}


@torch.inference_mode()
def choose(
    layers: Mapping[int, Layer],
    calibration: Calibration,
    score: str,
    keep: int,
    num_groups: int = 1,
    protect_super: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Choice:
    """Choose the experts that every layer keeps.

    Args:
        layers: of the model that was calibrated.
        calibration: of it.
        score: a name under `score` in the registry, `reconstruction`, `random`, or `auto`: the one that leaves the
            smallest error of the layers' outputs on held-out tokens.
        keep: experts per layer.
        num_groups: of experts next to each other; each keeps the same number.
        protect_super: whether `super_experts` are kept whatever their score.
        seed: of `random`.
        progress: reports layers.

    Raises:
        ConfigError: a score is not a number, or there are more super experts than are kept.
    """
    protected = super_experts(calibration) if protect_super else {}
    candidates = [*registry.names("score"), "reconstruction"] if score == "auto" else [score]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in candidates}
    for done, (number, layer) in enumerate(layers.items()):
        progress("comparing experts", done, len(layers))
        sums, held = calibration.sums[number], set(protected.get(number, ()))
        groups = router_groups(layer.num_experts, num_groups)
        if any(len(held & set(group)) > keep // num_groups for group in groups):
            raise ConfigError(
                f"layer {number} has {len(held)} super experts, more than --keep-experts {keep} lets it keep; keep"
                " more, or leave --protect-super out"
            )
        scores = {name: registry.load("score", name)(sums) for name in registry.names("score")}
        for name, score_E in scores.items():
            if not bool(torch.isfinite(score_E).all()):
                raise ConfigError(f"layer {number}: the score {name} is not a number; check the model's weights")
        apart_TD = calibration.held_out[number]
        sample = Sample.of(layer, apart_TD if len(apart_TD) else calibration.fitted[number])
        for name in candidates:
            if name == "reconstruction":
                fitted = Sample.of(layer, calibration.fitted[number])
                kept = by_reconstruction(fitted, groups, keep // num_groups, held)
            else:
                drawn_E = torch.rand(layer.num_experts, generator=generator(seed, "prune", number))
                kept = highest(scores.get(name, drawn_E), groups, keep // num_groups, held)
            error, load_M = sample.compare(kept)
            found[name].append(
                {
                    "layer": number,
                    "kept": kept,
                    "error": error,
                    "mass_kept": float(sums.gate_E[kept].sum() / sums.gate_E.sum().clamp(min=1e-30)),
                    "unused": (sums.routes_E == 0).nonzero()[:, 0].tolist(),
                    "super": sorted(held),
                    "load": load_M.tolist(),
                    "scores": {name: score_E.tolist() for name, score_E in scores.items()},
                }
            )
    progress("comparing experts", len(layers), len(layers))
    errors = {name: sum(row["error"] for row in rows) / len(rows) for name, rows in found.items()}
    taken = min(candidates, key=lambda name: errors[name])
    held_out = min(map(len, calibration.held_out.values()))
    return Choice(taken, errors, held_out, found[taken])


def router_groups(num_experts: int, num_groups: int) -> list[range]:
    """Experts next to each other, among which a router chooses."""
    size = num_experts // num_groups
    return [range(first, first + size) for first in range(0, num_experts, size)]


def highest(score_E: Tensor, groups: Sequence[Sequence[int]], per_group: int, held: set[int]) -> list[int]:
    """The experts with the highest scores, the same number of each group; of equal ones the first. Ascending."""
    order = sorted(range(len(score_E)), key=lambda expert: (expert not in held, -float(score_E[expert]), expert))
    return sorted(expert for group in groups for expert in [e for e in order if e in group][:per_group])
