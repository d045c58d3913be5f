"""AdamW over the weights of a run, and the forms of its moments."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moetool.errors import ConfigError
from moetool.train.config import TrainConfig
from moetool.train.tensor_file import Stored

EPSILON = 1e-8
EIGHT_BIT_PARTS = ("codes", "scale", "qmap")  # of torchao's moments


def adamw(
    parameters: Iterable[nn.Parameter],
    config: TrainConfig,
    graded: Sequence[nn.Parameter] = (),
    routers: Collection[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101).

    Tensors of two or more dimensions decay (projections, experts, routers, embeddings), norms and
    biases do not, as in Megatron-LM and GPT-NeoX. What is sharded over another mesh is a group of its own, because
    torch updates a group at once, and so are routers with `--router-lr`. The learning rate is set before each update:
    see `set_rate`. Moments of 8 bits
    (Dettmers et al. 2022, arXiv 2110.02861) or bf16, and updates of bf16 weights with stochastic rounding, are
    torchao's.

    Args:
        parameters: that are updated; those that are not trained are left out.
        config: of the run.
        graded: with `--moments offload`: what their gradients lie in, in the same order.
        routers: those of them that are of routers.
    """
    parameters, of_routers = list(parameters), {id(parameter) for parameter in routers}
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    found: dict[Any, list[nn.Parameter]] = {}
    for parameter in sorted(trained, key=lambda p: p.ndim < 2):
        factor = config.router_lr if id(parameter) in of_routers else 1.0
        found.setdefault((parameter.ndim >= 2, factor, getattr(parameter, "device_mesh", None)), []).append(parameter)
    groups = [
        {"params": group, "weight_decay": config.weight_decay if decays else 0.0, "factor": factor}
        for (decays, factor, _), group in found.items()
    ]
    common: dict[str, Any] = {"lr": 0.0, "betas": (config.beta1, config.beta2), "eps": EPSILON}
    if config.moments == "offload":
        return Offloaded(groups, dict(zip(parameters, graded, strict=True)), **common)
    if plain(config):
        return torch.optim.AdamW(groups, fused=trained[0].device.type in ("cpu", "cuda"), **common)
    kind = _torchao(config.moments)
    optimizer: torch.optim.Optimizer = kind(groups, bf16_stochastic_round=not config.master_weights, **common)
    return optimizer


def plain(config: TrainConfig) -> bool:
    """Whether torch's own AdamW does it."""
    return config.moments in ("fp32", "offload") and config.master_weights


class Offloaded(torch.optim.AdamW):
    """AdamW with weights and moments in host memory; the processor updates them, one tensor after another.

    torchao's CPUOffloadOptimizer copies each gradient in the backward, so before it is clipped, and knows no weights
    of another precision.
    """

    def __init__(self, groups: Any, graded: Mapping[nn.Parameter, nn.Parameter], **common: Any) -> None:
        """Make room for the gradient of one tensor.

        Args:
            groups: of weights in host memory.
            graded: such a weight -> the model's parameter, in which its gradient lies.
            common: of all groups.
        """
        super().__init__(groups, fused=True, **common)
        self._graded = {weight: parameter for weight, parameter in graded.items() if parameter.requires_grad}
        largest = max(self._graded.values(), key=torch.Tensor.numel)
        # A GPU copies into memory that cannot be swapped out several times as fast.
        self._gradient = torch.empty(largest.numel(), pin_memory=largest.is_cuda)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight whose parameter has a gradient, which is given up."""
        for weight, parameter in self._graded.items():
            if parameter.grad is not None:
                weight.grad = self._gradient[: weight.numel()].view(weight.shape).copy_(parameter.grad)
                parameter.grad = None
                super().step()
                weight.grad = None


def check(config: TrainConfig, device: torch.device) -> None:
    """Refuse moments and weights that cannot be kept as asked for.

    Args:
        config: resolved.
        device: that it trains on.

    Raises:
        ConfigError: says which.
    """
    if config.moments == "fp32" and config.master_weights:
        return
    option = "--no-master-weights" if config.moments == "fp32" else f"--moments {config.moments}"
    if not config.master_weights and config.precision != "bf16":
        raise ConfigError("--no-master-weights has no effect in fp32; leave it out, or use --precision bf16")
    if config.moments == "offload":
        _check_offload(config, device)
    elif find_spec("torchao") is None:
        raise ConfigError(f"{option}: torchao is not installed; run pip install torchao")


def _check_offload(config: TrainConfig, device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(f"--moments offload: this run is on {device}, not on a GPU with its own memory; leave it out")
    if config.precision != "bf16":
        raise ConfigError("--moments offload needs --precision bf16; use it, or leave --moments out")
    if not config.master_weights:
        raise ConfigError(
            "--no-master-weights: --moments offload keeps master weights in host memory; leave one of them out"
        )


def _torchao(moments: str) -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of kernels that this has no use for
    try:
        from torchao.optim import AdamW8bit
    finally:
        logging.disable(before)

    def zeros(weight: Tensor, signed: bool, block_size: int) -> Tensor:
        return torch.zeros_like(weight, dtype=torch.bfloat16 if moments == "bf16" else torch.float32)

    if moments == "8bit":
        return AdamW8bit
    return type("AdamW", (AdamW8bit,), {"_subclass_zeros": staticmethod(zeros)})


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next update, times each group's own `factor`.

    torchao's is a tensor, which must stay the same one.
    """
    for group in optimizer.param_groups:
        rate = lr * group.get("factor", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def rounding_seed(seed: int, step: int) -> int:
    """Of the random numbers by which an update rounds: a pure function, so that a resumed run rounds alike."""
    return int(np.random.SeedSequence([seed, step, 2**32 - 1]).generate_state(1, np.uint64)[0])


def parts(moment: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors of a moment, by suffix of its name: codes and scales of an 8-bit one."""
    if hasattr(moment, "codes"):
        yield from ((f".{name}", getattr(moment, name)) for name in EIGHT_BIT_PARTS)
    else:
        yield "", moment


@torch.no_grad()
def state_from(optimizer: Any, parameter: nn.Parameter, values: Mapping[str, Stored]) -> dict[str, Any]:
    """An optimizer's state of one parameter, from the plain tensors of its moments.

    Args:
        optimizer: of the run.
        parameter: that it updates; this process reads its share.
        values: name of a moment and of its part (see `parts`) -> tensor in a file.

    Raises:
        ValueError: they were kept in another way.
    """
    other = "another form of moments (--moments)"
    number = torch.empty((), device=parameter.device)
    if not hasattr(optimizer, "_new_buffer"):  # torch's own
        if any(value.dtype != torch.float32 for value in values.values()):
            raise ValueError(other)
        return {name: value.read(parameter if value.shape else number) for name, value in values.items()}
    state: dict[str, Any] = {"step": values["step"].read(torch.empty(()))}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = optimizer._new_buffer(parameter, name == "exp_avg")
        for part, tensor in parts(state[name]):
            value = values.get(name + part)
            if value is None or (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(other)
            tensor.copy_(value.read(tensor))
    return state
