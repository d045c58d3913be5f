"""The expert-router coupling loss: a router's row and its expert should respond to the same tokens.

Lv et al. 2025 (arXiv 2512.23447v2), section 3 and figure 8. It is a loss of weights alone.

Shapes: E experts, D hidden, F intermediate units, L layers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moetool.calibration.experts import Layer, find_experts
from moetool.errors import CheckpointError, ConfigError
from moetool.routing.capture import RouterCapture
from moetool.train.selection import PLAIN, How, Strategy
from moetool.train.terms import Forward, Term


def proxies(router_ED: Tensor, noise_ED: Tensor) -> Tensor:
    """A token that stands for those that the router sends to each expert: its row, each coordinate times 1 +- epsilon.

    epsilon_i is half the distance from row i to the nearest other one, in norms of row i (equation 4), so that a proxy
    stays nearest to its own row. No gradient goes through epsilon.

    Args:
        router_ED: the router's matrix.
        noise_ED: uniform from 0 to 1.

    Returns:
        (E, D), with the gradient of the rows.
    """
    with torch.no_grad():
        exact = "donot_use_mm_for_euclid_dist"  # rows may be near each other
        apart_EE = torch.cdist(router_ED, router_ED, compute_mode=exact).fill_diagonal_(float("inf"))
        nearest_E = apart_EE.min(dim=1).values.nan_to_num(posinf=0.0)
        epsilon_E = nearest_E / 2 / torch.linalg.vector_norm(router_ED, dim=1).clamp_min(1e-20)
    proxies_ED: Tensor = router_ED * (1 + epsilon_E[:, None] * (2 * noise_ED - 1))
    return proxies_ED


def erc(proxies_ED: Tensor, gates_EFD: Tensor) -> Tensor:
    """The loss of a layer (equation 3), with alpha = 1.

    M_ij is the norm of what expert j's gate matrix makes of proxy i. The loss is the sum over i and j != i of
    max(M_ij - M_ii, 0) + max(M_ji - M_ii, 0), divided by E^2: a proxy should move its own expert most, and an expert
    its own proxy.
    """
    answers_EFE = gates_EFD @ proxies_ED.to(gates_EFD.dtype).T
    norms_EE = torch.linalg.vector_norm(answers_EFE.float(), dim=1).T  # of proxy i, by expert j
    own_E = norms_EE.diagonal()
    over_EE: Tensor = (norms_EE - own_E[:, None]).clamp_min(0) + (norms_EE - own_E).clamp_min(0)
    return over_EE.mean()  # the diagonal adds 0


class Erc(Strategy):
    """The loss at work on a model, with the paper's coefficient, 1.

    Its noise is a pure function of the micro-batch and the layer. Routers and experts learn from it, so either may be
    frozen.
    """

    coefficient: ClassVar[float] = 1.0

    def __init__(self, model: nn.Module, capture: RouterCapture, coefficient: float, how: How = PLAIN) -> None:
        try:
            self._layers = list(find_experts(model).values())
            self._matrices = [_matrix(layer) for layer in self._layers]
        except CheckpointError as error:
            raise ConfigError(f"--balance erc: {error}; leave it out") from None
        self.term = Term(self._values, coefficient)

    def _values(self, forward: Forward) -> Tensor:
        losses = []
        draw = torch.Generator(self._matrices[0].device).manual_seed(forward.batch.seed)
        for layer, router_ED in zip(self._layers, self._matrices, strict=True):
            noise_ED = torch.rand(router_ED.shape, generator=draw, device=router_ED.device)
            gates_EFD = layer.experts.gate_up_proj.chunk(2, dim=1)[0]
            # Computed again in the backward: answers of all layers would be E^2 F numbers each.
            how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            losses.append(checkpoint(_loss, router_ED, noise_ED, gates_EFD, **how))
        return torch.stack(losses)


def _loss(router_ED: Tensor, noise_ED: Tensor, gates_EFD: Tensor) -> Tensor:
    return erc(proxies(router_ED.float(), noise_ED), gates_EFD)


def _matrix(layer: Layer) -> nn.Parameter:
    """The router's matrix (E, D), whose rows are compared with experts that are stored as gate over up."""
    gate_up, experts = layer.experts.gate_up_proj, layer.experts
    found = [p for p in layer.router.parameters() if p.shape == (gate_up.shape[0], gate_up.shape[-1])]
    plain = getattr(experts, "is_transposed", None) is False and getattr(experts, "is_concatenated", None) is True
    if len(found) != 1 or not plain:
        kinds = f"{type(layer.router).__name__} and {type(experts).__name__}"
        raise CheckpointError(f"{kinds} are not one router matrix and gate matrices of its width")
    return found[0]
