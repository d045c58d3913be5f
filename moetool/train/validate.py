"""The mean loss over every token of a validation set, computed by all processes together.

Shapes: B sequences, S their length, T tokens that are predicted, V vocabulary, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from moetool.data.tokens import TokenStream
from moetool.errors import ConfigError
from moetool.progress import Progress
from moetool.routing.capture import Route, RouterCapture
from moetool.train.accelerator import Accelerator, reshard, sum_dtype, total
from moetool.train.batches import IGNORED, MicroBatch, validation_batches
from moetool.train.config import TrainConfig
from moetool.train.execution import evaluating
from moetool.train.loss import LanguageLoss, logits
from moetool.train.metrics_log import routing_row


def validate_all(
    model: Any,
    capture: RouterCapture | None,
    language_loss: LanguageLoss,
    val: Mapping[str, TokenStream],
    config: TrainConfig,
    accelerator: Accelerator,
    progress: Progress,
) -> tuple[dict[str, float], dict[str, Any]]:
    """`validate` on every set: losses and routing by name; routing is empty for a dense model."""
    losses: dict[str, float] = {}
    routings: dict[str, Any] = {}
    model.eval()
    for done, (name, stream) in enumerate(val.items()):
        progress("validate", done, len(val), name)
        with evaluating(config):
            losses[name], routing = validate(model, capture, language_loss, stream, config, accelerator)
        if routing:
            routings[name] = routing
    reshard(model)
    if val:
        progress("validate", len(val), len(val))
    return losses, routings


@torch.no_grad()
def validate(
    model: Any,
    capture: RouterCapture | None,
    language_loss: LanguageLoss,
    stream: TokenStream,
    config: TrainConfig,
    accelerator: Accelerator,
) -> tuple[float, dict[str, Any] | None]:
    """Loss and routing of one validation set.

    Args:
        model: in evaluation mode; not wrapped for gradients.
        capture: on its routers; None for a dense model.
        language_loss: see loss.py.
        stream: the set.
        config: of the run.
        accelerator: its processes, which must all call.

    Returns:
        The mean loss, and `mri`, `entropy` and `dead_experts` of each layer over the predicted places.
    """
    device = accelerator.device
    sums: Tensor = torch.zeros(2, dtype=sum_dtype(device), device=device)
    counts_LE: Tensor | None = None
    mesh = config.mesh
    for one in validation_batches(stream, config, mesh.rank(accelerator.process_index), mesh.data_parallel):
        batch = one.ready_for(device)
        collect: AbstractContextManager[list[Route]] = capture.collect() if capture else nullcontext([])
        with collect as routes:
            loss = language_loss(model, batch, device)
        predicted_T = batch.labels.flatten().to(device, non_blocking=True) != IGNORED
        sums += torch.stack([loss.to(sums), predicted_T.sum().to(sums)])
        if routes:
            counted = torch.stack([_counts(route, predicted_T) for route in routes])
            counts_LE = counted if counts_LE is None else counts_LE + counted
    loss_sum, count = total(accelerator, mesh, sums).tolist()
    routing = None
    if counts_LE is not None:
        routing = routing_row(total(accelerator, mesh, counts_LE).cpu().long().numpy(), int(count))
    return loss_sum / count, routing


def _counts(route: Route, predicted_T: Tensor) -> Tensor:
    """Routes to each expert from the predicted places, (E,)."""
    counts_E = torch.zeros(route.logits_TE.shape[-1], dtype=torch.int64, device=predicted_T.device)
    weights_TK = predicted_T[:, None].expand_as(route.indices_TK).long()
    return counts_E.scatter_add_(0, route.indices_TK.flatten(), weights_TK.flatten())


@torch.no_grad()
def check_documents_apart(model: Any, half: bool = False) -> None:
    """Refuse `--no-cross-document` for a model that does not keep documents apart by their positions.

    Two documents of random tokens run in one sequence and each alone: the logits must be the same.

    Args:
        model: of transformers.
        half: whether it computes in bf16.

    Raises:
        ConfigError: they are not.
    """
    device = next(model.parameters()).device
    model.eval()
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.get_input_embeddings().num_embeddings
    documents = [torch.randint(vocab_size, (1, length), generator=generator) for length in (7, 9)]
    places = [torch.arange(document.shape[1])[None] for document in documents]

    def run(tokens: Tensor, positions: Tensor) -> Tensor:
        return logits(model, MicroBatch(tokens, tokens, positions), device).float()

    together = run(torch.cat(documents, dim=1), torch.cat(places, dim=1))
    alone = torch.cat([run(*pair) for pair in zip(documents, places, strict=True)], dim=1)
    near = 3e-2 if half else 1e-3
    if not torch.allclose(together, alone, rtol=0, atol=near * float(alone.abs().max())):
        raise ConfigError(
            f"--no-cross-document: {type(model).__name__} lets tokens attend to earlier documents even so; leave the"
            f" option out"
        )
