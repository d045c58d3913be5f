"""Opening a run: everything is checked, and OUT is locked, before the first weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from moetool.checkpoint.folder import FolderLock
from moetool.checkpoint.model import skeleton
from moetool.checkpoint.reader import content_fingerprint
from moetool.checkpoint.step_folder import WEIGHTS, step_folders
from moetool.errors import ConfigError
from moetool.mesh import check_model, check_sizes
from moetool.progress import Progress, silent
from moetool.routing.capture import has_routers
from moetool.train import balance, optimizer, router_gradient, state
from moetool.train.accelerator import make_accelerator
from moetool.train.batches import open_corpus
from moetool.train.checks import check_batches
from moetool.train.config import TrainConfig
from moetool.train.differences import differences
from moetool.train.execution import check_execution, check_sharing, executing
from moetool.train.longer import check_going_on, first_length
from moetool.train.ranks import Ranks, new_ranks
from moetool.train.run_plan import RunPlan, plan_run
from moetool.train.teacher import check_teacher


@dataclass(frozen=True)
class Opened:
    """A run in an OUT that is held for it.

    Attributes:
        plan: of what is left to do; None if nothing is.
        summary: of a run that is finished in OUT.
    """

    plan: RunPlan | None = None
    summary: dict[str, Any] = field(default_factory=dict)


@contextmanager
def open_run(config: TrainConfig, progress: Progress = silent) -> Iterator[Opened]:
    """Check everything and lock OUT; nothing is loaded yet, and nothing in OUT changed.

    Raises:
        ConfigError: options contradict the model, the machine or the checkpoints in OUT.
        CheckpointError: MODEL or OUT cannot be used, or another process writes OUT.
        DataError: a source cannot be read.
    """
    with executing(config), _opened(config, progress) as opened:
        yield opened


@contextmanager
def _opened(config: TrainConfig, progress: Progress) -> Iterator[Opened]:
    accelerator = make_accelerator(config.log_with, config.out / state.TRACKERS)
    main, out, ranks = accelerator.is_main_process, config.out, new_ranks()
    _alike(ranks, {"resume": config.resume, "keep-optimizer": config.keep_optimizer})  # what they do together below
    state.check_folder(config.model, out, config.resume)
    if config.teacher is not None:
        state.check_folder(config.teacher, out, config.resume)
    state.check_start(config.model, config.keep_optimizer, ranks)
    model = skeleton(config.model)
    positions = getattr(model.config, "max_position_embeddings", None) or 2**31
    default_balance = balance.parse([]) if has_routers(model) else {}
    mesh = config.mesh
    check_sizes(mesh, accelerator.num_processes, config.replicas is None)
    check_model(mesh, model)

    def resolved(asked: TrainConfig) -> TrainConfig:
        return asked.resolve(positions, default_balance, accelerator.device.type == "cuda", compiled=mesh.whole)

    asked, config = config, resolved(config)
    check_batches(config.global_batch_size, config.micro_batch_size, mesh.data_parallel)
    balance.check(config, model)
    router_gradient.check(config, model)
    check_execution(config, model, accelerator.device)
    check_sharing(config, model)
    optimizer.check(config, accelerator.device)
    teacher = check_teacher(config, model)
    accelerator.wait_for_everyone()
    with FolderLock(out) if main else nullcontext():
        with accelerator.main_process_first():
            corpus = open_corpus(config, model.get_input_embeddings().num_embeddings, progress)
        known_teacher = content_fingerprint(config.teacher) if teacher else ""
        identity = config.identity(content_fingerprint(config.model), corpus.fingerprints, known_teacher)
        often = {"save-every": config.save_every, "eval-every": config.eval_every}
        often |= {"keep-weights": config.keep_weights, "average-last": config.average_last}
        _alike(ranks, {**identity, **vars(mesh), **often})
        found = state.find(out, ranks, config.max_steps) if config.resume else state.Found()
        changed: list[str] = []
        if found.identity is not None:
            first = first_length(found.identity)
            if asked.shares_of is None and first and first < config.max_steps:
                config = resolved(replace(asked, shares_of=first))
                identity = config.identity(identity["model"], corpus.fingerprints, known_teacher)
            # A run from before biases were centred goes on as it began.
            identity = {name: value for name, value in identity.items() if name != "centred" or name in found.identity}
            changed = check_going_on(config, found.identity, identity, found.step)
        if found.summary is not None:
            yield Opened(summary=found.summary)
            return
        _check_average(config, found.step)
        plan = plan_run(config, accelerator, model, corpus, identity, found.step, teacher)
        told = [f"{reason}; continuing from step {found.step}" for reason in found.damaged]
        told += [f"from step {found.step} on, this run has other options: {'; '.join(changed)}"] if changed else []
        yield Opened(replace(plan, warnings=[*plan.warnings, *told]))
    accelerator.end_training()


def _alike(ranks: Ranks, mine: Mapping[str, Any]) -> None:
    """Refuse processes that were started for different runs: they would wait for each other, or mix two trainings."""
    first, *others = ranks.gather(mine)
    for rank, other in enumerate(others, 1):
        if changed := differences(first, other, ("on process 0", f"on process {rank}")):
            raise ConfigError(
                f"process {rank} has other options or data than process 0: {'; '.join(changed)}. Start all with the"
                " same command, and give them the same files"
            )


def _check_average(config: TrainConfig, step: int) -> None:
    """Refuse an average of more snapshots than there will be at the end of a run that goes on from `step`."""
    every = config.keep_weights
    if config.average_last and every:
        there = sum(saved <= step for saved in step_folders(config.out, WEIGHTS)) if config.resume else 0
        count = there + config.max_steps // every - step // every
        if config.average_last > count:
            raise ConfigError(
                f"--average-last {config.average_last}: --keep-weights {every} keeps {count} in this run of"
                f" {config.max_steps} steps; give at most that, or keep them more often"
            )
