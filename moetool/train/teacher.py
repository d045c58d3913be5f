"""A teacher: a model whose predictions the trained one stays close to, on replayed sequences or on all.

loss = (1 - w) CE + w tau^2 KL(softmax(teacher / tau) || softmax(model / tau)) for each token that has a teacher, CE for
all others: the forward divergence of Hinton et al. 2015 (Distilling the Knowledge in a Neural Network, arXiv
1503.02531, section 2), whose factor tau^2 keeps its gradient at the size of that of the cross-entropy.

Shapes: T tokens of a micro-batch, of which the first R have a teacher; V vocabulary of the model, W of the teacher, D
hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from moetool.checkpoint.model import load_tokenizer, skeleton, tokenizer_sha256
from moetool.errors import ConfigError
from moetool.mesh import check_model
from moetool.routing.capture import has_routers
from moetool.train import execution, loss
from moetool.train.batches import IGNORED, MicroBatch
from moetool.train.config import TrainConfig
from moetool.train.terms import Taught


def check_teacher(config: TrainConfig, model: Any) -> Any:
    """Refuse a teacher that cannot be compared with the model token by token, before weights are read.

    Args:
        config: resolved.
        model: without weights.

    Returns:
        The teacher without weights; None where there is none.

    Raises:
        CheckpointError: it cannot be used.
        ConfigError: it does not fit the model, or the mesh.
        DataError: it has no tokenizer.
    """
    folder, mesh = config.teacher, config.mesh
    if folder is None:
        return None
    if mesh.ep > 1 or mesh.tp > 1:
        raise ConfigError(
            f"--teacher: --ep and --tp divide experts and matrices that a teacher of another family does not have"
            f" ({mesh}); use --fsdp, which shards both models, or leave --teacher out"
        )
    teacher = skeleton(folder)
    if tokenizer_sha256(folder) != tokenizer_sha256(config.model):
        raise ConfigError(
            f"--teacher {folder}: its tokenizer is not that of {config.model}, so their predictions cannot be compared;"
            " give a model with the same tokenizer"
        )
    rows, known = teacher.get_input_embeddings().num_embeddings, len(load_tokenizer(folder))
    if rows < known:
        raise ConfigError(
            f"--teacher {folder}: its tokenizer has {known} tokens, but it has {rows} embedding rows; give the teacher"
            " that belongs to the tokenizer"
        )
    positions = getattr(teacher.config.get_text_config(), "max_position_embeddings", None) or 2**31
    if config.seq_len > positions:
        raise ConfigError(
            f"--seq-len {config.seq_len}: the teacher {folder} has {positions} positions; give at most that"
        )
    check_model(mesh, teacher)
    return teacher


def share_taught(config: TrainConfig) -> float:
    """The share of the tokens that have a teacher; `config` is resolved."""
    if config.teacher is None:
        return 0.0
    return 1.0 if config.teacher_on == "all" else float(config.replay_ratio)


@dataclass(frozen=True)
class Teacher:
    """A teacher, ready to predict.

    Attributes:
        model: its weights, in the precision of the run and without gradients, in evaluation mode.
        head: of it, where its logits can be made some tokens at a time; else None.
        taught_head: the same of the model that is trained.
        weight: of the divergence, 0..1.
        temperature: of both distributions.
        compiled: whether what is done to the logits is compiled.
        shared: whether processes share its weights, so that all must run it as often.
    """

    model: Any
    head: nn.Linear | None
    taught_head: nn.Linear | None
    weight: float
    temperature: float
    compiled: bool
    shared: bool

    def read(self, model: Any, batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The factors of the trained model's logits, see `loss.states`."""
        return loss.states(self.taught_head, model, batch, device)

    def teach(self, states_TD: Tensor, weight_VD: Tensor | None, batch: MicroBatch) -> tuple[Tensor, Taught]:
        """The language loss of a micro-batch without its gradient, and the loss to train on.

        Args:
            states_TD: what the model's logits are made of, with their gradient.
            weight_VD: likewise.
            batch: the tokens.
        """
        # The number of sequences with a teacher differs, so what is compiled is for any.
        plain = partial(_apart, step=loss.language_step(self.compiled, dynamic=True))
        lesson = self._ask(batch, states_TD.device)
        sums_3 = loss.linear_loss(states_TD, weight_VD, batch, plain, lesson)
        tokens = batch.labels[: batch.taught].numel()
        _, language_loss, divergence = sums_3.detach()
        return language_loss, Taught(sums_3[0], torch.stack([divergence, torch.full_like(divergence, tokens)]))

    @torch.no_grad()
    def _ask(self, batch: MicroBatch, device: torch.device) -> loss.Lesson:
        step = partial(_compiled() if self.compiled else teach_step, weight=self.weight, temperature=self.temperature)
        rows = max(batch.taught, 1) if self.shared else batch.taught
        if not rows:
            return loss.Lesson(torch.empty(0, 0, device=device), None, step)
        positions = None if batch.positions is None else batch.positions[:rows]
        asked = MicroBatch(batch.inputs[:rows], batch.labels[:rows], positions)
        states_RD, weight_WD = loss.states(self.head, self.model, asked, device)
        return loss.Lesson(states_RD[: batch.labels[: batch.taught].numel()], weight_WD, step)


def ready(core: Any, config: TrainConfig, taught: Any) -> Teacher:
    """A loaded model as a teacher.

    Args:
        core: of the teacher, in the precision of the run; is changed in place.
        config: resolved.
        taught: the model that is trained, likewise; not yet compiled.

    Raises:
        ConfigError: a function for its experts is not there or is wrong.
    """
    if config.experts_implementation != "auto" and has_routers(core):
        execution.set_experts(core, config.experts_implementation)
    core.requires_grad_(False)
    core.eval()
    heads = loss.product_head(core), loss.product_head(taught)
    if config.compile:  # as the model is, so that both round alike
        execution.compile_layers(core)
    return Teacher(
        core,
        *heads,
        config.teacher_weight,
        config.teacher_temperature,
        compiled=config.compile or config.liger,
        shared=config.mesh.sharded,
    )


def teach_step(
    logits_TV: Tensor, labels_T: Tensor, teacher_TW: Tensor, weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """The loss of tokens that have a teacher, and its gradient.

    Where one model has more rows of embeddings than the other (padding), the divergence is over the tokens of both, and
    the cross-entropy over all.

    Args:
        logits_TV: of the model.
        labels_T: the tokens that follow; IGNORED counts nothing.
        teacher_TW: logits of the teacher.
        weight: of the divergence.
        temperature: of both distributions.

    Returns:
        Sums over the tokens (3,): of what is trained on, of the cross-entropy, of the divergence (at the temperature,
        without its square). The gradient of the first by the model's logits, in their dtype.
    """
    exact_TV, common = logits_TV.float(), min(logits_TV.shape[1], teacher_TW.shape[1])
    language_loss, gradient_TV = loss.cross_entropy(exact_TV, labels_T)
    predicted_T1 = (labels_T != IGNORED)[:, None]
    teacher_TV = (teacher_TW[:, :common].float() / temperature).log_softmax(dim=-1)
    model_TV = (exact_TV[:, :common] / temperature).log_softmax(dim=-1)
    chances_TV = teacher_TV.exp()
    divergence = (chances_TV * (teacher_TV - model_TV) * predicted_T1).sum()
    gradient_TV *= 1 - weight
    gradient_TV[:, :common] += (model_TV.exp() - chances_TV) * predicted_T1 * (weight * temperature)
    trained = (1 - weight) * language_loss + weight * temperature**2 * divergence
    return torch.stack([trained, language_loss, divergence]), gradient_TV.to(logits_TV.dtype)


@cache
def _compiled() -> Any:
    return torch.compile(teach_step, dynamic=True)


def _apart(logits_TV: Tensor, labels_T: Tensor, step: loss.Step) -> tuple[Tensor, Tensor]:
    """The same of tokens without a teacher."""
    language_loss, gradient_TV = step(logits_TV, labels_T)
    return torch.stack([language_loss, language_loss, torch.zeros_like(language_loss)]), gradient_TV
