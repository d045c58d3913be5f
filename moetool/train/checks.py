"""Options of a training run that contradict each other, or have no effect beside each other."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from moetool import registry
from moetool.errors import ConfigError
from moetool.launch import num_processes
from moetool.mesh import check_sizes
from moetool.option import flag
from moetool.train import weights
from moetool.train.schedules import parameters

if TYPE_CHECKING:
    from moetool.train.config import TrainConfig

MAX_DEFAULT_MICRO_BATCH = 8


def check(config: TrainConfig, typed: Collection[str]) -> None:
    """Refuse options that contradict each other, whatever the model.

    Args:
        config: not resolved.
        typed: the options that were typed, not read from a file.

    Raises:
        ConfigError: names them.
    """
    if config.max_tokens is None and config.max_steps is None:
        raise ConfigError("give the length of the run: either --max-tokens 2B or --max-steps 1000")
    if config.max_tokens is not None and config.max_steps is not None:
        raise ConfigError(
            f"--max-tokens {config.max_tokens} and --max-steps {config.max_steps} both give the length of the run;"
            " leave one of them out"
        )
    if config.warmup_ratio is not None and config.warmup_steps is not None:
        raise ConfigError("give --warmup-ratio or --warmup-steps, not both")
    if not 0 < config.lr < float("inf"):
        raise ConfigError(f"--lr {config.lr:g}: a number above 0 is needed")
    if config.min_lr is not None and config.min_lr > config.lr:
        raise ConfigError(f"--min-lr {config.min_lr:g} is above --lr {config.lr:g}; the learning rate must fall to it")
    if config.weight_decay == float("inf"):
        raise ConfigError("--weight-decay inf: a finite number is needed")
    for name in ("min_lr", "decay_shape"):
        if name in typed and config.constant_end == 1 and "constant_end" in parameters(config.schedule):
            raise ConfigError(f"{flag(name)} has no effect with --constant-end 1: nothing anneals to --min-lr")
    shares = [config.warmup_steps is None, "cooldown_end" in parameters(config.schedule)]
    shares += [weights.has_shares(weight) for weight in config.weight.values()]
    if "shares_of" in typed and not any(shares):
        raise ConfigError("--shares-of has no effect, because no option is a share of the length")
    _check_sources(config, typed)
    _check_teacher(config)
    check_sizes(config.mesh, num_processes(), config.replicas is None)
    micro_batch = config.micro_batch_size or default_micro_batch(config.global_batch_size)
    check_batches(config.global_batch_size, micro_batch, config.mesh.data_parallel)
    if config.average_last and not config.keep_weights:
        raise ConfigError(f"--average-last {config.average_last}: give --keep-weights N, the steps between weights")
    _check_routers(config, typed)


def _check_routers(config: TrainConfig, typed: Collection[str]) -> None:
    frozen = config.frozen_routers
    if config.freeze_router and config.train_only == "routers":
        raise ConfigError("--freeze-router with --train-only routers would train nothing; leave one of them out")
    if config.freeze_router and config.train_only == "experts":
        raise ConfigError("--freeze-router has no effect with --train-only experts, which trains no router")
    if not 0 < config.router_lr < float("inf"):
        raise ConfigError(
            f"--router-lr {config.router_lr:g}: a factor above 0 is needed; to freeze the routers use --freeze-router"
        )
    if "router_lr" in typed and frozen:
        raise ConfigError(f"--router-lr has no effect with {frozen}, which trains no router")
    if config.router_gradient != "sparse" and frozen:
        raise ConfigError(
            f"--router-gradient {config.router_gradient} has no effect with {frozen}, which trains no router"
        )
    if "balance_end" in typed and "loss-free" not in (config.balance or {}):
        raise ConfigError("--balance-end has no effect without --balance loss-free, whose selection bias it stops")
    if config.balance_end == 0:
        raise ConfigError("--balance-end 0: loss-free would never move the selection bias; give a share above 0")
    if config.balance and frozen:
        from moetool.train.balance import check_frozen

        check_frozen(config.balance, frozen)


def _check_teacher(config: TrainConfig) -> None:
    if config.teacher is None:
        return
    if config.teacher_on == "replay" and not config.replay:
        raise ConfigError(
            "--teacher-on replay: there is no --replay; give text to replay (--replay NAME=PATH), or --teacher-on all"
        )
    if not config.teacher_weight:
        raise ConfigError("--teacher has no effect with --teacher-weight 0; give a weight above 0, or leave both out")
    if not 0 < config.teacher_temperature < float("inf"):
        raise ConfigError(f"--teacher-temperature {config.teacher_temperature:g}: a number above 0 is needed")


def _check_sources(config: TrainConfig, typed: Collection[str]) -> None:
    kinds = (config.train, config.replay)
    sources = [name for kind in kinds for name in kind]
    for name in config.weight:
        if name not in sources:
            near = registry.suggest(name, sources)
            raise ConfigError(f"--weight {name}: no --train or --replay has that name{near}")
        if any(list(kind) == [name] for kind in kinds):
            raise ConfigError(f"--weight {name} has no effect, because there is no other source of its kind")
    held_out = [name for name in sources if name not in config.val]
    if "val_fraction" in typed and config.val_fraction and not held_out:
        raise ConfigError("--val-fraction has no effect: every source has a --val of its name")
    if "eval_every" in typed and not (config.val or (config.val_fraction and held_out)):
        raise ConfigError("--eval-every has no effect: there is no --val, and nothing is held out of the sources")


def default_micro_batch(global_batch_size: int) -> int:
    """The largest divisor of the global batch up to 8, whatever the number of processes."""
    return max(n for n in range(1, MAX_DEFAULT_MICRO_BATCH + 1) if global_batch_size % n == 0)


def check_batches(global_batch_size: int, micro_batch_size: int, num_processes: int) -> None:
    """Refuse a global batch that does not fall into equal micro-batches for processes that read different text.

    Raises:
        ConfigError: names the micro-batch sizes that would work.
    """
    if global_batch_size % (micro_batch_size * num_processes) == 0:
        return
    share, rest = divmod(global_batch_size, num_processes)
    if rest:
        advice = f"use a multiple of {num_processes}, the number of processes, for --global-batch-size"
    else:
        fitting = [str(n) for n in range(1, share + 1) if share % n == 0]
        advice = f"--micro-batch-size may be {', '.join(fitting)}"
    raise ConfigError(
        f"--global-batch-size {global_batch_size} is not a multiple of --micro-batch-size {micro_batch_size}"
        f" x {num_processes} process{'es' if num_processes > 1 else ''}; {advice}"
    )
