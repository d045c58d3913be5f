"""Balance strategies: what keeps a router from sending everything to a few experts.

Shapes: T tokens of a micro-batch, E experts, K top-k, L layers.

A strategy is built once a run and called with the routes of each micro-batch; it gives one loss a
layer. The training loss is the language loss plus, for each strategy, its coefficient times the mean
of its losses over the layers and over the micro-batches of the step. The mean over layers keeps a
coefficient's meaning when the depth changes; every layer is judged by itself, so that two layers
that collapse in opposite ways do not look balanced together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from moetool import registry
from moetool.errors import ConfigError
from moetool.registry import names
from moetool.routing.capture import Route

DEFAULT = ("aux", "z-loss")


class Strategy(Protocol):
    """What the table of balance strategies holds.

    Attributes:
        coefficient: the factor of its loss where the user names none.
    """

    coefficient: ClassVar[float]

    def losses(self, routes: Sequence[Route]) -> Tensor:
        """One float32 loss a layer, shape (L,), with gradient, of one micro-batch."""
        ...


class Aux:
    """Load-balancing loss of each layer: E * sum over experts of f_e * P_e.

    f_e is the share of the T * K routes that expert e received (no gradient) and P_e its mean router
    probability, the softmax over all experts: Fedus et al. 2022 (Switch Transformers, arXiv
    2101.03961), equations 4 to 6, extended to top-k by counting all K routes. The value is 1 when the
    load is uniform, whatever E and K, and at most E. transformers divides by T instead of T * K (and
    pools the layers), so its balanced value is K: coefficient c here is c / K there.
    """

    coefficient: ClassVar[float] = 0.01

    def losses(self, routes: Sequence[Route]) -> Tensor:
        probability_LE = torch.stack([route.probabilities_TE().mean(dim=0) for route in routes])
        counts_LE = count_routes(routes)
        load_LE = counts_LE / counts_LE.sum(dim=-1, keepdim=True)
        return probability_LE.shape[-1] * (load_LE.to(probability_LE.dtype) * probability_LE).sum(dim=-1)


class ZLoss:
    """Mean over tokens of logsumexp(router logits) squared, in each layer.

    Keeps router logits small: Zoph et al. 2022 (ST-MoE, arXiv 2202.08906), equation 5.
    """

    coefficient: ClassVar[float] = 0.001

    def losses(self, routes: Sequence[Route]) -> Tensor:
        return torch.stack([route.logits_TE.logsumexp(dim=-1).square().mean() for route in routes])


# `--balance none`: the language loss alone.
NONE = None


@torch.no_grad()
def count_routes(routes: Sequence[Route]) -> Tensor:
    """Routes to each expert, int64 (L, E)."""
    counts_LE = torch.zeros(
        len(routes), routes[0].logits_TE.shape[-1], dtype=torch.int64, device=routes[0].indices_TK.device
    )
    indices_LR = torch.stack([route.indices_TK.flatten() for route in routes])
    return counts_LE.scatter_add_(1, indices_LR, torch.ones_like(indices_LR))


def parse(values: Sequence[str]) -> dict[str, float]:
    """Read `--balance NAME[=COEFFICIENT]` values; none of them means the default.

    Returns:
        Name -> coefficient; empty for `none`.

    Raises:
        ConfigError: an unknown name, a coefficient that is no positive number, a name given twice, or
            `none` beside others.
    """
    chosen: dict[str, float] = {}
    for value in values or DEFAULT:
        name, equals, text = value.partition("=")
        strategy = registry.load("balance", name)
        if name in chosen:
            raise ConfigError(f"--balance {name} is given twice")
        if strategy is NONE and (equals or len(values) > 1):
            raise ConfigError(f"--balance {value}: 'none' takes no coefficient and stands alone")
        try:
            chosen[name] = float(text) if equals else getattr(strategy, "coefficient", 0.0)
        except ValueError:
            chosen[name] = -1.0
        if strategy is not NONE and not 0 < chosen[name] < float("inf"):
            raise ConfigError(f"--balance {value}: the coefficient must be a number above 0, such as {name}=0.01")
    return {name: coefficient for name, coefficient in chosen.items() if registry.load("balance", name) is not NONE}


def build(balance: Mapping[str, float]) -> dict[str, Strategy]:
    """The strategies of a run by name."""
    return {name: registry.load("balance", name)() for name in names("balance") if name in balance}
