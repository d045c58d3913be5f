"""A model in training, saved as a stock checkpoint like its source."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from moetool.checkpoint.folder import UNFINISHED, create, naming, sync_folder, write_file
from moetool.checkpoint.header import read_header
from moetool.checkpoint.reader import INDEX, CheckpointReader
from moetool.checkpoint.writer import COMPANIONS
from moetool.cost.parameters import is_selection_bias
from moetool.errors import ConfigError
from moetool.lineage import LINEAGE, extend_lineage
from moetool.outside import read_json
from moetool.surgery.rows import is_finite
from moetool.train.ranks import Ranks

BALANCE = "balance/"  # before the names of what a balance strategy must have to go on
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


@dataclass(frozen=True)
class Layout:
    """A model's form on disk: its family's own names and tensors, and the dtype.

    Attributes:
        model: of transformers, not wrapped; its tensors are not looked at, and may be in use by training.
        dtype: of floating-point parameters; buffers keep theirs, a selection bias is float32.
        stored: what the checkpoint holds: name of a parameter (its first) or buffer -> name in its state_dict. Tied
            weights are there once.
        parameters: names of all parameters.
        units: names of tensors that lie in the checkpoint only together: nearly always one.
    """

    model: Any
    dtype: str
    stored: Mapping[str, str]
    parameters: frozenset[str]
    units: tuple[tuple[str, ...], ...]

    def contents(self, tensors: Mapping[str, Tensor], step: int) -> Iterator[tuple[str, str, Tensor]]:
        """The tensors of a step folder for a unit's tensors or a parameter's moments: see `assign`.

        Args:
            tensors: whole, by name; without elements on torch's meta device.
            step: that is saved.

        Raises:
            ConfigError: a weight is not finite, or not in that dtype: such a model is never saved.
        """
        state: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name.startswith(BALANCE):
                yield "balance", name.removeprefix(BALANCE), tensor
                continue
            if "/" in name:
                yield "optimizer", name, tensor
                continue
            if self.dtype != "float32" and name in self.parameters:
                yield "master", name, tensor
            if name in self.stored:
                state[self.stored[name]] = self._cast(name, tensor, step)
        for name, tensor in revert_weight_conversion(self.model, state).items():
            yield "model", name, tensor

    def _cast(self, name: str, tensor: Tensor, step: int) -> Tensor:
        if name not in self.parameters:
            return tensor
        # A selection bias moves by steps that are below bf16's precision.
        cast = tensor.to(torch.float32 if is_selection_bias(name) else getattr(torch, self.dtype))
        if not cast.is_meta and not is_finite(cast):
            too_large = is_finite(tensor)
            advice = "--save-dtype float32 or bfloat16" if too_large else "lower --lr or --grad-clip"
            raise ConfigError(f"{name} is not finite in {self.dtype}, so step {step} is not saved; {advice}")
        return cast


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint holds, by name."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {name: tensor for name, tensor in model.state_dict().items() if name not in named}


def lay_out(model: Any, dtype: str) -> Layout:
    """See Layout."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    named = dict(model.named_parameters(remove_duplicate=False))
    unsaved = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in unsaved}
    names = {name: first[named[name]] if name in named else name for name in state}
    # transformers says which of some tied weights stays; it knows them by their memory.
    memory = {name: torch.zeros(1) for name in names.values()}
    kept = remove_tied_weights_from_state_dict({name: memory[of] for name, of in names.items()}, model)
    stored = {names[name]: name for name in kept}
    empty = {name: torch.empty(state[name].shape, dtype=state[name].dtype, device="meta") for name in kept}
    units = [tuple(names[name] for name in unit) for unit in _units(model, empty)]
    units += [(name,) for name in first.values() if name not in stored]
    return Layout(model, dtype, stored, frozenset(first.values()), tuple(units))


def _units(model: Any, state: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of a state_dict, those together that become the same tensors on disk, in the order of these."""
    whole = revert_weight_conversion(model, dict(state))
    unit_of: dict[str, list[str]] = {}
    for name, tensor in state.items():
        made = revert_weight_conversion(model, {name: tensor})
        unit: list[str] = next((unit_of[other] for other in made if other in unit_of), [])
        unit.append(name)
        unit_of |= dict.fromkeys(made, unit)
    units = list({id(unit_of[name]): unit_of[name] for name in whole if name in unit_of}.values())
    apart: dict[str, Tensor] = {}
    for unit in units:
        apart |= revert_weight_conversion(model, {name: state[name] for name in unit})
    return units if _described(apart) == _described(whole) else [list(state)]


def _described(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}


def save_beside(layout: Layout, folder: Path, source: Path, entry: Mapping[str, Any]) -> None:
    """Make a stock checkpoint of a folder that holds the files of a model's weights.

    Args:
        layout: of the model.
        folder: gets what is missing.
        source: the checkpoint that the training began with; its config.json is carried over word for
            word but for the dtype and `output_router_logits`, so that keys that only older readers
            know survive.
        entry: added to the lineage in moetool.json.
    """
    shards = [read_header(path)[0] for path in sorted(folder.glob("model-*.safetensors"))]
    if shards:
        tensors = [info for shard in shards for info in shard.values()]
        size = sum(info.size for info in tensors)
        index: dict[str, Any] = {"metadata": {"total_parameters": layout.model.num_parameters(), "total_size": size}}
        index["weight_map"] = {info.name: info.shard for info in tensors}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = read_json(source / "config.json")
    config.pop("output_router_logits", None)
    config |= {key: layout.dtype for key in ("dtype", "torch_dtype") if key == "dtype" or key in config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / LINEAGE).write_bytes(extend_lineage(source, dict(entry)))


def publish(step_folder: Path, out: Path, summary: Mapping[str, Any], ranks: Ranks) -> None:
    """Copy a step's checkpoint to the top of the run's folder; config.json last, which makes it loadable.

    Args:
        step_folder: of the last step.
        out: the run's folder.
        summary: of the run.
        ranks: that share the files out; all must call.
    """
    files = sorted(path for path in step_folder.iterdir() if path.is_file() and path.name != "config.json")
    if ranks.is_main:  # transformers would prefer a single file, which other processes may have begun to publish
        for path in [*out.glob("*.safetensors"), out / INDEX]:
            if not (step_folder / path.name).exists():
                path.unlink(missing_ok=True)

    def copy() -> None:
        for path in files[ranks.rank :: ranks.size]:
            _copy(path, out / path.name)

    ranks.together(copy)
    if ranks.is_main:
        sync_folder(out)
        write_file(out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False).encode() + b"\n")
        write_file(out / "config.json", (step_folder / "config.json").read_bytes())


def _copy(source: Path, target: Path) -> None:
    unfinished = target.with_name(target.name + UNFINISHED)
    with naming(unfinished), source.open("rb") as file, open(create(unfinished), "wb") as copy:
        shutil.copyfileobj(file, copy, 1 << 24)
        copy.flush()
        os.fsync(copy.fileno())
    os.replace(unfinished, target)
