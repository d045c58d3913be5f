"""How strongly a model's loss on some texts depends on each expert.

Shapes: E experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moetool.calibration.experts import layers_with_experts
from moetool.calibration.text_pass import next_token_losses
from moetool.errors import DataError
from moetool.progress import Progress, silent
from moetool.routing.text_pass import Tokens, Windows, read_batches


def expert_gradients(
    model: Any,
    texts: Mapping[str, Tokens],
    windows: Windows,
    progress: Progress = silent,
) -> dict[int, Tensor]:
    """Squared norm of the gradient of the mean loss, over all weights of an expert.

    The best of the utilities by which arXiv 2604.19835 (table 3) copies experts; there, of the first matrix alone.
    Gradients are summed in fp32, whatever the weights are, which takes 4 bytes for each weight of the experts.

    Args:
        model: a causal language model of transformers; its parameters are frozen afterwards.
        texts: name -> tokens.
        windows: how they are read.
        progress: reports tokens.

    Returns:
        Layer -> (E,), float64.

    Raises:
        CheckpointError: the experts cannot be read.
        DataError: a text has no next token, or one that the model does not know.
    """
    layers = layers_with_experts(model)
    weights = {n: [one.experts.gate_up_proj, one.experts.down_proj] for n, one in layers.items()}
    model.requires_grad_(False)
    for weight in (weight for pair in weights.values() for weight in pair):
        weight.requires_grad_(True)
        weight.grad_dtype = torch.float32
    vocabulary, count = model.get_input_embeddings().num_embeddings, 0
    for name, text in texts.items():
        total, before, done = windows.num_tokens(text), count, 0
        for batch in read_batches(text, windows, vocabulary, f"--data {name}"):
            ids_BS = batch.ids_BS.to(model.get_input_embeddings().weight.device)
            loss_T = next_token_losses(batch, model(input_ids=ids_BS, use_cache=False).logits)
            if len(loss_T):
                loss_T.sum().backward()
            count, done = count + len(loss_T), done + len(batch.tokens_N)
            progress(f"gradients on {name}", done, total)
        if count == before:
            raise DataError(f"--data {name}: the text has no next token to predict; give a longer one")
    found = {n: (_squares(both) + _squares(down)) / count**2 for n, (both, down) in weights.items()}
    for weight in (weight for pair in weights.values() for weight in pair):
        weight.grad = None
        weight.requires_grad_(False)
    return found


def _squares(weight: Tensor) -> Tensor:
    """Sum of the squares of the gradient of each expert's part, (E,) in float64 on the CPU; 0 without a gradient."""
    if weight.grad is None:  # no token went to any of the layer's experts
        return torch.zeros(len(weight), dtype=torch.float64)
    return torch.stack([part.double().square().sum().cpu() for part in weight.grad])
