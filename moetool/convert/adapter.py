"""A LoRA adapter saved by peft, merged into its base: W + scaling * B @ A (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from moetool.arch.dense import LM_HEAD
from moetool.arch.forms import HEADS, PREFIXES
from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.reader import AdapterReader
from moetool.errors import CheckpointError, ConfigError
from moetool.surgery.fill import Piece
from moetool.surgery.kinds import KINDS, Block, Kind
from moetool.surgery.rows import read_rows

PREFIX = "base_model.model."
# Settings that change the formula, or that the base must have been changed for; peft's defaults are fine.
REFUSED = (
    "use_dora", "use_qalora", "lora_bias", "target_parameters", "layer_replication", "trainable_token_indices",
    "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
FITTING_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others take something off the base's weights
SUFFIXES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


@dataclass(frozen=True)
class Delta:
    """An adapter's change of one weight.

    Attributes:
        a: (rank, inputs).
        b: (outputs, rank).
        scaling: of their product.
        transposed: whether the weight has its inputs in rows.
    """

    a: TensorInfo
    b: TensorInfo
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter by the names of its base's tensors.

    Attributes:
        deltas: what is added to a tensor.
        replaced: tensors that were trained as a whole (`modules_to_save`).
    """

    deltas: Mapping[str, Delta]
    replaced: Mapping[str, TensorInfo]

    @property
    def changed(self) -> set[str]:
        """The tensors that it changes."""
        return {*self.deltas, *self.replaced}

    def named(self, names: Mapping[str, str]) -> Adapter:
        """With other names of the tensors that it changes."""
        return Adapter(
            {names.get(name, name): delta for name, delta in self.deltas.items()},
            {names.get(name, name): info for name, info in self.replaced.items()},
        )

    def without(self, tensor: str) -> Adapter:
        """Without what it does to a tensor."""
        return Adapter(
            {name: delta for name, delta in self.deltas.items() if name != tensor},
            {name: info for name, info in self.replaced.items() if name != tensor},
        )


def read_adapter(reader: AdapterReader) -> Adapter:
    """The parts of an adapter, found by their names and checked against its configuration.

    Raises:
        ConfigError: it is not a LoRA, or a kind of LoRA that is merged by another formula.
        CheckpointError: its configuration or one of its tensors makes no sense.
    """
    config, where = reader.config, reader.folder
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"--adapter {where} is a {str(config.get('peft_type'))[:60]}; only LORA can be merged")
    for key in REFUSED:
        if config.get(key):
            raise ConfigError(f"--adapter {where}: {key} cannot be merged here; merge it with peft (merge_and_unload)")
    if config.get("init_lora_weights") not in FITTING_STARTS:
        raise ConfigError(
            f"--adapter {where}: init_lora_weights {str(config['init_lora_weights'])[:60]!r} changed the base before"
            " training; merge it with peft (merge_and_unload)"
        )
    found: dict[str, dict[str, TensorInfo]] = {}
    replaced: dict[str, TensorInfo] = {}
    for name, info in reader.tensors.items():
        inner = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        suffix = next((suffix for suffix in SUFFIXES if inner.endswith(suffix)), None)
        if suffix:
            found.setdefault(inner.removesuffix(suffix), {})[suffix[6:].removesuffix(".weight")] = info
        elif "lora" in inner:
            raise ConfigError(f"--adapter {where}: tensor {name[:100]} cannot be merged here; merge it with peft")
        else:
            replaced[_usual(inner)] = info
    # Patterns are about the names that the modules had when they were trained.
    deltas = {_usual(f"{module}.weight"): _delta(module, parts, reader) for module, parts in found.items()}
    return Adapter(deltas, replaced)


def _delta(module: str, parts: Mapping[str, TensorInfo], reader: AdapterReader) -> Delta:
    embedding = "embedding_A" in parts
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if set(parts) != set(names):
        raise CheckpointError(f"{reader.folder} has only part of the LoRA of {module[:100]}; fetch it again")
    a, b = (parts[name] for name in names)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise CheckpointError(f"{reader.folder}: {module[:100]} has parts of shapes {shapes}, which do not match")
    config, rank = reader.config, a.shape[0]
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    if type(alpha) not in (int, float) or not abs(alpha) < 2**63:
        raise CheckpointError(f"{reader.folder}/adapter_config.json: lora_alpha is {str(alpha)[:60]!r}, not a number")
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Delta(a, b, scaling, embedding or config.get("fan_in_fan_out") is True)


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that fits a module's name, as peft looks it up."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise CheckpointError(f"adapter_config.json: alpha_pattern {pattern[:60]!r} is not valid") from None
    return default


def _usual(name: str) -> str:
    """The name of a tensor in the text model on its own, as `arch/forms.py` gives it."""
    if name in HEADS:
        return LM_HEAD
    for prefix in PREFIXES:
        if prefix and re.match(rf"{re.escape(prefix)}(layers|embed_tokens|norm)\.", name):
            return "model." + name.removeprefix(prefix)
    return name


def adapted(name: str, base: TensorInfo, delta: Delta, adapter: AdapterReader) -> tuple[str, tuple[Piece, ...]]:
    """The kind and the sources of a weight that an adapter is merged into.

    Raises:
        CheckpointError: the adapter is of another shape than the weight.
    """
    shape = (delta.b.shape[0], delta.a.shape[1])
    if base.shape != (shape[::-1] if delta.transposed else shape):
        raise CheckpointError(
            f"--adapter {adapter.folder} adds {list(shape)} to {name[:100]}, which has shape {list(base.shape)}; give"
            " the base model that it was trained on"
        )
    return "adapted transposed" if delta.transposed else "adapted", (Piece(1, delta.a), Piece(1, delta.b))


def _merged(transposed: bool, block: Block) -> torch.Tensor:
    """Rows of W + scaling * B @ A, in fp32, rounded once.

    The product is summed rank by rank in a fixed order with plain additions, so that any machine gives the same
    bits, which no library of matrix products promises, and the proof can be made anywhere.
    """
    base, a, b = block.fill.sources
    a_RI, b_OR = (_whole(block.readers[piece.source], piece.info) for piece in (a, b))
    rows, columns = (a_RI.T, b_OR.T) if transposed else (b_OR, a_RI)
    rows = rows[block.start : block.stop]
    delta = torch.zeros((len(rows), columns.shape[1]))
    term = torch.empty_like(delta)
    for rank in range(columns.shape[0]):
        delta += torch.mul(rows[:, rank, None], columns[rank], out=term)
    weight = block.rows(base, block.start, block.stop).float()
    return (weight + delta.mul_(block.fill.value)).to(block.dtype)


@lru_cache(maxsize=64)  # the blocks of a weight come one after another
def _whole(reader: Any, info: TensorInfo) -> torch.Tensor:
    return read_rows(reader, info, 0, info.shape[0]).float()


KINDS_OF_CONVERT: Mapping[str, Kind] = {
    **KINDS,
    "adapted": Kind(partial(_merged, False)),
    "adapted transposed": Kind(partial(_merged, True)),
}
