"""Balance strategies that change which experts are chosen, by hooks and buffers; the saved model is stock.

And what every strategy is that needs more than a micro-batch's routes.

Shapes: T tokens of a micro-batch, E experts, K top-k, L layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moetool.cost.parameters import is_selection_bias
from moetool.errors import ConfigError, in_one_line
from moetool.routing.capture import Route, RouterCapture, read_output
from moetool.train.accelerator import share
from moetool.train.terms import Term

# Half-steps of Sinkhorn's iteration come in pairs; after these the tokens' sums are even to a few
# thousandths for logits of trained routers (the experts' are even by the last half-step itself).
SINKHORN_ITERATIONS = 8

_FAMILIES_WITH_BIAS = "glm4_moe, dots1, solar_open, deepseek_v3, ernie4_5_moe, minimax_m2, lfm2_moe, afmoe and others"


@dataclass(frozen=True)
class How:
    """The properties of a run that strategies need besides their coefficients.

    Attributes:
        empty: a capture on the same routers without weights, where the model's are sharded and cannot be copied.
        last_move: the last update after which biases move; None: all of them.
        centred: whether their moves are centred; a run from before there was that goes on without it.
    """

    empty: RouterCapture | None = None
    last_move: int | None = None
    centred: bool = True


PLAIN = How()


class Strategy:
    """A strategy at work on the routers of a model: it changes the choice of experts, or has a state of its own.

    Attributes:
        coefficient: where the user names none; 0 where it takes none.
        teaches_routers: whether it does nothing where routers do not learn.
        term: the loss that it adds; None: none.
        state: what a run that goes on must have, by name. It is the same in all processes.
    """

    coefficient: ClassVar[float] = 0.0
    teaches_routers: ClassVar[bool] = False
    term: Term | None = None
    state: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self, model: nn.Module, capture: RouterCapture, coefficient: float, how: How) -> None:
        """Raise ConfigError where the model's family does not allow it; the weights may be on torch's meta device."""

    def update(self, counts_LE: Tensor, step: int) -> None:
        """After an update of the weights.

        Args:
            counts_LE: routes to each expert in its step, over all micro-batches and processes.
            step: updates made.
        """


def sinkhorn(logits_TE: Tensor, iterations: int = SINKHORN_ITERATIONS) -> Tensor:
    """Scale exp(logits) until every token and every expert has the same share; logarithms of the result.

    With C = exp(logits): d1_e = 1 / (E * sum_t C_te) to begin with, as in BlackMamba (Anthony et al.
    2024, arXiv 2402.01771), then d0_t = 1 / (T * sum_e d1_e C_te) and d1_e = 1 / (E * sum_t d0_t C_te) in
    turn; the result is d0_t C_te d1_e. All in logarithms, so that no logit overflows; the number of
    iterations is fixed, because published stopping rules depend on the scale of the logits.

    Args:
        logits_TE: float32, any size of numbers.
        iterations: pairs of half-steps.

    Returns:
        Float32 (T, E). Its exponential sums to 1/E for each expert and tends to 1/T for each token.
    """
    num_tokens, num_experts = logits_TE.shape
    expert_E = -math.log(num_experts) - logits_TE.logsumexp(dim=0)
    token_T1 = torch.zeros_like(logits_TE[:, :1])
    for _ in range(iterations):
        token_T1 = -math.log(num_tokens) - (logits_TE + expert_E).logsumexp(dim=1, keepdim=True)
        expert_E = -math.log(num_experts) - (logits_TE + token_T1).logsumexp(dim=0)
    return logits_TE + token_T1 + expert_E


@dataclass(frozen=True)
class Weighting:
    """How a family weights the experts that it has chosen.

    Attributes:
        scoring: as in Route.
        normalised: whether the chosen scores are divided by their sum.
        factor: by which they are multiplied then.
    """

    scoring: str
    normalised: bool
    factor: float

    def weights_TK(self, logits_TE: Tensor, indices_TK: Tensor) -> Tensor:
        """The weights of chosen experts, with the gradient of the logits."""
        chosen_TK = Route(0, logits_TE, indices_TK, indices_TK, self.scoring).scores_TE().gather(1, indices_TK)
        if self.normalised:
            chosen_TK = chosen_TK / chosen_TK.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        return chosen_TK * self.factor


@torch.no_grad()
def find_weighting(router: nn.Module, scoring: str, refused: str) -> Weighting:
    """Find out how a router weights its choices by trying a copy of it on random tokens.

    What is found is what the family does, whatever flags its config sets: the rule must give the
    router's own weights for the router's own choices.

    Args:
        router: its weights may be on torch's meta device; they are replaced in the copy.
        scoring: as in Route.
        refused: what the error says before the reason, with a place for the router's class.

    Raises:
        ConfigError: the weights are not a multiple of the chosen experts' scores.
    """
    name = type(router).__name__
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(router).to_empty(device="cpu").float().eval()
    for parameter in probe.parameters():
        parameter.normal_(std=0.5, generator=generator)
    for buffer in probe.buffers():
        buffer.zero_()
    matrix = next(parameter for parameter in probe.parameters() if parameter.ndim == 2)
    hidden_TD = torch.randn(64, matrix.shape[-1], generator=generator)
    try:
        logits_TE, weights_TK, indices_TK = read_output(_tried(probe, hidden_TD, matrix.shape[0]), name, 0)
        for normalised in (False, True):
            expected_TK = Weighting(scoring, normalised, 1.0).weights_TK(logits_TE, indices_TK)
            ratio_TK = weights_TK.float() / expected_TK
            factor = ratio_TK.mean().item()
            if torch.allclose(ratio_TK, torch.full_like(ratio_TK, factor), rtol=1e-3, atol=0):
                # Rounded: a factor is a number in a config, what is measured of it has float32's noise.
                return Weighting(scoring, normalised, float(f"{factor:.5g}"))
    except Exception as error:  # a router that needs more than hidden states
        raise ConfigError(refused.format(f"{name} ({in_one_line(error, 120)})")) from None
    raise ConfigError(refused.format(name))


def _tried(router: nn.Module, hidden_TD: Tensor, num_experts: int) -> Any:
    """What a router returns, which may be called with a selection bias that its block has, or with whole sequences."""
    more: tuple[Tensor, ...]
    for more in ((), (torch.zeros(num_experts),)):
        for hidden in (hidden_TD, hidden_TD[None]):
            with suppress(TypeError, ValueError):
                return router.forward(hidden, *more)
    return router.forward(hidden_TD)


_NO_SINKHORN = (
    "--balance sinkhorn: the weights that {} would give to other choices are not known; use aux, global-aux or"
    " loss-free"
)


class Sinkhorn(Strategy):
    """Choose experts in training by Sinkhorn's assignment, which gives every expert the same share.

    A forward hook replaces the chosen indices by the top-k of `sinkhorn(logits)` over the micro-batch,
    without gradient; their weights are the family's own for those experts, and carry the router's
    gradient. Outside training the router is untouched, because the assignment needs the whole batch:
    the saved model is the trained one with plain top-k. Clark et al. 2022 (arXiv 2202.01169), section
    3.2; used in continual pretraining by Therien et al. 2025 (arXiv 2503.05029). It takes no coefficient.
    A selection bias of the family has no part in the choice.
    """

    def __init__(self, model: nn.Module, capture: RouterCapture, coefficient: float = 0.0, how: How = PLAIN) -> None:
        for layer, router in capture.routers.items():
            if getattr(router, "topk_group", 1) < getattr(router, "num_group", 1):
                raise ConfigError(
                    f"--balance sinkhorn: layer {layer} chooses experts within groups (n_group"
                    f" {router.num_group}), which Sinkhorn's assignment would ignore; use aux, global-aux or loss-free"
                )
            weighting = find_weighting((how.empty or capture).routers[layer], capture.scoring[layer], _NO_SINKHORN)
            # Ahead of the hook that collects, so that the choices that act are the ones that are counted.
            router.register_forward_hook(_choose(weighting), prepend=True)


def _choose(weighting: Weighting) -> Any:
    # A pure function of the router's output, so that the recomputation under gradient checkpointing
    # chooses the same experts.
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not module.training:
            return None
        logits, weights, indices = output[:3]
        logits_TE = logits.float().reshape(-1, logits.shape[-1])
        with torch.no_grad():
            chosen_TK = sinkhorn(logits_TE.detach()).topk(indices.shape[-1], dim=-1).indices
        weights_TK = weighting.weights_TK(logits_TE, chosen_TK)
        return (
            logits,
            weights_TK.reshape(weights.shape).to(weights.dtype),
            chosen_TK.reshape(indices.shape).to(indices.dtype),
            *output[3:],
        )

    return hook


class LossFree(Strategy):
    """Add `coefficient` to the selection bias of underloaded experts after each step, take it from overloaded ones.

    b_e += u * (s_e - mean s) with s_e = sign(mean load - load of e), from the routes of the whole step over all
    processes; the bias decides who is chosen, not how choices are weighted: Wang et al. 2024 (arXiv 2408.15664),
    algorithm 1, with their u = 0.001, and centred as in torchtitan. A layer's mean bias so stays what it was;
    uncentred moves add up in one direction where more experts lie below the mean load than above it. After update
    `how.last_move` the bias stays: DeepSeek-V3 (arXiv 2412.19437, section 4.2) moved it for the first 14.3 of 14.8
    trillion tokens. It is float32, in the saved checkpoint too.
    """

    coefficient: ClassVar[float] = 0.001

    def __init__(self, model: nn.Module, capture: RouterCapture, coefficient: float, how: How = PLAIN) -> None:
        self._rate, self._how, self._places = coefficient, how, selection_biases(model, capture.routers)

    @torch.no_grad()
    def update(self, counts_LE: Tensor, step: int) -> None:
        """Move every bias by one step of the update rate."""
        if self._how.last_move is not None and step > self._how.last_move:
            return
        move_LE = (counts_LE.mean(dim=-1, keepdim=True, dtype=torch.float64) - counts_LE).sign()
        if self._how.centred:
            move_LE -= move_LE.mean(dim=-1, keepdim=True)
        for (module, name), move_E in zip(self._places, move_LE, strict=True):
            bias: Tensor = getattr(module, name)
            bias.add_(share(move_E.to(bias.dtype).reshape(bias.shape), bias), alpha=self._rate)


def selection_biases(model: nn.Module, routers: Mapping[int, nn.Module]) -> list[tuple[nn.Module, str]]:
    """Where the selection bias of each layer's router is: (module, attribute), its own or its block's.

    Not the tensors themselves, which are others once a model has been moved to a device.

    Args:
        model: of transformers.
        routers: layer -> router.

    Raises:
        ConfigError: a router has none that is saved, so that the bias would be lost with the checkpoint.
    """
    names = {module: name for name, module in model.named_modules()}
    stored = [name for name in model.state_dict() if is_selection_bias(name)]
    places = []
    for layer, router in routers.items():
        block = names[router].rpartition(".")[0]
        found = [name for name in stored if name.startswith(f"{names[router]}.") or name.rpartition(".")[0] == block]
        if len(found) != 1:
            kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise ConfigError(
                f"--balance loss-free: a checkpoint of '{kind}' cannot store a selection bias for layer {layer};"
                f" {_FAMILIES_WITH_BIAS} can. Use aux or global-aux"
            )
        owner, _, attribute = found[0].rpartition(".")
        places.append((model.get_submodule(owner), attribute))
    return places
