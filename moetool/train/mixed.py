"""Training in bf16: bf16 weights in the forward pass, fp32 for everything that accumulates.

Micikevicius et al. 2018 (Mixed Precision Training, arXiv 1710.03740), with bf16's range instead of a loss scale. The
residual stream is bf16. Routers, the statistics of norms, the loss and all sums stay fp32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from moetool.cost.parameters import is_selection_bias
from moetool.routing.capture import RouterCapture

Masters = Literal["device", "host", "none"]


def cast(model: nn.Module, capture: RouterCapture | None, masters: Masters = "device") -> dict[str, nn.Parameter]:
    """Cast a model to bf16, and keep what its optimizer updates: fp32 weights, which gather fp32 gradients.

    A micro-batch's gradient is bf16. It is added to the fp32 one as soon as it is known, and freed. Routers stay fp32
    and compute in fp32, whatever their input is, because a rounded logit can choose another expert. Buffers, such as
    selection biases and rotary frequencies, stay as they are.

    Args:
        model: fp32; is changed in place.
        capture: on its routers; None for a dense model.
        masters: where the fp32 weights lie: beside the bf16 ones, in host memory, or nowhere. Gradients are fp32
            everywhere.

    Returns:
        Every parameter by name: the weight that is updated. Where it lies beside the bf16 one, its `grad` is the sum
        over micro-batches; everywhere else that is the `grad` of the model's parameter. For what is not trained it is
        the model's own parameter, or the fp32 one beside it where bf16 cannot hold it, because it must not change. For
        routers it is the model's own unless it lies in host memory, and for all that is trained without masters.
    """
    routers = list(capture.routers.values()) if capture else []
    for router in routers:
        router.register_forward_pre_hook(_in_float32)
    exact = {id(parameter) for router in routers for parameter in router.parameters()}
    updated: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        updated[name] = parameter
        if not parameter.requires_grad:
            if id(parameter) not in exact and not is_selection_bias(name):
                half = parameter.data.bfloat16()
                if not torch.equal(half.float(), parameter.data):
                    kept = parameter.data.cpu() if masters == "host" else parameter.data
                    updated[name] = nn.Parameter(kept, requires_grad=False)
                parameter.data = half
            continue
        if masters == "host":
            updated[name] = nn.Parameter(parameter.data.to("cpu", copy=True))
        if id(parameter) in exact:
            continue
        if masters == "device":
            updated[name] = nn.Parameter(parameter.data)
            parameter.register_post_accumulate_grad_hook(_adding_to(updated[name]))
        parameter.data = parameter.data.bfloat16()
        if masters != "device":
            parameter.grad_dtype = torch.float32
    return updated


def _in_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
    )


def _adding_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return add


@torch.no_grad()
def cast_back(updated: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """After an update: the model's bf16 weights are the rounded fp32 ones."""
    rounded = {
        name: parameter
        for name, parameter in model.named_parameters()
        if updated[name] is not parameter and parameter.requires_grad
    }
    if rounded:
        torch._foreach_copy_(list(rounded.values()), [updated[name] for name in rounded])


def gather_in_bf16(model: nn.Module, exact: Collection[str]) -> None:
    """Have FSDP gather bf16 weights from the fp32 shards, and reduce their gradients in fp32.

    The engine's own policy rounds routers too. A policy is fixed when a group is made, which the engine does before it
    reads the weights, but it is first read in the first forward: until then it is changed here.

    Args:
        model: sharded by FSDP, with groups of their own for the `exact` modules; has not run forward.
        exact: see `cost.parameters.exact_modules`.
    """
    half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    full = MixedPrecisionPolicy(torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=True)
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            state._mp_policy = full if re.sub(r"\.\d+(?=\.|$)", ".*", name) in exact else half
            for group in state._fsdp_param_groups:
                group.mp_policy = state._mp_policy
