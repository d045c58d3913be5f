"""A model with one decoder layer in memory at a time: all texts run through it before the next one is read.

Shapes: B windows, S tokens of each, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from ctypes import CDLL
from dataclasses import dataclass, replace
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from moetool.calibration.hidden import HiddenStates
from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.model import check_complete, check_size, fit_experts, loading, one_tensor_at_a_time, skeleton
from moetool.checkpoint.reader import BlockFile, CheckpointReader
from moetool.errors import CheckpointError
from moetool.layers import layer_of
from moetool.progress import Progress, silent
from moetool.surgery.rows import TORCH_DTYPES, raw_bytes

CACHE_LINE = 64  # bytes


class Bytes(Protocol):
    """A source of tensors' bytes: a checkpoint's files, or code that makes them."""

    def read_into(self, info: TensorInfo, offset: int, out: memoryview) -> None: ...


def once(number: int, send: Callable[[bool], None]) -> None:
    """Send all batches through a layer once."""
    send(True)


@dataclass(frozen=True)
class _Unread:
    """A tensor on disk, which transformers reads by `[...]`. Bytes come by `pread`, not through a map of the file."""

    files: Bytes
    info: TensorInfo

    def __getitem__(self, every: Any) -> Tensor:
        dtype = TORCH_DTYPES[self.info.dtype]
        # Pages of its own, which go back to the system at once: the allocator would keep those of matrices that become
        # part of a larger one, about a layer. A whole model's weights lie in a map of the file, and the last bits of a
        # product depend on a matrix's place in a cache line: so it gets the same place here.
        first = self.info.start % CACHE_LINE // dtype.itemsize * dtype.itemsize
        pages = torch.frombuffer(mmap(-1, first + self.info.size + 1), dtype=torch.uint8)
        raw = pages[first : first + self.info.size]
        self.files.read_into(self.info, 0, raw_bytes(raw))
        return raw.view(dtype).view(self.info.shape)


class _Through(Exception):
    """The layer in memory has run, and nothing after it, such as the last norm, is needed."""


class LayeredModel:
    """A causal language model of transformers of which at most one decoder layer is in memory.

    The model's own forward runs, so embeddings, masks, positions and the head are those of its family. A decoder layer
    that is not in memory returns its input; the first one returns the hidden states before the layer in memory.

    Attributes:
        core: transformers' model; decoder layers without weights are on torch's meta device.
        layers: its decoder layers.

    Args:
        folder: a Hugging Face checkpoint.
        dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        device: such as `cpu` or `cuda`.
        files: opens the source of the tensors' bytes.

    Raises:
        CheckpointError: it cannot be loaded, tensors are missing, left over or of another shape, or it has no list of
            decoder layers.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str = "auto",
        device: str = "cpu",
        files: Callable[[Path], AbstractContextManager[Bytes]] = BlockFile,
    ) -> None:
        reader = CheckpointReader(folder)
        self.core = skeleton(folder, _dtype(reader, dtype)).eval()
        check_size(folder, self.core)
        layers = getattr(self.core.base_model, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise CheckpointError(f"{type(self.core).__name__} has no list of layers; leave --stream out")
        self.layers = layers
        self._folder, self._device, self._files = folder, device, files
        self._inside: list[dict[str, TensorInfo]] = [{} for _ in layers]  # the tensors of each layer
        outside = dict(reader.tensors)
        for name in reader.tensors:
            number = layer_of(name)
            if number is not None and number < len(layers):
                self._inside[number][name] = outside.pop(name)
        self._config = LoadStateDictConfig(
            pretrained_model_name_or_path=str(folder),
            device_map={"": device},
            dtype=self.core.dtype,
            dtype_plan=self.core._get_dtype_plan(self.core.dtype),
            weight_mapping=get_model_conversion_mapping(self.core),
        )
        self._load_all_but_layers(outside)
        fit_experts(self.core)
        self._loaded: int | None = None
        self._running: int | None = None
        self._given: Tensor | None = None
        self._made: Tensor | None = None
        for number, layer in enumerate(layers):
            layer.forward = partial(self._decode, number, layer.forward)

    def _load_all_but_layers(self, outside: Mapping[str, TensorInfo]) -> None:
        """Load as transformers does, with tensors without bytes in place of those of decoder layers."""
        inside = {
            name: torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta")
            for layer in self._inside
            for name, info in layer.items()
        }
        where = {**self._config.device_map, f"{self.core.base_model_prefix}.layers": "meta"}
        with loading(self._folder), one_tensor_at_a_time(), self._files(self._folder) as files:
            tensors = inside | {name: _Unread(files, info) for name, info in outside.items()}
            info, _ = convert_and_load_state_dict_in_model(self.core, tensors, replace(self._config, device_map=where))
            self.core._finalize_model_loading(self.core, self._config, info)
        check_complete(self._folder, info.to_dict())

    def load(self, number: int) -> nn.Module:
        """Load a decoder layer's weights, after freeing those of the layer before; return the layer.

        Raises:
            CheckpointError: the files have changed since the model was opened.
        """
        if self._loaded == number:
            return self.layers[number]
        self.free()
        self._loaded = number
        try:
            with torch.inference_mode(False), loading(self._folder), self._files(self._folder) as files:
                tensors = {name: _Unread(files, info) for name, info in self._inside[number].items()}
                with one_tensor_at_a_time():
                    info, _ = convert_and_load_state_dict_in_model(self.core, tensors, self._config)
                for failure in info.conversion_errors.values():
                    raise RuntimeError(" ".join(failure.split())[-300:])
        except BaseException:
            self.free()
            raise
        return self.layers[number]

    def free(self) -> None:
        """Free the weights of the decoder layer in memory."""
        if self._loaded is None:
            return
        for module in self.layers[self._loaded].modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = nn.Parameter(weight.detach().to("meta"), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = buffer.to("meta")
        self._loaded = None
        with suppress(AttributeError):  # of glibc alone: pages between those of what lives on go back to the system
            CDLL(None).malloc_trim(0)

    def _decode(self, number: int, forward: Callable[..., Any], hidden_BSD: Tensor, *more: Any, **named: Any) -> Any:
        """The forward of a decoder layer."""
        if number == 0 and self._given is not None:
            hidden_BSD = self._given
        if number != self._running:
            return hidden_BSD
        made_BSD = forward(hidden_BSD, *more, **named)
        if not isinstance(made_BSD, Tensor) or made_BSD.shape != hidden_BSD.shape:
            raise CheckpointError(
                f"a layer of {type(self.core).__name__} returns more than hidden states; leave --stream out"
            )
        self._made = made_BSD
        raise _Through

    @torch.inference_mode()  # a graph would keep the weights of all layers
    def run(
        self,
        batches: Sequence[Tensor],
        begin: Callable[[int], None],
        task: str,
        progress: Progress = silent,
        through: Callable[[int, Callable[[bool], None]], None] = once,
    ) -> HiddenStates:
        """Send batches through all decoder layers, one layer after the other.

        Args:
            batches: tokens (B, S) of each.
            begin: called with the number of a batch each time before it goes through a layer.
            task: its name for `progress`.
            progress: reports tokens of layers.
            through: called with the number of each layer once it is in memory, and with a function that sends all
                batches through it; its argument is True the last time, when the layer's output is kept.

        Returns:
            The last layer's output.
        """
        states = HiddenStates([])
        done, total = 0, len(self.layers) * sum(ids_BS.numel() for ids_BS in batches)

        def send(number: int, last: bool) -> None:
            nonlocal states, done
            for index, ids_BS in enumerate(batches):
                begin(index)
                self._given = states[index].to(self._device) if number else None
                with suppress(_Through):
                    self.core.base_model(input_ids=ids_BS.to(self._device), use_cache=False)
                assert self._made is not None
                if not last:
                    continue
                if number == index == 0:
                    width = self._made.nbytes // ids_BS.numel()
                    states = HiddenStates([ids_BS.numel() * width for ids_BS in batches])
                states[index] = self._made
                done += ids_BS.numel()
                progress(task, done, total, f"layer {number + 1} of {len(self.layers)}")

        try:
            for number in range(len(self.layers)):
                self.load(number)
                self._running = number
                through(number, partial(send, number))
        finally:
            self._running = self._given = self._made = None
            self.free()
        return states

    @torch.inference_mode()
    def logits(self, batches: Sequence[Tensor], progress: Progress = silent) -> Iterator[Tensor]:
        """(B, S, V) of each batch, after all have gone through all layers."""
        states = self.run(batches, lambda batch: None, "validating", progress)
        for index, ids_BS in enumerate(batches):
            self._given = states[index].to(self._device)
            yield self.core(input_ids=ids_BS.to(self._device), use_cache=False).logits
        self._given = None


def core_of(model: Any) -> Any:
    """The transformers module of a model that is in memory as a whole, or one layer at a time."""
    return model.core if isinstance(model, LayeredModel) else model


def _dtype(reader: CheckpointReader, dtype: str) -> torch.dtype | None:
    """The dtype that transformers would load a checkpoint in; None leaves it to config.json."""
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    if reader.config.get("dtype") or reader.config.get("torch_dtype"):
        return None
    floating = (TORCH_DTYPES[info.dtype] for info in reader.tensors.values())
    return next((found for found in floating if found.is_floating_point), None)
