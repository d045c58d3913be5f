"""A model under training, saved as the stock checkpoint that its source was."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moetool.checkpoint.folder import UNFINISHED, create, naming, sync_folder, write_file
from moetool.checkpoint.reader import CheckpointReader
from moetool.checkpoint.writer import COMPANIONS
from moetool.errors import ConfigError
from moetool.outside import read_json
from moetool.recipe import LINEAGE, extend_lineage
from moetool.train.selection import is_selection_bias

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def source_dtype(source: Path) -> str:
    """The dtype of most of a checkpoint's weights: float32, bfloat16 or float16.

    Raises:
        CheckpointError: it is not a readable safetensors checkpoint.
    """
    elements: Counter[str] = Counter()
    for info in CheckpointReader(source).tensors.values():
        elements[info.dtype] += info.num_elements
    return _DTYPES.get(elements.most_common(1)[0][0], "float32") if elements else "float32"


def save_checkpoint(
    model: Any,
    state: Mapping[str, Tensor],
    buffers: Collection[str],
    source: Path,
    folder: Path,
    dtype: str,
    entry: Mapping[str, Any],
) -> None:
    """Write a stock checkpoint: weights in the family's own layout, everything else as in the source.

    Args:
        model: of transformers, not wrapped; its tensors are not looked at, and may be in use by training.
        state: its state_dict, whole, on the CPU; tied weights are one tensor.
        buffers: names of those in it that are no parameters.
        source: the checkpoint that the training began with; its config.json is carried over word for
            word but for the dtype and `output_router_logits`, so that keys that only older readers
            know survive.
        folder: is made.
        dtype: of floating-point parameters on disk; buffers keep theirs, a selection bias is float32.
        entry: added to the lineage in moetool.json.

    Raises:
        ConfigError: a weight is not finite, or not in that dtype: such a model is never saved.
    """
    # Keyed by tensor: tied weights stay one, which transformers then writes once.
    cast: dict[int, Tensor] = {id(state[name]): state[name] for name in buffers}
    for name, tensor in state.items():
        if id(tensor) in cast:
            continue
        # A selection bias moves by steps that are below bf16's precision.
        cast[id(tensor)] = tensor.to(torch.float32 if is_selection_bias(name) else getattr(torch, dtype))
        if not bool(torch.isfinite(cast[id(tensor)]).all()):
            too_large = bool(torch.isfinite(tensor).all())
            advice = "--save-dtype float32 or bfloat16" if too_large else "lower --lr or --grad-clip"
            raise ConfigError(f"{name} is not finite in {dtype}, so step {entry['steps']} is not saved; {advice}")
    state = {name: cast[id(tensor)] for name, tensor in state.items()}
    model.save_pretrained(folder, state_dict=state, max_shard_size="5GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = read_json(source / "config.json")
    config.pop("output_router_logits", None)
    config |= {key: dtype for key in ("dtype", "torch_dtype") if key == "dtype" or key in config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / LINEAGE).write_bytes(extend_lineage(source, dict(entry)))


def publish(step_folder: Path, out: Path, summary: Mapping[str, Any]) -> None:
    """Copy a step's checkpoint to the top of the run's folder; config.json last, which makes it loadable."""
    files = sorted(path for path in step_folder.iterdir() if path.is_file() and path.name != "config.json")
    for path in files:
        unfinished = out / (path.name + UNFINISHED)
        with naming(unfinished), path.open("rb") as source, open(create(unfinished), "wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
            target.flush()
            os.fsync(target.fileno())
        os.replace(unfinished, out / path.name)
    sync_folder(out)
    write_file(out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False).encode() + b"\n")
    write_file(out / "config.json", (step_folder / "config.json").read_bytes())


def state_of(model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state_dict with other tensors: of each parameter, by its first name, and of each buffer."""
    names = list(model.state_dict())  # first: where weights are shared out it puts these in place
    first = {parameter: name for name, parameter in model.named_parameters()}
    named = dict(model.named_parameters(remove_duplicate=False))
    return {name: weights[first[named[name]]] if name in named else buffers[name] for name in names}
