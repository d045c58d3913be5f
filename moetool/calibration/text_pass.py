"""One forward of a model over texts, summing what its experts do; and its loss on a text.

Shapes: B windows, S tokens of each, T tokens of a batch, E experts, K top-k, D hidden, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moetool.calibration.experts import Layer, layers_with_experts
from moetool.calibration.sums import Calibration, ExpertSums
from moetool.errors import DataError
from moetool.progress import Progress, silent
from moetool.routing.text_pass import Batch, Tokens, check_known, read_batches

SAMPLE = 1024  # tokens of each kind whose hidden states are kept
SAMPLE_BYTES = 10**9  # that the outputs of all experts of a layer on a sample may take
HELD_OUT = 4  # every so many windows of a text are held out, until the sample is full


@torch.inference_mode()
def calibrate(
    model: Any,
    texts: Mapping[str, Tokens],
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int,
    progress: Progress = silent,
) -> Calibration:
    """Sum what the experts of a model do on texts.

    Only experts that a token is routed to are computed, with the weights that the model itself gives them.

    Args:
        model: a causal language model of transformers; its head is not run.
        texts: name -> tokens.
        seq_len: tokens per window; windows do not see each other.
        batch_size: windows per forward.
        max_tokens: the first so many tokens of each text.
        progress: reports tokens.

    Raises:
        CheckpointError: its experts cannot be read.
        DataError: a text has no tokens, or one that the model does not know.
    """
    layers = layers_with_experts(model)
    _, first = next(iter(layers.items()))
    E, D = first.num_experts, first.experts.gate_up_proj.shape[-1]
    sample = max(1, min(SAMPLE, SAMPLE_BYTES // (4 * E * D)))
    sums = {number: ExpertSums.zeros(layer.num_experts) for number, layer in layers.items()}
    kept: dict[bool, dict[int, Tensor]] = {
        held: {number: torch.empty(0, D) for number in layers} for held in (False, True)
    }
    text_T = held_T = torch.zeros(0, dtype=torch.bool)  # of a batch: which tokens are text, and which are held out
    limit = 0  # of each sample so far, so that every text has its share

    def hook(number: int, layer: Layer) -> Callable[..., None]:
        def count(module: Any, inputs: tuple[Any, ...]) -> None:
            hidden_TD, indices_TK, weights_TK = (part.reshape(-1, part.shape[-1]) for part in inputs[:3])
            for held, which_T in ((False, text_T & ~held_T), (True, text_T & held_T)):
                rows_TD = kept[held][number]
                if len(rows_TD) < limit and bool(which_T.any()):
                    more_TD = hidden_TD[which_T.to(hidden_TD.device)][: limit - len(rows_TD)]
                    kept[held][number] = torch.cat([rows_TD, more_TD.float().cpu()])
            own_T = (text_T & ~held_T).to(hidden_TD.device)
            sums[number] += layer_sums(layer, hidden_TD[own_T], indices_TK[own_T], weights_TK[own_T])

        return count

    hooks = [layer.experts.register_forward_pre_hook(hook(number, layer)) for number, layer in layers.items()]
    device, vocabulary = model.get_input_embeddings().weight.device, model.get_input_embeddings().num_embeddings
    try:
        for position, (name, text) in enumerate(texts.items(), 1):
            limit, window = sample * position // len(texts), 0
            total, done = min(text.num_tokens, max_tokens), 0
            if total < 1:
                raise DataError(f"--data {name}: the text has no tokens; give a longer one")
            for batch in read_batches(text, seq_len, batch_size, total):
                check_known(f"--data {name}", batch, vocabulary)
                B, S = batch.ids_BS.shape
                full = all(len(rows_TD) >= limit for rows_TD in kept[True].values())
                held_B = (torch.arange(window, window + B) % HELD_OUT == HELD_OUT - 1) & (not full)
                held_T, window = held_B.repeat_interleave(S), window + B
                text_T = torch.ones(B * S, dtype=torch.bool) if batch.mask_T is None else batch.mask_T
                model.base_model(input_ids=batch.ids_BS.to(device), use_cache=False)
                done += len(batch.tokens_N)
                progress(f"calibrating on {name}", done, total)
    finally:
        for one in hooks:
            one.remove()
    return Calibration(sums, kept[False], kept[True])


def layer_sums(layer: Layer, hidden_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> ExpertSums:
    """The sums of some tokens of a layer.

    Args:
        layer: of the model.
        hidden_TD: what its experts receive.
        indices_TK: the chosen experts.
        weights_TK: of their outputs.
    """
    rows = torch.zeros(6, layer.num_experts, dtype=torch.float64)
    for expert in indices_TK.unique().tolist():
        token, slot = (indices_TK == expert).nonzero(as_tuple=True)
        out_TD = layer.output(expert, hidden_TD[token]).float()
        norm_T, gate_T = out_TD.norm(dim=-1).double().cpu(), weights_TK[token, slot].double().cpu()
        sums = (gate_T.sum(), norm_T.sum(), norm_T.square().sum(), (gate_T * norm_T).sum(), out_TD.abs().max().cpu())
        rows[:, expert] = torch.tensor([float(len(token)), *map(float, sums)], dtype=torch.float64)
    return ExpertSums(torch.tensor(float(len(hidden_TD)), dtype=torch.float64), *rows)


@torch.inference_mode()
def mean_loss(model: Any, text: Tokens, name: str, *, seq_len: int, batch_size: int, max_tokens: int) -> float:
    """The mean cross-entropy in nats of each next token within the windows of a text.

    Raises:
        DataError: the text has fewer than two tokens, or one that the model does not know.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    total, count = 0.0, 0
    for batch in read_batches(text, seq_len, batch_size, min(text.num_tokens, max_tokens)):
        check_known(f"--val {name}", batch, vocabulary)
        loss_T = next_token_losses(model, batch)
        total, count = total + float(loss_T.double().sum()), count + len(loss_T)
    if not count:
        raise DataError(f"--val {name}: the text has no next token to predict; give a longer one")
    return total / count


def next_token_losses(model: Any, batch: Batch) -> Tensor:
    """(T,), the cross-entropy in nats of each next token within a batch's windows; filling has none."""
    ids_BS = batch.ids_BS.to(model.get_input_embeddings().weight.device)
    logits_TV = model(input_ids=ids_BS, use_cache=False).logits[:, :-1].float().flatten(0, 1)
    ids_T = ids_BS[:, 1:].flatten().to(logits_TV.device)
    loss_T = nn.functional.cross_entropy(logits_TV, ids_T, reduction="none")
    if batch.mask_T is not None:
        loss_T = loss_T[batch.mask_T.reshape(ids_BS.shape)[:, 1:].flatten().to(loss_T.device)]
    return loss_T
