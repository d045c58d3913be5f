"""A loaded model and its calibration, for a command that changes its experts; and the loss of any model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from moetool.calibration.by_layer import LayeredModel, core_of
from moetool.calibration.gradient import expert_gradients
from moetool.calibration.options import Run
from moetool.calibration.store import cached
from moetool.calibration.sums import Calibration
from moetool.calibration.text_pass import calibrate, calibrate_dense, mean_losses
from moetool.checkpoint.model import free_models, load_model, pick_device
from moetool.data.make_tokens import tokenized
from moetool.data.text import TextSource
from moetool.data.tokens import TokenStream
from moetool.progress import Progress, silent
from moetool.routing.capture import has_routers
from moetool.routing.text_pass import Windows, window


def read_texts(
    named: Mapping[str, str], folder: Path, run: Run, progress: Progress, recorded: str = "", whole: bool = False
) -> dict[str, TokenStream]:
    """Texts as tokens of a model's own tokenizer, as far as `--max-tokens` needs them.

    Args:
        named: name -> where a text is.
        folder: of the model.
        run: how texts run.
        progress: called with the bytes read.
        recorded: see `tokenized`.
        whole: all tokens, as earlier versions recorded them.

    Raises:
        DataError: one cannot be read.
    """
    sources = {name: TextSource(path, run.text_field, run.document) for name, path in named.items()}
    first = None if whole else run.max_tokens
    return {name: tokenized(source, folder, progress, first, recorded) for name, source in sources.items()}


def load(folder: Path, run: Run) -> Any:
    """Load a model or, with `--stream`, open it to be read layer by layer; an earlier model's memory is freed first."""
    free_models()
    if run.stream:
        return LayeredModel(folder, run.dtype, pick_device(run.device))
    device = None if run.device_map else pick_device(run.device)
    return load_model(folder, run.dtype, device, run.device_map).eval()


def calibration_of(
    model: Any,
    folder: Path,
    texts: Mapping[str, TokenStream],
    run: Run,
    progress: Progress,
    moments: bool = False,
) -> Calibration:
    """The calibration of a model on texts, from the cache or new.

    Args:
        model: from `load`; either form gives the same.
        folder: its checkpoint.
        texts: as tokens.
        run: how they run.
        progress: of the pass.
        moments: whether to sum the FFNs' inputs too and, in a dense model, the contributions of units.

    Raises:
        CheckpointError: its experts, or the FFNs of a dense model, cannot be read.
        DataError: a text has no tokens, or one that the model does not know.
    """
    core, windows = core_of(model), windows_of(model, run)
    # A batch's size, the dtype and the device change sums by rounding, which may change a choice between near equals.
    settings = asdict(windows) | {"dtype": str(core.dtype), "device": core.device.type}
    settings |= {"moments": True} if moments else {}
    manifests = {name: text.manifest for name, text in texts.items()}

    def make() -> Calibration:
        if moments and not has_routers(core):
            return calibrate_dense(model, texts, windows, progress)
        return calibrate(model, texts, windows, moments, progress)

    return cached(folder, manifests, settings, make)


def gradients_of(model: Any, texts: Mapping[str, TokenStream], run: Run, progress: Progress) -> dict[int, Tensor]:
    """See `expert_gradients`, whose errors it raises."""
    return expert_gradients(model, texts, windows_of(model, run), progress)


def losses(model: Any, texts: Mapping[str, TokenStream], run: Run, progress: Progress = silent) -> dict[str, float]:
    """The loss of a model on each text, in nats per token."""
    return mean_losses(model, texts, windows_of(model, run), progress) if texts else {}


def windows_of(model: Any, run: Run) -> Windows:
    """How texts are read for a model.

    Raises:
        ConfigError: the model has fewer positions than `--seq-len`.
    """
    return Windows(window(core_of(model), run.seq_len), run.batch_size, run.max_tokens)
