"""The language loss of a micro-batch, without logits of all its tokens in fp32 where that can be had.

Shapes: B sequences, S their length, T = B * S tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetool.cost.memory import CHUNK_ELEMENTS
from moetool.train.batches import IGNORED, MicroBatch

LanguageLoss = Callable[[Any, MicroBatch, torch.device], Tensor]
_Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def logits(model: Any, batch: MicroBatch, device: torch.device) -> Tensor:
    """Logits of a batch, (B, S, V). Places that begin anew make transformers keep documents apart."""
    apart = {} if batch.positions is None else {"position_ids": batch.positions.to(device, non_blocking=True)}
    out: Tensor = model(input_ids=batch.inputs.to(device, non_blocking=True), use_cache=False, **apart).logits
    return out


def whole_loss(model: Any, batch: MicroBatch, device: torch.device) -> Tensor:
    """Sum of the cross-entropy over the predicted tokens of a batch, from logits of all of them in fp32."""
    return token_loss(logits(model, batch, device).flatten(0, 1).float(), batch)


def token_loss(logits_TV: Tensor, batch: MicroBatch) -> Tensor:
    """Sum of the cross-entropy over the predicted tokens of a batch, from its logits in fp32."""
    labels_T = batch.labels.flatten().to(logits_TV.device, non_blocking=True)
    return F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED, reduction="sum")


def chunked_loss(core: Any, compiled: bool = False) -> LanguageLoss | None:
    """`whole_loss` of a model whose weights are bf16, some tokens at a time; None where its head forbids that.

    Its head hands on the hidden states, and the product with the head's matrix is taken here. What a family does to
    its logits afterwards is then done to the hidden states: the same, if it is a factor. So a family that does
    anything else (a bias, a soft cap) is found out by trying.

    Args:
        core: the model, not wrapped.
        compiled: whether torch.compile makes it two kernels, which keep nothing in fp32.
    """
    head = core.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None or not _scales(core, head):
        return None
    step = _compiled() if compiled else _loss_and_gradient

    def loss(model: Any, batch: MicroBatch, device: torch.device) -> Tensor:
        with _handing_on(head, lambda hidden: hidden):
            hidden_TD = logits(model, batch, device).flatten(0, 1).to(head.weight.dtype)
        labels_T = batch.labels.flatten().to(device, non_blocking=True)
        with_gradient = torch.is_grad_enabled()
        total: Tensor = _LinearCrossEntropy.apply(hidden_TD, head.weight, labels_T, step, with_gradient)
        return total

    return loss


@contextmanager
def _handing_on(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


@torch.no_grad()
def _scales(core: Any, head: nn.Linear) -> bool:
    """Whether a model multiplies its logits by one factor, and does nothing else to them."""
    device, training = head.weight.device, core.training
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, head.in_features)
    probe_BSD = (100 * torch.randn(shape, generator=generator)).to(device, head.weight.dtype)
    tokens = torch.zeros(shape[:2], dtype=torch.int64)
    core.eval()
    with _handing_on(head, lambda hidden: probe_BSD):
        after_BSD = logits(core, MicroBatch(tokens, tokens, None), device)
    core.train(training)
    if after_BSD.shape != shape:
        return False
    ratio_BSD = after_BSD.float() / probe_BSD.float()
    return torch.allclose(ratio_BSD, ratio_BSD.mean().expand(shape), rtol=1e-2, atol=0)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross_entropy(hidden @ weight.T, labels), its gradient computed along with it.

    So no logits are kept for the backward: a chunk's are turned into its gradient's. Logits are rounded to bf16, as
    the head's are, everything after them is fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, step: _Step, wanted: bool) -> Tensor:
        chunks = -(-hidden_TD.shape[0] * weight_VD.shape[0] // CHUNK_ELEMENTS)
        size = -(-hidden_TD.shape[0] // max(1, chunks))
        total = torch.zeros((), device=hidden_TD.device)
        learns = wanted and ctx.needs_input_grad[1]  # a head that is not trained has no gradient
        grad_hidden_TD = torch.empty_like(hidden_TD) if wanted else None
        grad_weight_VD: Tensor | None = None
        for start in range(0, hidden_TD.shape[0], size):
            chunk_TD, chunk_T = hidden_TD[start : start + size], labels_T[start : start + size]
            loss, gradient_TV = step(chunk_TD @ weight_VD.T, chunk_T)
            total += loss
            if grad_hidden_TD is not None:
                grad_hidden_TD[start : start + size] = gradient_TV @ weight_VD
            if learns:
                part_VD = gradient_TV.T @ chunk_TD
                if chunks > 1:
                    part_VD = part_VD.float() if grad_weight_VD is None else grad_weight_VD.add_(part_VD)
                grad_weight_VD = part_VD
        if wanted:
            ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        (grad,) = grads
        # In place: nothing else holds them, and the weight's may be as large as the head.
        weight_VD = None if grad_weight_VD is None else grad_weight_VD.mul_(grad).to(grad_hidden_TD.dtype)
        return grad_hidden_TD.mul_(grad), weight_VD, None, None, None


def _loss_and_gradient(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy, and its gradient by the logits in their dtype; IGNORED labels count nothing."""
    predicted_T1 = (labels_T != IGNORED)[:, None]
    chosen_T1 = labels_T.clamp_min(0)[:, None]
    exact_TV = logits_TV.float()
    sums_T1 = exact_TV.logsumexp(dim=-1, keepdim=True)
    loss = ((sums_T1 - exact_TV.gather(1, chosen_T1)) * predicted_T1).sum()
    places_V = torch.arange(logits_TV.shape[1], device=logits_TV.device)
    gradient_TV = ((exact_TV - sums_T1).exp() - (places_V == chosen_T1).float()) * predicted_T1
    return loss, gradient_TV.to(logits_TV.dtype)


@cache
def _compiled() -> _Step:
    step: _Step = torch.compile(_loss_and_gradient, dynamic=False)
    return step
