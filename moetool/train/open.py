"""Opening a run: everything is checked, and OUT is held, before the first weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moetool.checkpoint.folder import FolderLock
from moetool.checkpoint.model import skeleton
from moetool.checkpoint.reader import content_fingerprint
from moetool.errors import ConfigError
from moetool.progress import Progress, silent
from moetool.routing.capture import has_routers
from moetool.train import balance, optimizer, state, zero
from moetool.train.accelerator import agreed, make_accelerator, sharing
from moetool.train.batches import open_corpus
from moetool.train.config import TrainConfig, check_batches, differences
from moetool.train.execution import check_execution, executing
from moetool.train.run_plan import RunPlan, plan_run


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
    main, out, shares = accelerator.is_main_process, config.out, sharing(accelerator)
    state.check_folder(config.model, out, config.resume)
    state.check_start(config.model, config.keep_optimizer)
    model = skeleton(config.model)
    positions = getattr(model.config, "max_position_embeddings", None) or 2**31
    default_balance = balance.parse([]) if has_routers(model) else {}
    config = config.resolve(positions, default_balance, accelerator.device.type == "cuda", compiled=shares.whole)
    check_batches(config.global_batch_size, config.micro_batch_size, accelerator.num_processes)
    balance.check(config, model)
    check_execution(config, model, accelerator.device)
    optimizer.check(config, shares.whole, accelerator.device)
    zero.check_options(config, shares.zero_stage)
    accelerator.wait_for_everyone()
    with FolderLock(out) if main else nullcontext():
        with accelerator.main_process_first():
            corpus = open_corpus(config, model.get_input_embeddings().num_embeddings, progress)
        identity = config.identity(content_fingerprint(config.model), corpus.fingerprints)
        found = agreed(accelerator, state.find(out) if main and config.resume else state.Found())
        if found.identity is not None:
            _same(out, found.identity, identity)
        if found.summary is not None:
            yield Opened(summary=found.summary)
            return
        plan = plan_run(config, accelerator, model, corpus, identity, found.step)
        damaged = [f"{reason}; continuing from step {found.step}" for reason in found.damaged]
        yield Opened(replace(plan, warnings=[*plan.warnings, *damaged]))
    accelerator.end_training()


def _same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = differences(before, now)
    if changed:
        raise ConfigError(
            f"{out} holds a run with other options: {'; '.join(changed)}. Repeat its options to continue it,"
            " use --no-resume to delete it and start again, or choose another OUT"
        )
