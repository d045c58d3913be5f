"""A gradient for the router from experts that a token was not sent to, with unchanged outputs.

A router learns from the experts that it has chosen: how much better another would have been, it is never told. Here
the experts that were not chosen stand in the loss as if they had been added with their weights, in the backward alone:
y = y_sparse + D - sg(D), with D = sum over them of w_i V_i, and sg the stop of the gradient. w_i is the weight that the
family would give, p_i / sg(sum of the chosen p) where it divides by the sum of the chosen. V_i is what the expert makes
of the token (`dense`: DenseMixer, yaof20/DenseMixer), or a moving average of what it makes of its tokens (`default`:
Default MoE, Panda et al. 2025, arXiv 2504.12463, which adds D in the forward too: such a model would not be stock).
V has no gradient.

Shapes: T tokens of a micro-batch, E experts, K top-k, U = E - K experts that a token was not sent to, L layers, D
hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moetool.cost.parameters import routing_size
from moetool.errors import ConfigError
from moetool.routing.capture import Route, RouterCapture, has_routers, read_output
from moetool.train.config import TrainConfig
from moetool.train.selection import Weighting, find_weighting

Kind = Literal["default", "dense"]
BASE = "grouped_mm"  # the function of transformers whose results those here equal bit for bit
DECAY = 0.9  # of the moving average at each step, as the paper has it for 8 experts
Experts = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def outputs_of_routes(experts: nn.Module, hidden_TD: Tensor, indices_TK: Tensor) -> Tensor:
    """(T, K, D), each chosen expert's output for a token, before weights."""
    T, K = indices_TK.shape
    ones = torch.ones(T * K, 1, dtype=hidden_TD.dtype, device=hidden_TD.device)
    rows_RD = hidden_TD.repeat_interleave(K, 0) if K > 1 else hidden_TD
    made_RD: Tensor = ALL_EXPERTS_FUNCTIONS[BASE](experts, rows_RD, indices_TK.reshape(-1, 1), ones)
    return made_RD.view(T, K, -1)


class _WithDefaults(torch.autograd.Function):
    """`output_TD`, with the gradient of output + sum over experts of weight * vector for the weights."""

    @staticmethod
    def forward(ctx: Any, output_TD: Tensor, weights_TE: Tensor, vectors_ED: Tensor) -> Tensor:
        ctx.save_for_backward(vectors_ED)
        return output_TD.view_as(output_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TD,), (vectors_ED,) = grads, ctx.saved_tensors
        return grad_TD, grad_TD.to(vectors_ED.dtype) @ vectors_ED.T, None


class _WithOthers(torch.autograd.Function):
    """`output_TD`, with the gradient of output + sum over the experts not chosen of weight * their outputs.

    What they make of the tokens is computed in the backward and not kept, as many routes at once as the forward has.
    """

    @staticmethod
    def forward(
        ctx: Any, output_TD: Tensor, weights_TU: Tensor, hidden_TD: Tensor, indices_TU: Tensor, experts: Any, size: int
    ) -> Tensor:
        ctx.save_for_backward(hidden_TD, indices_TU)
        ctx.experts, ctx.size, ctx.dtype = experts, size, weights_TU.dtype
        return output_TD.view_as(output_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TD,), (hidden_TD, indices_TU) = grads, ctx.saved_tensors
        found = []
        for indices_TK in indices_TU.split(ctx.size, dim=1):
            made_TKD = outputs_of_routes(ctx.experts, hidden_TD, indices_TK)
            found.append((made_TKD.to(ctx.dtype) @ grad_TD.to(ctx.dtype)[:, :, None])[..., 0])
        return grad_TD, torch.cat(found, dim=1), None, None, None, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _dense(experts: Any, hidden_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    output_TD: Tensor = ALL_EXPERTS_FUNCTIONS[BASE](experts, hidden_TD, indices_TK, weights_TK)
    weights_TE = experts.__dict__.pop("weights_if_chosen_TE", None)
    if weights_TE is None:
        return output_TD
    K = indices_TK.shape[1]
    others_TE = torch.ones_like(weights_TE, dtype=torch.int8).scatter_(1, indices_TK.long(), 0)
    indices_TU = others_TE.argsort(dim=1, descending=True, stable=True)[:, : weights_TE.shape[1] - K]
    weights_TU = weights_TE.gather(1, indices_TU)
    made: Tensor = _WithOthers.apply(output_TD, weights_TU, hidden_TD.detach(), indices_TU, experts, K)
    return made


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _default(experts: Any, hidden_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    weights_TE = experts.__dict__.pop("weights_if_chosen_TE", None)
    if weights_TE is None:
        output_TD: Tensor = ALL_EXPERTS_FUNCTIONS[BASE](experts, hidden_TD, indices_TK, weights_TK)
        return output_TD
    made_TKD = outputs_of_routes(experts, hidden_TD, indices_TK)
    output_TD = (made_TKD * weights_TK[..., None]).sum(dim=1).to(hidden_TD.dtype)
    sums_ED = torch.zeros_like(experts.default_outputs_ED)
    for k in range(indices_TK.shape[1]):
        sums_ED.index_add_(0, indices_TK[:, k].long(), made_TKD[:, k].detach().to(sums_ED.dtype))
    experts.summed_outputs_ED = sums_ED  # of the last forward: see RouterGradient.collect
    others_TE = torch.ones_like(weights_TE).scatter(1, indices_TK.long(), 0.0)
    made: Tensor = _WithDefaults.apply(output_TD, weights_TE * others_TE, experts.default_outputs_ED)
    return made


_FUNCTIONS: dict[str, Experts] = {"default": _default, "dense": _dense}


class RouterGradient:
    """Router gradients from experts that were not chosen, at work on a model.

    Attributes:
        state: what a run that goes on must have: float32 (L, E, D), the moving averages of `default`.

    Args:
        kind: where V comes from.
        model: of transformers, with its weights.
        capture: on its routers.
        empty: the same without weights, because the model's may be sharded.
    """

    def __init__(self, kind: Kind, model: Any, capture: RouterCapture, empty: RouterCapture) -> None:
        weightings = find_weightings(kind, empty)
        self._experts = find_modules(kind, model, capture)
        for layer, experts in self._experts.items():
            hook = partial(_weigh_others, experts, weightings[layer])
            capture.routers[layer].register_forward_hook(hook)
        self.state: dict[str, Tensor] = {}
        if kind == "default":
            one = next(iter(self._experts.values()))
            size = (len(self._experts), one.num_experts, model.config.get_text_config().hidden_size)
            self.state["default-outputs"] = torch.zeros(size, device=one.down_proj.device)
            self._sums_LED = torch.zeros_like(self.state["default-outputs"])
            for experts, vectors_ED in zip(self._experts.values(), self.state["default-outputs"], strict=True):
                experts.default_outputs_ED = vectors_ED
        name = f"moetool_{kind}"
        ALL_EXPERTS_FUNCTIONS.register(name, _FUNCTIONS[kind])
        model.set_experts_implementation(name)

    def collect(self) -> None:
        """After the forward of a micro-batch, before its backward, which may repeat the forward."""
        for place, experts in enumerate(self._experts.values()):
            if (sums_ED := experts.__dict__.pop("summed_outputs_ED", None)) is not None:
                self._sums_LED[place] += sums_ED

    @torch.no_grad()
    def update(self, counts_LE: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        """After an update of the weights: the average of an expert that had tokens moves.

        Args:
            counts_LE: tokens of each expert in the step, over all micro-batches and processes.
            total: sums a tensor over the processes.
        """
        for vectors_LED in self.state.values():
            sums_LED = total(self._sums_LED)
            counts_LE1 = counts_LE.to(sums_LED, non_blocking=True)[..., None]
            moved_LED = DECAY * vectors_LED + (1 - DECAY) * sums_LED / counts_LE1.clamp_min(1)
            vectors_LED.copy_(torch.where(counts_LE1 > 0, moved_LED, vectors_LED))
            self._sums_LED.zero_()


def _weigh_others(experts: Any, weighting: Weighting, router: nn.Module, inputs: Any, output: Any) -> None:
    """Leave the weights that every expert would have where the function of the experts finds them."""
    if router.training and torch.is_grad_enabled():
        logits_TE, _, indices_TK = read_output(output, type(router).__name__, -1)
        experts.weights_if_chosen_TE = weights_if_chosen(logits_TE, indices_TK, weighting)


def weights_if_chosen(logits_TE: Tensor, indices_TK: Tensor, weighting: Weighting) -> Tensor:
    """(T, E), the weight of each expert as if it were added to the chosen, whose sum has no gradient.

    Args:
        logits_TE: of a router, float32.
        indices_TK: chosen.
        weighting: of the family.
    """
    scores_TE = Route(0, logits_TE, indices_TK, indices_TK, weighting.scoring).scores_TE()
    if weighting.normalised:
        scores_TE = scores_TE / scores_TE.detach().gather(1, indices_TK).sum(dim=-1, keepdim=True).clamp_min(1e-20)
    return scores_TE * weighting.factor


def find_weightings(kind: str, capture: RouterCapture) -> dict[int, Weighting]:
    """How the routers of a model weight their choices, by layer; see `find_weighting`."""
    refused = f"--router-gradient {kind}: the weights that {{}} would give to other experts are not known; leave it out"
    return {layer: find_weighting(router, capture.scoring[layer], refused) for layer, router in capture.routers.items()}


def find_modules(kind: str, model: nn.Module, capture: RouterCapture) -> dict[int, Any]:
    """The modules of the experts, which a function of transformers' interface computes, by layer.

    Raises:
        ConfigError: transformers has none of a layer.
    """
    names, found = {module: name for name, module in model.named_modules()}, {}
    for layer, router in capture.routers.items():
        block = model.get_submodule(names[router].rpartition(".")[0])
        experts = next((module for module in block.modules() if hasattr(module, "is_concatenated")), None)
        if experts is None:
            raise ConfigError(
                f"--router-gradient {kind}: transformers has its own code for the experts of {type(block).__name__};"
                f" leave it out"
            )
        found[layer] = experts
    return found


def check(config: TrainConfig, model: Any) -> None:
    """Refuse a router gradient that the model or the run cannot have.

    Args:
        config: resolved.
        model: its weights may be on torch's meta device.

    Raises:
        ConfigError: says why.
    """
    kind = config.router_gradient
    if kind == "sparse":
        return
    option = f"--router-gradient {kind}"
    if not has_routers(model):
        raise ConfigError(f"{option}: {config.model} is a dense model without a router; leave it out")
    if config.experts_implementation not in ("auto", BASE):
        raise ConfigError(
            f"{option}: --experts-implementation {config.experts_implementation} does not return each expert's"
            f" output; use {BASE}, or leave one of them out"
        )
    if config.mesh.ep > 1 or config.mesh.tp > 1:
        raise ConfigError(
            f"{option} needs whole experts, which a mesh shards ({config.mesh}); use --fsdp alone, or leave it out"
        )
    capture = RouterCapture(model)
    find_weightings(kind, capture)
    for experts in find_modules(kind, model, capture).values():
        if routing_size(model)[1] >= experts.num_experts:
            raise ConfigError(f"{option}: every token is sent to all {experts.num_experts} experts; leave it out")
