"""The loss of a micro-batch: the language loss and further terms, and their sums over a step.

Shapes: T tokens of a micro-batch, V vocabulary, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moetool.routing.capture import Route
from moetool.train.batches import MicroBatch

Need = Literal["step counts", "logits"]


class Taught(NamedTuple):
    """A teacher's contribution to a micro-batch (see teacher.py).

    Attributes:
        trained: what is trained on in place of the language loss, a sum over the tokens, with its gradient.
        sums_2: the divergence from the teacher, a sum over the tokens that have one, and their number.
    """

    trained: Tensor
    sums_2: Tensor


@dataclass(frozen=True)
class Forward:
    """The results of a micro-batch's forward pass, for all terms of its loss.

    Attributes:
        batch: its tokens.
        language_loss: sum of the cross-entropy over the predicted ones, with its gradient.
        routes: of each layer, with their gradient; none of a dense model.
        counts_LE: int64, routes to each expert.
        step_counts_LE: the same over all processes and the step's micro-batches so far; where no term needs
            that, `counts_LE`.
        logits_TV: float32, with their gradient; empty where no term needs them.
        taught: by the teacher, if there is one; the language loss then has no gradient.
    """

    batch: MicroBatch
    language_loss: Tensor
    routes: Sequence[Route]
    counts_LE: Tensor
    step_counts_LE: Tensor
    logits_TV: Tensor
    taught: Taught | None = None


@dataclass(frozen=True)
class Term:
    """A loss beside the language loss.

    Attributes:
        values: float32 losses of a micro-batch, with their gradient: of each layer, or a single one. Their mean
            counts.
        coefficient: the factor of that mean.
        needs: what it reads of a Forward that is made only for those who do.
    """

    values: Callable[[Forward], Tensor]
    coefficient: float
    needs: Sequence[Need] = ()


class Sums(NamedTuple):
    """Sums over micro-batches.

    They are those of the language loss, of what a teacher adds (`Taught.sums_2`; empty without one), of each term's
    mean by name, and of the routes to each expert.
    """

    loss: Tensor
    taught: Tensor
    terms: Mapping[str, Tensor]
    counts_LE: Tensor

    def flat(self, dtype: torch.dtype) -> Tensor:
        """One vector of all of them, which processes add up at once."""
        parts = [self.loss, self.taught, *self.terms.values(), self.counts_LE]
        return torch.cat([part.flatten().to(self.loss.device, dtype) for part in parts])

    def named(self, flat: Tensor) -> Sums:
        """The sums that lie in such a vector."""
        sizes = [1, self.taught.numel(), len(self.terms), self.counts_LE.numel()]
        loss, taught, terms, counts = flat.split(sizes)
        return Sums(loss[0], taught, dict(zip(self.terms, terms, strict=True)), counts.reshape(self.counts_LE.shape))
