"""One forward pass of a model over texts with sums over its FFNs, and its loss on texts.

Shapes: B windows, S tokens of each, T tokens of a batch, E experts, K top-k, D hidden, F intermediate units, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moetool.calibration.by_layer import LayeredModel, core_of
from moetool.calibration.experts import Layer, find_experts, layers_with_experts
from moetool.calibration.ffn import dense_ffns
from moetool.calibration.parts import Part, parts_of_texts
from moetool.calibration.sums import Calibration, ExpertSums, InputSums, UnitSums
from moetool.errors import DataError
from moetool.progress import Progress, silent
from moetool.routing.text_pass import Batch, Tokens, Windows, read_batches

SAMPLE = 1024  # tokens of each kind whose hidden states are kept
SAMPLE_BYTES = 10**9  # that the outputs of all experts of a layer on a sample may take


class _Gathered:
    """The sums and samples of each layer, which hooks add to, and the part of a text that is running."""

    def __init__(self) -> None:
        self.part: Part | None = None
        self.sums: dict[int, ExpertSums] = {}
        self.inputs: dict[int, InputSums] = {}
        self.units: dict[int, UnitSums] = {}
        self.first: dict[int, UnitSums] = {}
        self.samples: dict[bool, dict[int, Tensor]] = {False: {}, True: {}}  # by whether they are held out

    def begin(self, part: Part) -> None:
        """From now on hooks see this part."""
        self.part = part

    def own(self, rows: Tensor) -> Tensor:
        """The rows of tokens that are in sums."""
        assert self.part is not None
        return rows if bool(self.part.own_T.all()) else rows[self.part.own_T.to(rows.device)]

    def count_units(self, layer: int, units_TF: Tensor) -> None:
        """Add the units of tokens that are in sums; what lies in the first half of a text is summed apart, too."""
        assert self.part is not None
        sums = UnitSums.of(self.own(units_TF))
        _add(self.units, layer, sums)
        first_T = self.part.own_T & self.part.first_T
        if not bool((first_T == self.part.own_T).all()):
            sums = UnitSums.of(units_TF[first_T.to(units_TF.device)])
        _add(self.first, layer, sums)

    def keep(self, layer: int, hidden_TD: Tensor) -> None:
        """Fill the samples of a layer."""
        part = self.part
        assert part is not None
        for held, which_T in ((False, part.own_T), (True, part.held_T)):
            rows_TD = self.samples[held].setdefault(layer, torch.empty(0, hidden_TD.shape[-1]))
            if len(rows_TD) < part.limit and bool(which_T.any()):
                more_TD = hidden_TD[which_T.to(hidden_TD.device)][: part.limit - len(rows_TD)]
                self.samples[held][layer] = torch.cat([rows_TD, more_TD.float().cpu()])


@torch.inference_mode()
def calibrate(
    model: Any,
    texts: Mapping[str, Tokens],
    windows: Windows,
    moments: bool = False,
    progress: Progress = silent,
) -> Calibration:
    """Sum statistics of a model's experts on texts.

    Only experts that a token is routed to are computed, with the weights that the model itself gives them.

    Args:
        model: a causal language model of transformers, or of which one layer at a time is in memory; its head is not
            run. The sums are the same.
        texts: name -> tokens.
        windows: how they are read.
        moments: whether the first two moments of what the FFNs receive are summed too.
        progress: reports tokens.

    Raises:
        CheckpointError: its experts cannot be read.
        DataError: a text has no tokens, or one that the model does not know.
    """
    layers = find_experts(model.core) if isinstance(model, LayeredModel) else layers_with_experts(model)
    _, first = next(iter(layers.items()))
    E, D = first.num_experts, first.experts.gate_up_proj.shape[-1]
    sample = max(1, min(SAMPLE, SAMPLE_BYTES // (4 * E * D)))
    gathered = _Gathered()
    gathered.sums = {number: ExpertSums.zeros(layer.num_experts) for number, layer in layers.items()}

    def hook(number: int, layer: Layer) -> Callable[..., None]:
        def count(module: Any, inputs: tuple[Any, ...]) -> None:
            hidden_TD, indices_TK, weights_TK = (part.reshape(-1, part.shape[-1]) for part in inputs[:3])
            gathered.keep(number, hidden_TD)
            own_TD = gathered.own(hidden_TD)
            gathered.sums[number] += layer_sums(layer, own_TD, gathered.own(indices_TK), gathered.own(weights_TK))
            if moments:
                _add(gathered.inputs, number, InputSums.of(own_TD))

        return count

    hooks = [layer.experts.register_forward_pre_hook(hook(number, layer)) for number, layer in layers.items()]
    return _run(model, parts_of_texts(texts, sample, _vocabulary(model), windows), gathered, hooks, progress)


@torch.inference_mode()
def calibrate_dense(
    model: Any,
    texts: Mapping[str, Tokens],
    windows: Windows,
    progress: Progress = silent,
) -> Calibration:
    """Sum the inputs of a dense model's FFNs, and the contributions of their units, on texts.

    Args:
        model: see `calibrate`.
        texts: name -> tokens.
        windows: how they are read.
        progress: reports tokens.

    Raises:
        CheckpointError: its FFNs cannot be read.
        DataError: a text has no tokens, or one that the model does not know.
    """
    gathered = _Gathered()

    def receives(number: int) -> Callable[..., None]:
        def count(module: Any, inputs: tuple[Any, ...]) -> None:
            hidden_TD = inputs[0].flatten(0, -2)
            gathered.keep(number, hidden_TD)
            _add(gathered.inputs, number, InputSums.of(gathered.own(hidden_TD)))

        return count

    def does(number: int) -> Callable[..., None]:
        def count(module: Any, inputs: tuple[Any, ...]) -> None:
            gathered.count_units(number, inputs[0].flatten(0, -2))

        return count

    hooks = []
    for number, ffn in dense_ffns(core_of(model)).items():
        hooks.append(ffn.whole.register_forward_pre_hook(receives(number)))
        hooks.append(ffn.down.register_forward_pre_hook(does(number)))
    parts = parts_of_texts(texts, SAMPLE, _vocabulary(model), windows, option="--calibrate")
    return _run(model, parts, gathered, hooks, progress)


def _add(sums: dict[int, Any], number: int, more: Any) -> None:
    sums[number] = sums[number] + more if number in sums else more


def _vocabulary(model: Any) -> int:
    return int(core_of(model).get_input_embeddings().num_embeddings)


def _run(
    model: Any, parts: Iterator[Part], gathered: _Gathered, hooks: Sequence[RemovableHandle], progress: Progress
) -> Calibration:
    """Send parts through the layers of a model, remove its hooks, and return what they have gathered."""
    try:
        if isinstance(model, LayeredModel):
            every = list(parts)
            ids = [part.ids_BS for part in every]
            model.run(ids, lambda index: gathered.begin(every[index]), "calibrating", progress)
        else:
            device = model.get_input_embeddings().weight.device
            for part in parts:
                gathered.begin(part)
                model.base_model(input_ids=part.ids_BS.to(device), use_cache=False)
                progress(f"calibrating on {part.text}", part.done, part.total)
    finally:
        for one in hooks:
            one.remove()
    fitted, held_out = gathered.samples[False], gathered.samples[True]
    return Calibration(gathered.sums, fitted, held_out, gathered.inputs, gathered.units, gathered.first)


def layer_sums(layer: Layer, hidden_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> ExpertSums:
    """The sums of some tokens of a layer.

    Args:
        layer: of the model.
        hidden_TD: what its experts receive.
        indices_TK: the chosen experts.
        weights_TK: of their outputs.
    """
    rows = torch.zeros(5, layer.num_experts, dtype=torch.float64, device=hidden_TD.device)
    routes_E = torch.zeros(layer.num_experts, dtype=torch.float64)
    for expert in indices_TK.unique().tolist():
        token, slot = (indices_TK == expert).nonzero(as_tuple=True)
        out_TD = layer.output(expert, hidden_TD[token]).float()
        norm_T, gate_T = out_TD.norm(dim=-1).double(), weights_TK[token, slot].double()
        sums = (gate_T.sum(), norm_T.sum(), norm_T.square().sum(), (gate_T * norm_T).sum(), out_TD.abs().max().double())
        rows[:, expert], routes_E[expert] = torch.stack(sums), len(token)
    return ExpertSums(torch.tensor(float(len(hidden_TD)), dtype=torch.float64), routes_E, *rows.cpu())


@torch.inference_mode()
def mean_losses(
    model: Any,
    texts: Mapping[str, Tokens],
    windows: Windows,
    progress: Progress = silent,
) -> dict[str, float]:
    """The mean cross-entropy in nats of each next token within the windows of each text.

    Args:
        model: see `calibrate`.
        texts: name -> tokens.
        windows: how they are read.
        progress: reports tokens of layers, where these are read one at a time.

    Raises:
        DataError: a text has fewer than two tokens, or one that the model does not know.
    """
    vocabulary = _vocabulary(model)
    total, count = dict.fromkeys(texts, 0.0), dict.fromkeys(texts, 0)

    def batches() -> Iterator[tuple[str, Batch]]:
        for name, text in texts.items():
            for batch in read_batches(text, windows, vocabulary, f"--val {name}"):
                yield name, batch

    for (name, batch), logits_BSV in _with_logits(model, batches(), progress):
        loss_T = next_token_losses(batch, logits_BSV)
        total[name], count[name] = total[name] + float(loss_T.double().sum()), count[name] + len(loss_T)
    for name in texts:
        if not count[name]:
            raise DataError(f"--val {name}: the text has no next token to predict; give a longer one")
    return {name: total[name] / count[name] for name in texts}


def _with_logits(
    model: Any, batches: Iterator[tuple[str, Batch]], progress: Progress
) -> Iterator[tuple[tuple[str, Batch], Tensor]]:
    if isinstance(model, LayeredModel):
        every = list(batches)
        yield from zip(every, model.logits([batch.ids_BS for _, batch in every], progress), strict=True)
        return
    device = model.get_input_embeddings().weight.device
    for name, batch in batches:
        yield (name, batch), model(input_ids=batch.ids_BS.to(device), use_cache=False).logits


def next_token_losses(batch: Batch, logits_BSV: Tensor) -> Tensor:
    """(T,), the cross-entropy in nats of each next token within a batch's windows; filling has none."""
    ids_BS = batch.ids_BS.to(logits_BSV.device)
    logits_TV = logits_BSV[:, :-1].float().flatten(0, 1)
    loss_T = nn.functional.cross_entropy(logits_TV, ids_BS[:, 1:].flatten(), reduction="none")
    if batch.mask_T is None:
        return loss_T
    return loss_T[batch.mask_T.reshape(ids_BS.shape)[:, 1:].flatten().to(loss_T.device)]
