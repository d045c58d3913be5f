"""AdamW over the weights of a run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from moetool.train.config import TrainConfig

EPSILON = 1e-8


def adamw(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101).

    Tensors of two or more dimensions decay (projections, experts, routers, embeddings), norms and
    biases do not, as in Megatron-LM and GPT-NeoX. The learning rate is set before each update.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=EPSILON,
        fused=trained[0].device.type in ("cpu", "cuda"),
    )
