"""How a run is computed: recomputed layers, compilation, other kernels, determinism.

What is computed stays the same, to rounding.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from moetool.calibration.experts import layers_with_experts
from moetool.errors import ConfigError, in_one_line
from moetool.routing.capture import has_routers
from moetool.train.config import TrainConfig
from moetool.train.optimizer import plain

TOKENS = 256  # on which functions for the experts are compared


def check_execution(config: TrainConfig, model: Any, device: torch.device) -> None:
    """Refuse options that the model or the machine does not support, before the weights are read.

    Args:
        config: of the run.
        model: of transformers; its weights may be on torch's meta device.
        device: that it will train on.

    Raises:
        ConfigError: says what.
    """
    if config.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ConfigError(f"--gradient-checkpointing: transformers has none for {type(model).__name__}; leave it out")
    if config.experts_implementation != "auto" and not has_routers(model):
        raise ConfigError(f"--experts-implementation: a {model.config.model_type} has no experts; leave it out")
    if config.liger:
        _check_liger(model.config.model_type, device)
    if config.compile:
        # The smallest of programs needs the same compilers (C++ on a CPU, Triton on a GPU) as a model.
        torch.compile(lambda x: x * 2 + 1)(torch.zeros(8, device=device))


def check_sharing(config: TrainConfig, model: Any) -> None:
    """Refuse options that do not work where processes share a model, before the weights are read.

    Args:
        config: resolved.
        model: of transformers; its weights may be on torch's meta device.

    Raises:
        ConfigError: says which, and why.
    """
    mesh = config.mesh
    if mesh.whole:
        return
    if config.moments == "offload":
        raise ConfigError(
            f"--moments offload needs whole weights on each process, which a mesh shards ({mesh}); leave it out"
        )
    if not plain(config):
        option = "--no-master-weights" if config.moments == "fp32" else f"--moments {config.moments}"
        raise ConfigError(f"{option}: torchao's optimizers do not take shards of a mesh ({mesh}); leave it out")
    if not mesh.sharded:
        # Measured: of norms within tensor-parallel layers it sums the gradients so far again in each micro-batch.
        raise ConfigError(
            f"--tp {mesh.tp} alone: transformers adds gradients over micro-batches correctly only under FSDP; use"
            " --fsdp or --replicas above 1 as well"
        )
    if config.liger:
        raise ConfigError(f"--liger replaces forward functions in which processes exchange data ({mesh}); leave it out")
    if config.experts_implementation != "auto":
        raise ConfigError(
            f"--experts-implementation {config.experts_implementation} needs whole weights on each process ({mesh}),"
            f" because it is compared with eager on whole experts; leave it out"
        )
    if config.compile and (mesh.ep > 1 or mesh.tp > 1):
        raise ConfigError(
            f"--compile: exchanges between processes ({mesh}) break each layer's graph; use --no-compile, or --fsdp"
            " alone"
        )


def apply_execution(config: TrainConfig, model: Any) -> None:
    """Set a model up for liger-kernel, gradient checkpointing and compilation.

    Args:
        config: of the run.
        model: of transformers, before it is wrapped; is changed in place, its tensors keep their names.

    Raises:
        ConfigError: liger-kernel fails on it, or a function for the experts is not there or is wrong.
    """
    if config.liger:
        _apply_liger(model)
    if config.gradient_checkpointing:
        # The reentrant form would lose the gradient of the balance losses without a word.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if config.experts_implementation != "auto":
        set_experts(model, config.experts_implementation)
    if config.compile:
        # Routes are collected in the forward and not again in the recomputation, which is this side effect.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = config.gradient_checkpointing
        compile_layers(model)


def compile_layers(model: nn.Module) -> None:
    """Compile each layer by itself: layers of one kind share what was compiled, so depth costs no time.

    Args:
        model: of transformers; is changed in place.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in layers or [model]:
        module.compile()


def _check_liger(model_type: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(f"--liger: liger-kernel's kernels need a GPU, but this run is on {device}; leave it out")
    if find_spec("liger_kernel") is None:
        raise ConfigError("--liger: liger-kernel is not installed; run pip install liger-kernel")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # liger-kernel itself would leave the model alone without a word
        raise ConfigError(f"--liger: liger-kernel has no kernels for '{model_type}'; leave it out")


def _apply_liger(model: Any) -> None:
    """Norms, rotary positions and a dense model's SwiGLU; the loss is the loop's, the experts are grouped in bf16.

    liger-kernel's experts would be computed in the weights' own dtype, which is fp32.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    swiglu = not has_routers(model)
    try:
        _apply_liger_kernel_to_instance(
            model=model, cross_entropy=False, fused_linear_cross_entropy=False, swiglu=swiglu
        )
    except Exception as error:  # made for other versions of transformers, or for layers of another kind
        reason = in_one_line(error)
        raise ConfigError(
            f"--liger: liger-kernel cannot change this model ({type(error).__name__}: {reason}); leave it out"
        ) from None


def set_experts(model: Any, name: str) -> None:
    """Let a function of transformers compute the experts, after a comparison with the one that is written out.

    One layer's experts get TOKENS random tokens. The outputs, and the gradients of the tokens, of their weights and of
    the experts' matrices, may differ in norm by 0.03 in bf16, and by 1e-4 in fp32.

    Args:
        model: of transformers; its experts are whole.
        name: as transformers has it.

    Raises:
        ConfigError: it does not run here, or its results are others; says which.
    """
    option = f"--experts-implementation {name}"
    experts = next(iter(layers_with_experts(model).values())).experts
    results = {}
    for one in dict.fromkeys(("eager", name)):
        try:
            model.set_experts_implementation(one)
            results[one] = _gradients(experts)
        except Exception as error:  # no GPU, no package, no kernel for this card, no backward
            raise ConfigError(
                f"{option}: transformers cannot use it here ({in_one_line(error).rstrip('.')}); leave it out"
            ) from None
    bound = 0.03 if experts.down_proj.dtype == torch.bfloat16 else 1e-4
    for what, expected in results["eager"].items():
        difference = float((results[name][what] - expected).norm() / expected.norm())
        if not difference <= bound:  # not a number, neither
            raise ConfigError(f"{option}: {what} differ by {difference:.1e} from those of eager; leave it out")


def _gradients(experts: Any) -> dict[str, torch.Tensor]:
    """What experts make of some tokens, and the gradients of a loss on it, in fp32."""
    (E, D), device, dtype = experts.down_proj.shape[:2], experts.down_proj.device, experts.down_proj.dtype
    draw, K = torch.Generator().manual_seed(0), min(2, experts.down_proj.shape[0])
    hidden_TD = torch.randn(TOKENS, D, generator=draw).to(device, dtype).requires_grad_()
    scores_TE = torch.randn(TOKENS, E, generator=draw).softmax(-1).to(device)
    weights_TK, indices_TK = scores_TE.topk(K)
    weights_TK = weights_TK.detach().requires_grad_()
    target_TD = torch.randn(TOKENS, D, generator=draw).to(device)
    output_TD = experts(hidden_TD, indices_TK, weights_TK.to(dtype)).float()
    of = {"gradients of tokens": hidden_TD, "gradients of weights": weights_TK}
    of |= {f"gradients of {name}": getattr(experts, name) for name in ("gate_up_proj", "down_proj")}
    gradients = torch.autograd.grad((output_TD * target_TD).sum(), list(of.values()))
    return {"outputs": output_TD.detach()} | {name: one.float() for name, one in zip(of, gradients, strict=True)}


def evaluating(config: TrainConfig) -> AbstractContextManager[Any]:
    """Validation runs uncompiled: its batches have other shapes, and each would be compiled for itself."""
    return torch.compiler.set_stance("force_eager") if config.compile else nullcontext()


@contextmanager
def executing(config: TrainConfig) -> Iterator[None]:
    """Deterministic kernels if asked for; failures caused by how a run is computed become one line.

    Raises:
        ConfigError: an operation has no deterministic form, or torch cannot compile the model here.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    try:
        yield
    except Exception as error:
        reason = in_one_line(error)
        if config.deterministic and "deterministic" in reason:
            raise ConfigError(f"--deterministic: {reason}; leave it out") from None
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")):
            more = ", and leave out --moments and --no-master-weights, whose update is compiled"
            more = "" if plain(config) else more
            raise ConfigError(f"--compile: torch cannot compile this here: {reason}; use --no-compile{more}") from None
        raise
    finally:
        torch.use_deterministic_algorithms(before)
        if config.compile is not False and "torch._dynamo" in sys.modules:
            torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = False
            torch._dynamo.reset()  # another model of this process is not a recompilation of this one
