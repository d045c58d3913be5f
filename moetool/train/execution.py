"""How a run is computed: layers twice, compiled, with other kernels, deterministically.

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

from moetool.errors import ConfigError, in_one_line
from moetool.routing.capture import has_routers
from moetool.train.config import TrainConfig
from moetool.train.optimizer import plain


def check_execution(config: TrainConfig, model: Any, device: torch.device) -> None:
    """Refuse what the model or the machine cannot do, before the weights are read.

    Args:
        config: of the run.
        model: of transformers; its weights may be on torch's meta device.
        device: that it will train on.

    Raises:
        ConfigError: says what.
    """
    if config.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ConfigError(f"--gradient-checkpointing: transformers has none for {type(model).__name__}; leave it out")
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
        raise ConfigError(f"--moments offload: only where each process holds all weights ({mesh}); leave it out")
    if not plain(config):
        option = "--no-master-weights" if config.moments == "fp32" else f"--moments {config.moments}"
        raise ConfigError(f"{option}: torchao's optimizers do not take shards of a mesh ({mesh}); leave it out")
    if not mesh.sharded:
        # Measured: of norms within tensor-parallel layers it sums the gradients so far again in each micro-batch.
        raise ConfigError(
            f"--tp {mesh.tp} alone: transformers adds up gradients over micro-batches correctly only under FSDP; use"
            " --fsdp or --replicas above 1 as well"
        )
    if config.liger:
        raise ConfigError(
            f"--liger: it replaces forwards in which transformers exchanges between processes ({mesh}); leave it out"
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
        ConfigError: liger-kernel fails on it.
    """
    if config.liger:
        _apply_liger(model)
    if config.gradient_checkpointing:
        # The reentrant form would lose the gradient of the balance losses without a word.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if config.compile:
        # Routes are collected in the forward and not again in the recomputation, which is this side effect.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = config.gradient_checkpointing
        _compile_layers(model)


def _compile_layers(model: nn.Module) -> None:
    """Compile each layer by itself: layers of one kind share what was compiled, so depth costs no time."""
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
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            more = ", and leave out --moments and --no-master-weights, whose update is compiled"
            more = "" if plain(config) else more
            raise ConfigError(f"--compile: torch cannot compile this here: {reason}; use --no-compile{more}") from None
        raise
    finally:
        torch.use_deterministic_algorithms(before)
        if config.compile is not False and "torch._dynamo" in sys.modules:
            torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = False
            torch._dynamo.reset()  # another model of this process is not a recompilation of this one
