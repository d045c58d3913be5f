"""How much the redrawn units of an upcycled model contribute, on the tokens of their experts.

Shapes: T tokens of a batch without its padding, K top-k, E experts, F intermediate units, H hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moetool.layers import layer_of
from moetool.routing.capture import Route
from moetool.routing.origin import Origin
from moetool.routing.text_pass import Batch

IDLE = 0.01  # of the kept units' median contribution
SAMPLE = 8192  # tokens of each domain that are looked at: the experts' products are computed again for them
_TOKENS = 4096  # of them at a time


class UnitUse:
    """Sums of each unit's contribution, over the first SAMPLE tokens of each domain.

    The contribution of unit u to its expert's output is c_u = mean over the tokens routed to the expert
    of |h_u| x |W_down[:, u]|, with h = act(W_gate x) * (W_up x). A hook on the experts computes h a
    second time: the fast experts of transformers keep it to themselves.

    Attributes:
        note: why the model's experts cannot be read; None if they can.
    """

    def __init__(self, model: nn.Module, origin: Origin) -> None:
        self._origin = origin
        self._norms: dict[int, Tensor] = {}
        # domain -> layer -> sums of |h| (E, F) and tokens (E,)
        self._sums: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        self._seen: Counter[tuple[str, int]] = Counter()  # tokens, by domain and layer
        # What the router of a layer has just chosen, until its experts run.
        self._chosen: dict[int, tuple[str, Tensor]] = {}
        self.note: str | None = None
        for name, module in model.named_modules():
            layer = layer_of(name)
            if layer is not None and _fused(module, origin):
                if module.down_proj.is_meta:
                    self.note = "the use of changed units is not known: weights are offloaded from the device"
                    return
                self._norms[layer] = torch.stack(
                    [w_HF.detach().float().norm(dim=0).double().cpu() for w_HF in module.down_proj.detach()]
                )
                module.register_forward_pre_hook(self._hook(layer))
        if sorted(self._norms) != list(origin.layers):
            self.note = "the use of changed units is not known: this version of transformers builds experts differently"

    def observe(self, name: str, route: Route, batch: Batch) -> None:
        """Observer of `measure`: called by the router, just before its experts run."""
        num = min(len(batch.tokens_N), SAMPLE - self._seen[name, route.layer])
        if num > 0:
            self._seen[name, route.layer] += num
            self._chosen[route.layer] = (name, route.indices_TK[:num])

    def _hook(self, layer: int) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(experts: Any, inputs: tuple[Any, ...]) -> None:
            if layer in self._chosen:
                self._count(layer, experts, inputs[0])

        return hook

    @torch.no_grad()
    def _count(self, layer: int, experts: Any, hidden: Tensor) -> None:
        name, chosen_TK = self._chosen.pop(layer)
        weight = experts.gate_up_proj
        home = "cpu" if weight.device.type == "mps" else weight.device  # MPS has no double precision
        E, F = self._norms[layer].shape
        sums_EF, tokens_E = self._sums.setdefault(name, {}).setdefault(
            layer,
            (torch.zeros(E, F, dtype=torch.float64, device=home), torch.zeros(E, dtype=torch.int64, device=home)),
        )
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])[: len(chosen_TK)].to(weight.device)
        chosen_TK = chosen_TK.to(weight.device)
        for expert in chosen_TK.unique().tolist():
            tokens = (chosen_TK == expert).any(dim=1).nonzero()[:, 0]
            tokens_E[expert] += len(tokens)
            for part in tokens.split(_TOKENS):
                gate, up = nn.functional.linear(hidden_TH[part], weight[expert]).chunk(2, dim=-1)
                sums_EF[expert] += (experts.act_fn(gate) * up).abs().sum(dim=0, dtype=torch.float32).to(home).double()

    def report(self) -> dict[str, list[dict[str, Any]]] | None:
        """Domain -> for each layer `layer`, `use`, `idle` and `experts` (the two of each expert).

        `use` is the share of all contributions that redrawn units carry over their share of the units
        (1: as the kept ones, 0: nothing); `idle`, the share of redrawn units whose contribution is below
        1 % of the kept units' median. A unit is redrawn if one of its matrices was. An expert without
        tokens, without a kept unit or without a redrawn one is None; a layer's values are means over the others.
        """
        if self.note or not self._sums:
            return None
        return {
            name: [self._row(layer, *layers[layer]) for layer in sorted(layers)] for name, layers in self._sums.items()
        }

    def _row(self, layer: int, sums_EF: Tensor, tokens_E: Tensor) -> dict[str, Any]:
        contribution_EF = sums_EF.cpu() / tokens_E.cpu()[:, None] * self._norms[layer]
        experts = [
            _use(contribution_EF[e], self._origin.redrawn(layer, e)) if tokens_E[e] else None
            for e in range(len(tokens_E))
        ]
        known = [expert for expert in experts if expert]
        means = {key: sum(expert[key] for expert in known) / len(known) if known else None for key in ("use", "idle")}
        return {"layer": layer, **means, "experts": experts}


def _fused(module: Any, origin: Origin) -> bool:
    """Whether a module holds the experts as transformers does: gate and up in one tensor, gate first."""
    both, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(both, Tensor) or not isinstance(down, Tensor) or both.ndim != 3 or not hasattr(module, "act_fn"):
        return False
    E, F, H = origin.num_experts, origin.num_units, both.shape[-1]
    return both.shape == (E, 2 * F, H) and down.shape == (E, H, F)


def _use(contribution_F: Tensor, redrawn_F: Tensor) -> dict[str, float] | None:
    """`use` and `idle` of one expert."""
    total, kept = contribution_F.sum().item(), contribution_F[~redrawn_F]
    if not total > 0 or not len(kept) or not redrawn_F.any():
        return None
    redrawn = contribution_F[redrawn_F]
    share = len(redrawn) / len(contribution_F)
    return {
        "use": redrawn.sum().item() / total / share,
        "idle": (redrawn < IDLE * kept.median()).double().mean().item(),
    }
