"""What is measured of a model for its pruning: the calibration, the choice of experts, losses."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moetool.calibration.experts import layers_with_experts
from moetool.calibration.store import kept
from moetool.calibration.text_pass import calibrate, mean_loss
from moetool.checkpoint.model import load_model, pick_device
from moetool.data.tokens import TokenStream
from moetool.errors import ConfigError
from moetool.progress import Progress
from moetool.prune.choose import Choice, choose
from moetool.prune.recipe import PruneOptions

SEQ_LEN = 2048


def measure(
    folder: Path,
    texts: Mapping[str, TokenStream],
    validation: Mapping[str, TokenStream],
    asked: PruneOptions,
    num_groups: int,
    progress: Progress,
) -> tuple[Choice, dict[str, float]]:
    """Load a model, calibrate it, choose its experts, and measure its loss.

    Args:
        folder: the checkpoint.
        texts: that the experts are scored on.
        validation: that the loss is measured on.
        asked: how.
        num_groups: of experts.
        progress: reports tokens and layers.

    Returns:
        The choice, and the loss on each validation text.
    """
    model = _load(folder, asked)
    run = {"seq_len": _seq_len(model, asked), "batch_size": asked.batch_size, "max_tokens": asked.max_tokens}
    # A batch's size and the dtype change sums by rounding, which may change a choice between near equals.
    settings = run | {"dtype": str(model.dtype), "device": model.device.type}
    calibration = kept(
        folder,
        {name: text.manifest for name, text in texts.items()},
        settings,
        lambda: calibrate(model, texts, **run, progress=progress),
    )
    choice = choose(
        layers_with_experts(model), calibration, asked.score, asked.keep_experts, num_groups, asked.protect_super,
        asked.seed, progress,
    )  # fmt: skip
    losses = {name: mean_loss(model, text, name, **run) for name, text in validation.items()}
    return choice, losses


def losses_of(folder: Path, validation: Mapping[str, TokenStream], asked: PruneOptions) -> dict[str, float]:
    """The loss of a model on each validation text."""
    if not validation:
        return {}
    gc.collect()  # the model before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model = _load(folder, asked)
    run = {"seq_len": _seq_len(model, asked), "batch_size": asked.batch_size, "max_tokens": asked.max_tokens}
    return {name: mean_loss(model, text, name, **run) for name, text in validation.items()}


def _load(folder: Path, asked: PruneOptions) -> Any:
    device = None if asked.device_map else pick_device(asked.device)
    return load_model(folder, asked.dtype, device, asked.device_map).eval()


def _seq_len(model: Any, asked: PruneOptions) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or SEQ_LEN
    if asked.seq_len and asked.seq_len > positions:
        raise ConfigError(f"--seq-len {asked.seq_len}: the model has only {positions} positions; give at most that")
    return asked.seq_len or min(SEQ_LEN, int(positions))
