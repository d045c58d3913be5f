"""Building a run: reading its weights and moments, and constructing everything that trains them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moetool import launch
from moetool.checkpoint.model import load_model, skeleton
from moetool.cost.parameters import exact_modules, is_selection_bias, router_names, trained_names
from moetool.errors import CheckpointError, ConfigError
from moetool.mesh import distributed
from moetool.progress import Progress
from moetool.routing.capture import RouterCapture, has_routers
from moetool.train import balance, mixed, resume, state, teacher
from moetool.train.accelerator import prepare, reshard
from moetool.train.config import TrainConfig
from moetool.train.execution import apply_execution
from moetool.train.export import lay_out
from moetool.train.loop import Run
from moetool.train.loss import LanguageLoss, chunked_loss, whole_loss
from moetool.train.optimizer import adamw
from moetool.train.ranks import new_ranks
from moetool.train.router_gradient import RouterGradient
from moetool.train.run_plan import RunPlan, untrained_routers
from moetool.train.saving import Saver
from moetool.train.selection import How, Strategy
from moetool.train.validate import check_documents_apart, validate_all


def build_run(plan: RunPlan) -> Run:
    """Load the weights, and the optimizer's moments where there are some; OUT stays as it is.

    Raises:
        CheckpointError: they cannot be loaded.
        ConfigError: the model cannot be trained like this.
    """
    config, accelerator, step = plan.config, plan.accelerator, plan.step
    start = state.step_folder(config.out, step) if step else config.model
    going_on, advice = bool(step or config.keep_optimizer), resume.ADVICE if step else resume.FRESH
    mesh, half = config.mesh, config.precision == "bf16"
    # First, while there is most room: it is read in fp32.
    teaching = _load_teacher(config, accelerator.device, config.teacher) if config.teacher else None
    try:
        core, capture = _ready(config, accelerator.device, start)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {resume.ADVICE}" if step else str(error)) from None
    # Before any forward: FSDP asks once, when it first gathers a weight.
    names = (name for name, _ in core.named_parameters())
    _freeze(core, trained_names(names, router_names(core), config.train_only, config.freeze_router))
    strategies: Mapping[str, Strategy] = {}
    warnings: list[str] = []
    empty = RouterCapture(skeleton(config.model)) if capture else None
    if capture:
        how = How(empty, balance.last_move(config), "centred" in plan.identity)
        strategies = balance.build_strategies(config.balance, core, capture, how)
        plan = replace(plan, terms={**plan.terms, **{n: s.term for n, s in strategies.items() if s.term}})
        if not config.frozen_routers and config.router_gradient == "sparse":
            losses = [name for name in plan.terms if name in config.balance]
            warnings = untrained_routers(core, capture, losses)
        if warnings and config.train_only == "routers" and not losses:
            raise ConfigError(f"--train-only routers: {warnings[0]}")
    if not config.cross_document:
        check_documents_apart(core, half and not mesh.whole)
    if going_on:
        resume.load_weights(start, core, advice)
    masters: mixed.Masters = "host" if config.moments == "offload" else "device" if config.master_weights else "none"
    weights = mixed.cast(core, capture, masters) if config.keeps_copies else None
    language_loss = _language_loss(core, config)
    asked = teacher.ready(teaching, config, core) if teaching else None
    reshard(core)
    weights = weights or dict(core.named_parameters())
    apply_execution(config, core)
    gradient = None
    if capture and empty and config.router_gradient != "sparse":
        gradient = RouterGradient(config.router_gradient, core, capture, empty)
    optimizer = adamw(weights.values(), config, list(core.parameters()), [weights[n] for n in router_names(core)])
    model, updates = prepare(accelerator, core, optimizer, ddp=mesh.whole and not half)
    if going_on:
        resume.load_moments(start, weights, optimizer, advice)
    if step:
        resume.load_balance(start, balance.state(strategies) | (gradient.state if gradient else {}), advice)
    need = plan.values["memory"]
    there = need["weights"] + need.get("teacher", 0)
    here = 0 if accelerator.device.type == "cuda" else need["total"] - there  # host memory to train
    here += need["host"]
    saver = Saver(launch.num_local_processes() * (plan.values["saving_memory"] + here), new_ranks())
    layout = lay_out(core, plan.save_dtype)
    return Run(
        plan,
        core,
        model,
        weights,
        optimizer,
        updates,
        capture,
        strategies,
        gradient,
        language_loss,
        asked,
        layout,
        saver,
        warnings,
        step,
    )


def validate_other(run: Run, folder: Path, progress: Progress) -> dict[str, float]:
    """The losses of another checkpoint of a run's model on its validation sets, computed as the run's own.

    All processes must call. The run has ended: its moments and gradients make room for the weights.

    Args:
        run: that has trained to its last step.
        folder: the checkpoint.
        progress: reports the sets.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    plan = run.plan
    if not plan.corpus.val:
        return {}
    run.optimizer.state.clear()
    run.optimizer.zero_grad()
    core, capture = _ready(plan.config, plan.accelerator.device, folder)
    if plan.config.keeps_copies:
        mixed.cast(core, capture, "none")
    apply_execution(plan.config, core)
    losses, _ = validate_all(
        core, capture, _language_loss(core, plan.config), plan.corpus.val, plan.config, plan.accelerator, progress
    )
    return losses


def _ready(config: TrainConfig, device: torch.device, folder: Path) -> tuple[Any, RouterCapture | None]:
    """A model with the weights of a folder, fp32 and sharded as the mesh says, and the capture on its routers."""
    half = config.precision == "bf16" and not config.mesh.whole
    apart = exact_modules(skeleton(folder)) if half else []
    core = _load(folder, device, distributed(config.mesh, apart))
    if half:
        mixed.gather_in_bf16(core, apart)
    return core, RouterCapture(core) if has_routers(core) else None


def _load_teacher(config: TrainConfig, device: torch.device, folder: Path) -> Any:
    """A teacher in the precision of the run; see teacher.py."""
    core, capture = _ready(config, device, folder)
    if not config.cross_document:
        check_documents_apart(core, config.precision == "bf16" and not config.mesh.whole)
    if config.keeps_copies:
        mixed.cast(core, capture, "none")
    return core


def _language_loss(core: Any, config: TrainConfig) -> LanguageLoss:
    # Tensor parallelism shares the head's matrix out.
    chunked = config.precision == "bf16" and config.mesh.tp == 1
    return (chunked_loss(core, config.compile or config.liger) if chunked else None) or whole_loss


def _load(folder: Path, device: torch.device, mesh: Any) -> Any:
    from transformers import GenerationConfig

    model = load_model(folder, "float32", distributed=mesh) if mesh else load_model(folder, "float32", str(device))
    # Never Hugging Face's pooled balance loss. The source's generation settings are copied as they
    # are; transformers refuses to save some that it loads.
    model.config.output_router_logits = False
    model.generation_config = GenerationConfig()
    # No gradient reaches a selection bias, for which DDP would wait.
    _freeze(model, [name for name, _ in model.named_parameters() if not is_selection_bias(name)])
    return model


def _freeze(model: Any, trained: Collection[str]) -> None:
    """Let only some parameters of a model get a gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in trained)
