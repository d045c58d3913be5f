"""The language loss of a micro-batch, if possible without fp32 logits of all its tokens.

Shapes: B sequences, S their length, T = B * S tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetool.cost.memory import CHUNK_ELEMENTS
from moetool.train import documents
from moetool.train.batches import IGNORED, MicroBatch

LanguageLoss = Callable[[Any, MicroBatch, torch.device], Tensor]
# Logits and labels of some tokens -> sums over them, and the gradient of the first sum by the logits.
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Lesson(NamedTuple):
    """A teacher's predictions for the first R of a batch's tokens.

    Attributes:
        states_RD: its hidden states, or its logits where there is no matrix.
        weight_VD: the matrix of its head.
        step: as a Step, with its logits as a third argument.
    """

    states_RD: Tensor
    weight_VD: Tensor | None
    step: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def logits(model: Any, batch: MicroBatch, device: torch.device) -> Tensor:
    """Logits of a batch, (B, S, V). Places that begin anew make transformers keep documents apart."""
    apart = {} if batch.positions is None else {"position_ids": batch.positions.to(device, non_blocking=True)}
    with documents.told(batch.positions):
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
    head = product_head(core)
    if head is None:
        return None
    step = language_step(compiled)

    def loss(model: Any, batch: MicroBatch, device: torch.device) -> Tensor:
        return linear_loss(*states(head, model, batch, device), batch, step)

    return loss


def product_head(core: Any) -> nn.Linear | None:
    """The head of a model whose logits are its product with the hidden states, and perhaps a factor; else None."""
    head = core.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None or not _scales(core, head):
        return None
    return head


def states(head: nn.Linear | None, model: Any, batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The factors of the logits: hidden states (T, D) and the head's matrix; without a head, logits (T, V) and None."""
    if head is None:
        return logits(model, batch, device).flatten(0, 1), None
    with _handing_on(head, lambda hidden: hidden):
        return logits(model, batch, device).flatten(0, 1).to(head.weight.dtype), head.weight


def linear_loss(
    states_TD: Tensor, weight_VD: Tensor | None, batch: MicroBatch, step: Step, lesson: Lesson | None = None
) -> Tensor:
    """The sums of a step over the tokens of a batch, some at a time; only the first has a gradient.

    Args:
        states_TD: hidden states, or logits where there is no matrix.
        weight_VD: the matrix of the head.
        batch: the tokens.
        step: of those without a teacher.
        lesson: of those with one.
    """
    labels_T = batch.labels.flatten().to(states_TD.device, non_blocking=True)
    wanted = torch.is_grad_enabled()
    sums: Tensor = _LinearCrossEntropy.apply(states_TD, weight_VD, labels_T, step, wanted, lesson)
    return sums


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
    """Sums over the tokens of a loss of hidden @ weight.T, the gradient of the first computed along with them.

    So no logits are kept for the backward: a chunk's are turned into its gradient's. Logits are rounded to the dtype of
    the head, everything after them is fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states_TD: Tensor,
        weight_VD: Tensor | None,
        labels_T: Tensor,
        step: Step,
        wanted: bool,
        lesson: Lesson | None = None,
    ) -> Tensor:
        taught = len(lesson.states_RD) if lesson else 0
        vocabulary = states_TD.shape[1] if weight_VD is None else weight_VD.shape[0]
        chunks = [*_chunks(0, taught, vocabulary), *_chunks(taught, len(states_TD), vocabulary)]
        total: Tensor = torch.zeros((), device=states_TD.device)
        learns = wanted and ctx.needs_input_grad[1]  # a head that is not trained has no gradient
        grad_states_TD = torch.empty_like(states_TD) if wanted else None
        grad_weight_VD: Tensor | None = None
        for chunk in chunks:
            chunk_TD, chunk_T = states_TD[chunk], labels_T[chunk]
            logits_TV = _logits(chunk_TD, weight_VD)
            if lesson and chunk.start < taught:
                sums, gradient_TV = lesson.step(logits_TV, chunk_T, _logits(lesson.states_RD[chunk], lesson.weight_VD))
            else:
                sums, gradient_TV = step(logits_TV, chunk_T)
            total = total + sums
            if grad_states_TD is not None:
                grad_states_TD[chunk] = gradient_TV if weight_VD is None else gradient_TV @ weight_VD
            if learns:
                part_VD = gradient_TV.T @ chunk_TD
                if len(chunks) > 1:
                    part_VD = part_VD.float() if grad_weight_VD is None else grad_weight_VD.add_(part_VD)
                grad_weight_VD = part_VD
        if wanted:
            ctx.save_for_backward(grad_states_TD, grad_weight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_states_TD, grad_weight_VD = ctx.saved_tensors
        first = grads[0].flatten()[0]
        # In place: nothing else holds them, and the weight's may be as large as the head.
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.mul_(first).to(grad_states_TD.dtype)
        return grad_states_TD.mul_(first), grad_weight_VD, None, None, None, None


def _chunks(start: int, stop: int, vocabulary: int) -> list[slice]:
    """Tokens from start to stop, as many at a time as have CHUNK_ELEMENTS logits, and evenly."""
    number = max(1, -(-(stop - start) * vocabulary // CHUNK_ELEMENTS))
    size = max(1, -(-(stop - start) // number))
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _logits(states_TD: Tensor, weight_VD: Tensor | None) -> Tensor:
    return states_TD if weight_VD is None else states_TD @ weight_VD.T


def _loss_and_gradient(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy, and its gradient by the logits in their dtype; IGNORED labels count nothing."""
    loss, gradient_TV = cross_entropy(logits_TV.float(), labels_T)
    return loss, gradient_TV.to(logits_TV.dtype)


def cross_entropy(exact_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy of logits in fp32, and its gradient by them; IGNORED labels count nothing."""
    predicted_T1 = (labels_T != IGNORED)[:, None]
    chosen_T1 = labels_T.clamp_min(0)[:, None]
    sums_T1 = exact_TV.logsumexp(dim=-1, keepdim=True)
    loss = ((sums_T1 - exact_TV.gather(1, chosen_T1)) * predicted_T1).sum()
    places_V = torch.arange(exact_TV.shape[1], device=exact_TV.device)
    return loss, ((exact_TV - sums_T1).exp() - (places_V == chosen_T1).float()) * predicted_T1


def language_step(compiled: bool, dynamic: bool = False) -> Step:
    """The step of the language loss alone.

    Args:
        compiled: whether it is, and keeps nothing in fp32.
        dynamic: whether it is compiled for any number of tokens.
    """
    return _compiled(dynamic) if compiled else _loss_and_gradient


@cache
def _compiled(dynamic: bool) -> Step:
    step: Step = torch.compile(_loss_and_gradient, dynamic=dynamic)
    return step
