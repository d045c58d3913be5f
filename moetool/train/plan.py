"""What a run is going to do, told before it does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from moetool.data.mixture import TokenMixture
from moetool.errors import CheckpointError
from moetool.routing.capture import RouterCapture
from moetool.train.batches import Corpus
from moetool.train.config import TrainConfig


def skeleton(folder: Path) -> Any:
    """The model of a checkpoint without its weights (on torch's meta device): seconds at any size.

    Raises:
        CheckpointError: transformers knows no causal language model for its config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a damaged or foreign config fails in a dozen ways
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {reason}") from None


def describe(
    config: TrainConfig, model: nn.Module, capture: RouterCapture | None, mixture: TokenMixture, corpus: Corpus
) -> tuple[dict[str, Any], list[str]]:
    """The plan of a run, as plain values, and warnings.

    Args:
        config: resolved.
        model: with its weights.
        capture: on its routers; None for a dense model.
        mixture: of the sources.
        corpus: what they and the validation sets are.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    active, warnings = total, []
    if capture is not None:
        device = next(model.parameters()).device
        with torch.no_grad(), capture.collect() as routes:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
        num_experts, top_k = routes[0].logits_TE.shape[-1], routes[0].indices_TK.shape[-1]
        experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        active = total - experts + experts * top_k // num_experts
        # Seen in what the routers return, so that it holds for every family and every flag.
        if top_k == 1 and all(bool((route.weights_TK == 1).all()) for route in routes):
            warnings.append(
                "top-1 routing with weights divided by their sum: every weight is 1, so the language loss gives the"
                " router no gradient and only the balance losses train it; use a top-k of 2 or more, or a family that"
                " does not normalise"
            )
    ledger = mixture.ledger(config.max_steps * config.global_batch_size)
    plan = {
        "num_parameters": total,
        "num_active_parameters": active,
        "steps": config.max_steps,
        "tokens": config.max_tokens,
        "seq_len": config.seq_len,
        "global_batch_size": config.global_batch_size,
        "micro_batch_size": config.micro_batch_size,
        "precision": config.precision,
        "balance": dict(config.balance),
        "sources": {
            name: {
                **entry,
                "replay": name in config.replay,
                "available_tokens": mixture.sources[name].stream.num_tokens,
            }
            for name, entry in ledger.items()
        },
        "val": {name: stream.num_tokens for name, stream in corpus.val.items()},
    }
    return plan, warnings
