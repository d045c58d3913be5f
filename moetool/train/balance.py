"""Balance strategies: what keeps a router from sending everything to a few experts.

Shapes: T tokens of a micro-batch, E experts, K top-k, L layers.

A strategy is a loss, here, or acts on the choice of experts (selection.py). The training loss is the
language loss plus, for each loss, its coefficient times the mean of its values over the layers and
over the micro-batches of the step. The mean over layers keeps a coefficient's meaning when the depth
changes; every layer is judged by itself (but for pooled-aux), so that two layers that collapse in
opposite ways do not look balanced together.

Padding has no part in any of it: training batches have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moetool import registry
from moetool.errors import ConfigError
from moetool.registry import names
from moetool.routing.capture import Route, RouterCapture, has_routers
from moetool.train.config import TrainConfig
from moetool.train.selection import Selection
from moetool.train.terms import Forward, Term

DEFAULT = ("aux", "z-loss")


def aux(forward: Forward) -> Tensor:
    """Load-balancing loss of each layer: E * sum over experts of f_e * P_e.

    f_e is the share of the T * K routes that expert e received (no gradient) and P_e its mean router
    probability, the softmax over all experts (sigmoid routers: the scores divided by their sum over all
    experts): Fedus et al. 2022 (Switch Transformers, arXiv 2101.03961), equations 4 to 6, extended to
    top-k by counting all K routes. The value is 1 when the load is uniform, whatever E and K, and at
    most E. transformers divides by T instead of T * K (and pools the layers), so its balanced value is
    K: coefficient c here is c / K there.
    """
    return _switch(mean_probabilities(forward.routes), forward.counts_LE)


def global_aux(forward: Forward) -> Tensor:
    """`aux` with f_e of the whole step: counted over all processes and its micro-batches so far.

    A micro-batch is a handful of sequences, often of one domain; balance within each of them keeps
    experts from specialising. Qiu et al. 2025 (Demons in the Detail, arXiv 2501.11873), section 3, who
    call it the global-batch load-balancing loss. P_e stays that of the micro-batch, whose gradient it
    carries. With one micro-batch and process per step it is `aux`. The default coefficient is that of `aux`.
    """
    return _switch(mean_probabilities(forward.routes), forward.step_counts_LE)


def pooled_aux(forward: Forward) -> Tensor:
    """`aux` of all layers as if they were one: f_e and P_e are means over the tokens of every layer.

    The loss of the Drop-Upcycling runs (Nakamura et al. 2025, arXiv 2502.19261), which is transformers'
    `load_balancing_loss_func` divided by K: 1 when balanced, and coefficient c here is c / K there.
    Their 0.02 with K = 2 is the default, 0.04. Layers that collapse in opposite ways look balanced.
    """
    probability_1E = mean_probabilities(forward.routes).mean(dim=0, keepdim=True)
    return _switch(probability_1E, forward.counts_LE.sum(dim=0, keepdim=True))


def z_loss(forward: Forward) -> Tensor:
    """Mean over tokens of logsumexp(router logits) squared, in each layer.

    Keeps router logits small: Zoph et al. 2022 (ST-MoE, arXiv 2202.08906), equation 5.
    """
    return torch.stack([route.logits_TE.logsumexp(dim=-1).square().mean() for route in forward.routes])


AUX = Term(aux, 0.01)
GLOBAL_AUX = Term(global_aux, 0.01, needs=("step counts",))
POOLED_AUX = Term(pooled_aux, 0.04)
Z_LOSS = Term(z_loss, 0.001)
# `--balance none`: the language loss alone.
NONE = None


def mean_probabilities(routes: Sequence[Route]) -> Tensor:
    """P: each expert's mean router probability, float32 (L, E), with gradient."""
    return torch.stack([route.probabilities_TE().mean(dim=0) for route in routes])


def _switch(probability_LE: Tensor, counts_LE: Tensor) -> Tensor:
    load_LE = counts_LE / counts_LE.sum(dim=-1, keepdim=True)
    return probability_LE.shape[-1] * (load_LE.to(probability_LE.dtype) * probability_LE).sum(dim=-1)


@torch.no_grad()
def count_routes(routes: Sequence[Route]) -> Tensor:
    """Routes to each expert, int64 (L, E); empty without routes."""
    if not routes:
        return torch.zeros(0, 0, dtype=torch.int64)
    indices_LR = torch.stack([route.indices_TK.flatten() for route in routes])
    counts_LE = torch.zeros(len(routes), routes[0].logits_TE.shape[-1], dtype=torch.int64, device=indices_LR.device)
    return counts_LE.scatter_add_(1, indices_LR, torch.ones_like(indices_LR))


def parse(values: Sequence[str]) -> dict[str, float]:
    """Read `--balance NAME[=COEFFICIENT]` values; none of them means the default.

    Returns:
        Name -> coefficient, 0 where it takes none; empty for `none`.

    Raises:
        ConfigError: an unknown name, a coefficient that is not a positive number, a name given twice, or
            `none` beside others, or strategies that exclude each other.
    """
    chosen: dict[str, float] = {}
    for value in values or DEFAULT:
        name, equals, text = value.partition("=")
        strategy = registry.load("balance", name)
        if name in chosen:
            raise ConfigError(f"--balance {name} is given twice")
        if strategy is NONE and (equals or len(values) > 1):
            raise ConfigError(f"--balance {value}: 'none' takes no coefficient and cannot be combined with others")
        default = getattr(strategy, "coefficient", 0.0)
        if strategy is not NONE and equals and not default:
            raise ConfigError(f"--balance {value}: '{name}' takes no coefficient")
        try:
            chosen[name] = float(text) if equals else default
        except ValueError:
            chosen[name] = -1.0
        if default and not 0 < chosen[name] < float("inf"):
            raise ConfigError(f"--balance {value}: the coefficient must be a number above 0, such as {name}=0.01")
    if "sinkhorn" in chosen and "loss-free" in chosen:
        raise ConfigError(
            "--balance sinkhorn and loss-free: Sinkhorn's choices are always balanced, so the selection bias would"
            " learn nothing; give one of them"
        )
    return {name: coefficient for name, coefficient in chosen.items() if registry.load("balance", name) is not NONE}


def build_terms(balance: Mapping[str, float]) -> dict[str, Term]:
    """The strategies of a run that are losses, by name, with the run's coefficients."""
    return {
        name: replace(strategy, coefficient=balance[name])
        for name, strategy in _chosen(balance).items()
        if isinstance(strategy, Term)
    }


def build_selections(
    balance: Mapping[str, float], model: nn.Module, capture: RouterCapture, empty: RouterCapture | None = None
) -> list[Selection]:
    """The strategies of a run that act on the choice of experts, at work on a model's routers; see Selection.

    Raises:
        ConfigError: the model's family does not allow it.
    """
    chosen = _chosen(balance).items()
    return [kind(model, capture, balance[name], empty) for name, kind in chosen if not isinstance(kind, Term)]


def _chosen(balance: Mapping[str, float]) -> dict[str, Term | type[Selection]]:
    return {name: registry.load("balance", name) for name in names("balance") if name in balance}


def check(config: TrainConfig, model: nn.Module) -> None:
    """Refuse options about routers that contradict each other or the model.

    Args:
        config: resolved.
        model: its weights may be on torch's meta device.

    Raises:
        ConfigError: says which.
    """
    if not has_routers(model):
        if config.freeze_router:
            raise ConfigError(f"--freeze-router: {config.model} is a dense model without a router; leave it out")
        return
    check_frozen(config.balance, config.freeze_router)
    build_selections(config.balance, model, RouterCapture(model))


def check_frozen(balance: Mapping[str, float], freeze_router: bool) -> None:
    """Refuse losses for routers that do not learn.

    Raises:
        ConfigError: names them, and the strategies that may stay.
    """
    learning = list(build_terms(balance))
    if freeze_router and learning:
        raise ConfigError(
            f"--freeze-router: a frozen router does not learn from --balance {', '.join(learning)};"
            " only sinkhorn, loss-free and none are possible"
        )


def freeze_routers(capture: RouterCapture) -> None:
    """`--freeze-router`: the routers get no gradient and no weight decay."""
    for router in capture.routers.values():
        router.requires_grad_(False)
