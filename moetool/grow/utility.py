"""The experts to copy: those that contribute most on texts.

Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetool.calibration.measure import calibration_of, gradients_of
from moetool.calibration.options import CalibrationOptions
from moetool.data.tokens import TokenStream
from moetool.errors import ConfigError
from moetool.grow.recipe import MOST
from moetool.progress import Progress, silent


def utilities(
    name: str,
    model: Any,
    folder: Path,
    texts: Mapping[str, TokenStream],
    run: CalibrationOptions,
    progress: Progress = silent,
) -> dict[int, Tensor]:
    """Layer -> the utility of each expert (E,): `frequency` its tokens, `gate` the sum of its weights, or `gradient`.

    Args:
        name: of the utility; see `expert_gradients` for the last.
        model: that is grown.
        folder: of it.
        texts: on which it is measured.
        run: how.
        progress: reports tokens.

    Raises:
        ConfigError: a utility is not a number.
        CheckpointError: the experts cannot be read.
        DataError: a text is too short, or not of the model's vocabulary.
    """
    if name == "gradient":
        found = gradients_of(model, texts, run, progress)
    else:
        sums = calibration_of(model, folder, texts, run, progress).sums
        found = {layer: one.routes_E if name == "frequency" else one.gate_E for layer, one in sums.items()}
    for layer, utility_E in found.items():
        if not bool(torch.isfinite(utility_E).all()):
            raise ConfigError(f"layer {layer}: the utility {name} is not a number; check the model's weights")
    return found


def most_useful(utility_E: Tensor, num_experts: int) -> list[int]:
    """The expert before of each expert after: all once, and then the one with the highest utility up to MOST times,
    the next one, and so on (the greedy rule of arXiv 2604.19835); of equal ones the first.

    Args:
        utility_E: of the experts before.
        num_experts: after; at most 1 + MOST times as many.
    """
    E = len(utility_E)
    order = sorted(range(E), key=lambda expert: (-float(utility_E[expert]), expert))
    again = [expert for expert in order for _ in range(MOST)]
    return [*range(E), *sorted(again[: num_experts - E])]
