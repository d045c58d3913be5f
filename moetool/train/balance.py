"""Balance strategies, which keep a router from sending everything to a few experts.

Shapes: T tokens of a micro-batch, E experts, K top-k, L layers.

A strategy is a loss, here (coupling.py has one of weights alone), or acts on the choice of experts (selection.py). The
training loss is the language loss plus, for each loss, its coefficient times the mean of its values over the layers and
over the micro-batches of the step. The mean over layers keeps a coefficient's meaning when the depth
changes; every layer is judged by itself (but for pooled-aux), so that two layers that collapse in
opposite ways do not look balanced together.

Padding has no part in any of it: training batches have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moetool import registry
from moetool.errors import ConfigError
from moetool.registry import names
from moetool.routing.capture import Route, RouterCapture, has_routers
from moetool.train.config import TrainConfig
from moetool.train.selection import PLAIN, How, Strategy
from moetool.train.terms import Forward, Term

DEFAULT = ("aux", "z-loss")
# Of adaptive-aux: an expert's capacity in mean loads, and how much of a coefficient a step keeps.
CAPACITY, MEMORY = 1.25, 0.99


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


def seq_aux(forward: Forward) -> Tensor:
    """`aux` per sequence, averaged over the sequences.

    With f_e = E / (K T) times the routes of a sequence of T tokens to expert e, and P_e the mean over its tokens of
    s_e / sum_j s_j: sum over experts of f_e * P_e. DeepSeek-V3 (arXiv 2412.19437), equations 17 to 20, with their
    coefficient 1e-4 beside a bias that balances the whole (`loss-free`). A sequence is a row of the batch, whatever
    documents are in it.
    """
    B = forward.batch.inputs.shape[0]
    probability_LBE = torch.stack([r.probabilities_TE().unflatten(0, (B, -1)).mean(dim=1) for r in forward.routes])
    indices_LBR = torch.stack([route.indices_TK.reshape(B, -1) for route in forward.routes])
    counts_LBE = torch.zeros_like(probability_LBE).scatter_add_(
        2, indices_LBR, torch.ones_like(indices_LBR, dtype=probability_LBE.dtype)
    )
    return _switch(probability_LBE, counts_LBE).mean(dim=1)


class AdaptiveAux(Strategy):
    """`aux` with a coefficient of each layer that follows its imbalance, from 0 to the one that is given.

    After each step, with d the share of the layer's routes that exceed an expert's capacity of 1.25 times the mean
    load, a <- 0.99 a + 0.01 min(d / 5, a_max); a begins at a_max. Skywork-MoE (Wei et al. 2024, arXiv 2406.06563),
    section 4.2, equations 7 to 9, whose d is the rate of tokens that are dropped; nothing is dropped here, so it is
    counted: d = sum over experts of max(0, f_e - 1.25 / E), f the load of the step over all processes. 2 of 8 experts
    in use give 0.69, so a = a_max; of balanced layers a halves in 69 steps. The values are a / a_max times those of
    `aux`, because the coefficient is a_max.
    """

    coefficient: ClassVar[float] = 0.01
    teaches_routers: ClassVar[bool] = True

    def __init__(self, model: nn.Module, capture: RouterCapture, coefficient: float, how: How = PLAIN) -> None:
        self._most, self._now_L = coefficient, torch.full((len(capture.layers),), coefficient, dtype=torch.float64)
        self.state = {"adaptive-aux": self._now_L}
        self.term = Term(self._values, coefficient)

    def _values(self, forward: Forward) -> Tensor:
        values_L = aux(forward)
        return (self._now_L / self._most).to(values_L.dtype).to(values_L.device, non_blocking=True) * values_L

    @torch.no_grad()
    def update(self, counts_LE: Tensor, step: int) -> None:
        """Move every layer's coefficient."""
        counts_LE = counts_LE.to("cpu", torch.float64)
        load_LE = counts_LE / counts_LE.sum(dim=-1, keepdim=True)
        over_L = (load_LE - CAPACITY / load_LE.shape[-1]).clamp_min(0).sum(dim=-1)
        self._now_L.mul_(MEMORY).add_((1 - MEMORY) * (over_L / 5).clamp_max(self._most))


def z_loss(forward: Forward) -> Tensor:
    """Mean over tokens of logsumexp(router logits) squared, in each layer.

    Keeps router logits small: Zoph et al. 2022 (ST-MoE, arXiv 2202.08906), equation 5.
    """
    return torch.stack([route.logits_TE.logsumexp(dim=-1).square().mean() for route in forward.routes])


AUX = Term(aux, 0.01)
GLOBAL_AUX = Term(global_aux, 0.01, needs=("step counts",))
POOLED_AUX = Term(pooled_aux, 0.04)
SEQ_AUX = Term(seq_aux, 1e-4)
Z_LOSS = Term(z_loss, 0.001)
# `--balance none`: the language loss alone.
NONE = None


def mean_probabilities(routes: Sequence[Route]) -> Tensor:
    """P: each expert's mean router probability, float32 (L, E), with gradient."""
    return torch.stack([route.probabilities_TE().mean(dim=0) for route in routes])


def _switch(probability_LE: Tensor, counts_LE: Tensor) -> Tensor:
    """Over the last dimension, whatever comes before it."""
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
            raise ConfigError(
                f"--balance {value}: the coefficient must be a number above 0, such as {name}={default:g}"
            )
    if "sinkhorn" in chosen and "loss-free" in chosen:
        raise ConfigError(
            "--balance sinkhorn and loss-free: Sinkhorn's choices are always balanced, so the selection bias would"
            " learn nothing; give one of them"
        )
    return {name: coefficient for name, coefficient in chosen.items() if registry.load("balance", name) is not NONE}


def build_terms(balance: Mapping[str, float]) -> dict[str, Term]:
    """The strategies of a run that are losses of routes alone, by name, with the run's coefficients."""
    return {
        name: replace(strategy, coefficient=balance[name])
        for name, strategy in _chosen(balance).items()
        if isinstance(strategy, Term)
    }


def build_strategies(
    balance: Mapping[str, float], model: nn.Module, capture: RouterCapture, how: How = PLAIN
) -> dict[str, Strategy]:
    """The other strategies of a run, at work on a model's routers, by name; see Strategy.

    Raises:
        ConfigError: the model's family does not allow it.
    """
    chosen = _chosen(balance).items()
    return {name: kind(model, capture, balance[name], how) for name, kind in chosen if not isinstance(kind, Term)}


def last_move(config: TrainConfig) -> int:
    """The update of a resolved run after which `loss-free` moves no bias."""
    return round(config.balance_end * config.max_steps)


def state(strategies: Mapping[str, Strategy]) -> dict[str, Tensor]:
    """The state of a run's strategies, by name, from which it continues."""
    return {name: tensor for strategy in strategies.values() for name, tensor in strategy.state.items()}


def _chosen(balance: Mapping[str, float]) -> dict[str, Any]:
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
        asked = [f"--freeze-router: {config.model} is a dense model without a router"] * config.freeze_router
        asked += [f"--router-lr: {config.model} is a dense model without a router"] * (config.router_lr != 1)
        kind = config.train_only
        asked += [f"--train-only {kind}: {config.model} is a dense model without {kind}"] * (kind != "everything")
        if asked:
            raise ConfigError(f"{asked[0]}; leave it out")
        return
    check_frozen(config.balance, config.frozen_routers)
    if "erc" in config.balance and not config.mesh.whole:
        raise ConfigError(f"--balance erc needs whole experts, which a mesh shards ({config.mesh}); leave it out")
    build_strategies(config.balance, model, RouterCapture(model))


def check_frozen(balance: Mapping[str, float], frozen: str) -> None:
    """Refuse losses for routers that do not learn.

    Args:
        balance: strategies of a run.
        frozen: the option that keeps routers from learning; nothing if they learn.

    Raises:
        ConfigError: names them, and the strategies that may stay.
    """
    learning = [name for name, kind in _chosen(balance).items() if _teaches_routers(kind)]
    if frozen and learning:
        *others, last = [name for name in names("balance") if not _teaches_routers(registry.load("balance", name))]
        raise ConfigError(
            f"{frozen}: a frozen router does not learn from --balance {', '.join(learning)};"
            f" only {', '.join(others)} and {last} are possible"
        )


def _teaches_routers(kind: Any) -> bool:
    return isinstance(kind, Term) or bool(kind and kind.teaches_routers)
