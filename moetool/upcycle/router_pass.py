"""The pass over text that fits routers: layer by layer, through the model to be written.

A router's input depends on the experts and routers of all layers before. So each layer's router is fitted on what
reaches it in the model with the routers that were fitted before, and the loads that are counted are the result's own.

Shapes: B windows, S tokens of each, T tokens, D hidden, E experts, K top-k, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moetool.calibration.by_layer import LayeredModel
from moetool.calibration.experts import Layer, find_experts
from moetool.calibration.hidden import HiddenStates
from moetool.calibration.measure import windows_of
from moetool.calibration.parts import HELD_OUT, parts_of_texts
from moetool.checkpoint.model import pick_device
from moetool.checkpoint.reader import CheckpointReader
from moetool.errors import CheckpointError, DataError
from moetool.measured import Measured, RouterRows
from moetool.progress import Progress, silent
from moetool.routing.text_pass import Tokens
from moetool.surgery.rows import TORCH_DTYPES
from moetool.upcycle.blocks import drawn_rows
from moetool.upcycle.groups import SCORES
from moetool.upcycle.plan import Upcycling
from moetool.upcycle.router_fit import SAMPLE, SAMPLE_BYTES, Inputs, Wanted, fit
from moetool.upcycle.texts import TextOptions
from moetool.upcycle.unwritten import unwritten

MIXERS = ("self_attn", "linear_attn", "mamba", "conv")  # names of the module that mixes a layer's tokens


def fit_routers(
    upcycling: Upcycling,
    readers: Sequence[CheckpointReader],
    texts: Mapping[str, Tokens],
    run: TextOptions,
    progress: Progress = silent,
) -> Measured:
    """Fit every router of an upcycling, and count where held-out tokens go.

    Args:
        upcycling: its plan has random routers.
        readers: its sources.
        texts: name -> tokens; with `ridge`, one of each donor, in their order.
        run: how they run.
        progress: reports tokens of layers.

    Returns:
        What the upcycling has measured already, and its routers and loads.

    Raises:
        CheckpointError: the model does not run in this version of transformers, or gives numbers that are not finite.
        DataError: a text has fewer than four windows, or a token that the model does not know.
    """
    with unwritten(upcycling.plan, readers, pick_device(run.device)) as model:
        return _Pass(model, upcycling, texts, run).through_all(progress)


class _Pass:
    """Texts on their way through a model whose routers are fitted."""

    def __init__(
        self, model: LayeredModel, upcycling: Upcycling, texts: Mapping[str, Tokens], run: TextOptions
    ) -> None:
        self.model, self.upcycling, self.layers = model, upcycling, find_experts(model.core)
        windows = windows_of(model, run)
        for name, text in texts.items():
            if windows.num_tokens(text) <= (HELD_OUT - 1) * windows.seq_len:
                raise DataError(
                    f"--calibrate {name}: only {windows.num_tokens(text)} tokens, but {HELD_OUT} windows of"
                    f" {windows.seq_len} are needed, because one is held out; give more text, or a smaller --seq-len"
                )
        vocabulary = int(model.core.get_input_embeddings().num_embeddings)
        self.parts = list(parts_of_texts(texts, 2**62, vocabulary, windows, option="--calibrate"))
        self.names = list(texts)
        self.part = 0  # the one that is running
        self.routers: dict[int, RouterRows] = {}
        self.loads: dict[int, dict[str, list[float]]] = {}
        self.halves: dict[int, dict[str, float]] = {}

    def through_all(self, progress: Progress) -> Measured:
        """Send all texts through all layers."""
        self.model.run([part.ids_BS for part in self.parts], self._begin, "fitting routers", progress, self._through)
        return replace(self.upcycling.measured, routers=self.routers, loads=self.loads, halves=self.halves)

    def _begin(self, index: int) -> None:
        self.part = index

    def _through(self, number: int, send: Callable[[bool], None]) -> None:
        """Send all texts through one layer twice: up to its experts, then, with the fitted router, through them."""
        layer = self.layers.get(number)
        if layer is None:
            send(True)
            return
        mixer = _Mixer(self.model.layers[number], [part.ids_BS for part in self.parts], lambda: self.part)
        with mixer.kept():
            inputs = self._inputs(layer, send)
        rows = fit(drawn_rows(self.upcycling.recipe, self._shape(layer), number), inputs, self._wanted())
        self._put(number, layer, rows)
        self.routers[number] = rows
        with mixer.looked_up():
            counts = self._counts(number, layer, send)
        self.loads[number] = {name: _shares(one_2E.sum(0)).tolist() for name, one_2E in counts.items()}
        self.halves[number] = {
            name: float((_shares(one_2E[0]) - _shares(one_2E[1])).abs().max()) for name, one_2E in counts.items()
        }

    def _inputs(self, layer: Layer, send: Callable[[bool], None]) -> list[Inputs]:
        """The router's inputs from each text; meanwhile, experts return zeros."""
        D = layer.experts.gate_up_proj.shape[-1]
        texts = {name: Inputs.zeros(D, self.upcycling.recipe.router == "ridge") for name in self.names}
        own = dict.fromkeys(self.names, 0)
        for part in self.parts:
            own[part.text] += int(part.own_T.sum())
        share = max(1, min(SAMPLE, SAMPLE_BYTES // (4 * D)) // len(own))  # of the sample, for each text

        def receive(hidden: Tensor, *more: Any, **named: Any) -> Tensor:
            part = self.parts[self.part]
            hidden_TD = hidden.reshape(-1, D)
            texts[part.text].add(hidden_TD[part.own_T.to(hidden.device)], max(1, -(-own[part.text] // share)))
            return torch.zeros_like(hidden)

        with _instead(layer.experts, receive):
            send(False)
        return list(texts.values())

    def _counts(self, number: int, layer: Layer, send: Callable[[bool], None]) -> dict[str, Tensor]:
        """Text -> (2, E), the routes of the two halves of its held-out tokens; the layer's outputs are kept."""
        E = self.upcycling.recipe.num_experts
        counts = {name: torch.zeros(2, E, dtype=torch.int64) for name in self.names}
        left = {name: sum(int(part.held_T.sum()) for part in self.parts if part.text == name) for name in self.names}
        left = {name: tokens // 2 for name, tokens in left.items()}  # of the first half

        def count(hidden: Tensor, indices: Tensor, weights: Tensor, *more: Any, **named: Any) -> Any:
            part = self.parts[self.part]
            held_TK = indices.reshape(-1, indices.shape[-1])[part.held_T.to(indices.device)]
            for half, routes_TK in enumerate((held_TK[: left[part.text]], held_TK[left[part.text] :])):
                counts[part.text][half] += torch.bincount(routes_TK.flatten().cpu(), minlength=E)
            left[part.text] = max(0, left[part.text] - len(held_TK))
            return given(hidden, indices, weights, *more, **named)

        recipe = self.upcycling.recipe
        copies = recipe.num_donors == 1 and not recipe.num_redrawn(self.upcycling.num_units, number)
        given = partial(_of_copies, layer, recipe.group_size) if copies else layer.experts.forward
        with _instead(layer.experts, count):
            send(True)
        return counts

    def _shape(self, layer: Layer) -> tuple[int, int]:
        return self.upcycling.recipe.num_experts, int(layer.experts.gate_up_proj.shape[-1])

    def _wanted(self) -> Wanted:
        recipe, spec = self.upcycling.recipe, self.upcycling.spec
        groups = recipe.num_experts // recipe.group_size
        donor_G = torch.tensor([recipe.donor(group * recipe.group_size) for group in range(groups)])
        return Wanted(
            donor_G if recipe.router == "ridge" else torch.zeros_like(donor_G),
            recipe.top_k // recipe.group_size,
            SCORES[spec.ranked_by],
            spec.ranked_by == "sigmoid" or spec.selection_bias is not None,
            spec.selection_bias is not None,
        )

    def _put(self, number: int, layer: Layer, rows: RouterRows) -> None:
        """Give the layer in memory the router that is going to be written."""
        spec, recipe = self.upcycling.spec.in_memory, self.upcycling.recipe
        size = recipe.group_size
        made_ED = rows.rows(drawn_rows(recipe, self._shape(layer), number)).repeat_interleave(size, 0)
        router = spec.router.format(layer=number)
        written = {fill.places[0].tensor: fill.dtype for fill in self.upcycling.plan.fills if fill.kind == "router"}
        dtype = TORCH_DTYPES[written[self.upcycling.spec.router.format(layer=number)]]
        biases_G = torch.zeros(1) if rows.bias_G is None else rows.bias_G
        if not (made_ED.to(dtype).isfinite().all() and biases_G.isfinite().all()):
            raise CheckpointError(
                f"layer {number}: a router cannot be fitted, because its inputs, or its rows in {dtype}, are not"
                f" finite; look for NaN or overflow in the dense models, or use another --router"
            )
        _set(self.model.core, router, made_ED.to(dtype))
        if rows.bias_G is not None and spec.selection_bias:
            _set(self.model.core, spec.selection_bias.format(layer=number), rows.bias_G.repeat_interleave(size))


def _shares(counts_E: Tensor) -> Tensor:
    return counts_E / counts_E.sum().clamp_min(1)  # half of a single token has none


def _of_copies(layer: Layer, size: int, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The experts' output where all groups are copies of the first: each part of the FFN is computed once."""
    hidden_TD, parts_TK = hidden.reshape(-1, hidden.shape[-1]), indices.reshape(-1, indices.shape[-1]) % size
    weights_TM = torch.zeros(len(hidden_TD), size, dtype=weights.dtype, device=weights.device)
    weights_TM.scatter_add_(-1, parts_TK.long(), weights.reshape(parts_TK.shape))
    output_TD = torch.zeros_like(hidden_TD)
    for part in range(size):
        output_TD += weights_TM[:, part, None] * layer.output(part, hidden_TD)
    return output_TD.view(hidden.shape)


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer other numbers."""
    module, _, own = name.rpartition(".")
    place = getattr(model.get_submodule(module), own)
    with torch.no_grad():
        place.copy_(value.reshape(place.shape))


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward inside this block."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class _Mixer:
    """The module that mixes the tokens of a layer; its outputs are kept, so that it runs once per batch."""

    def __init__(self, layer: nn.Module, batches: Sequence[Tensor], current: Callable[[], int]) -> None:
        found = next((module for name in MIXERS if isinstance(module := getattr(layer, name, None), nn.Module)), None)
        if found is None:
            raise CheckpointError(f"{type(layer).__name__}: its attention cannot be found; use another --router")
        self._module, self._batches, self._current = found, batches, current
        self._others: int | None = None
        self._states = HiddenStates([])

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the outputs that are computed inside this block."""
        forward = self._module.forward

        def keep(*inputs: Any, **named: Any) -> Any:
            given = forward(*inputs, **named)
            states = given[0] if isinstance(given, tuple) else given
            if self._current() == 0:
                self._others = len(given) - 1 if isinstance(given, tuple) else None
                width = states.nbytes // self._batches[0].numel()
                self._states = HiddenStates([ids_BS.numel() * width for ids_BS in self._batches])
            self._device = states.device
            self._states[self._current()] = states
            return given

        with _instead(self._module, keep):
            yield

    @contextmanager
    def looked_up(self) -> Iterator[None]:
        """Inside this block, return the kept outputs instead of computing them."""

        def look_up(*inputs: Any, **named: Any) -> Any:
            states = self._states[self._current()].to(self._device)
            return states if self._others is None else (states, *[None] * self._others)

        with _instead(self._module, look_up):
            yield
