"""What the user asked of a training run, as data; which of it defines the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from moetool.errors import ConfigError
from moetool.train.schedules import parameters

MAX_DEFAULT_SEQ_LEN = 2048
MAX_DEFAULT_MICRO_BATCH = 8
DEFAULT_REPLAY_RATIO = 0.3
PRECISIONS = ("bf16", "fp32")
SAVE_DTYPES = ("auto", "float32", "bfloat16", "float16")
UNSET: Any = None  # not given; `resolve` fills it in


@dataclass(frozen=True)
class TrainConfig:
    """The options of `moetool cpt`; UNSET ones depend on the model, the machine or each other.

    Attributes:
        model: folder of the checkpoint to start from.
        out: folder of the run.
        train: training sources, name -> path.
        replay: replay sources, name -> path.
        weights: name -> weight relative to the other sources of its kind.
        replay_ratio: share of tokens that is replay; by default 0.3 with replay sources, else 0.
        val: validation sets, name -> path.
        val_fraction: share of the documents of each source without a validation set of its name that
            is held out for one.
        text_field: the field that holds the text in JSONL, Parquet and datasets.
        cross_document: whether tokens attend to earlier documents of their sequence.
        document: what one document of a plain-text file is: file, line or paragraph.
        max_steps: optimizer updates; excludes `max_tokens`.
        max_tokens: predicted tokens over all updates, rounded down to whole steps.
        seq_len: tokens predicted in a sequence.
        global_batch_size: sequences of one update, over all processes.
        micro_batch_size: sequences of one forward of one process.
        schedule: a name in the registry.
        lr: peak learning rate.
        min_lr: final learning rate; by default lr / 10.
        constant_lr: of the constant phase; by default halfway between lr and min_lr.
        cooldown_end: share of the updates after which the cooldown ends, by default 0.7; 0: there is none.
        constant_end: share of the updates after which the constant phase ends, by default 0.8.
        warmup_ratio: share of the updates that warms up; excludes `warmup_steps`.
        warmup_steps: updates that warm up.
        weight_decay: decoupled, on tensors of two or more dimensions.
        beta1: AdamW's first decay rate.
        beta2: AdamW's second decay rate.
        grad_clip: largest L2 norm of the gradient; 0 does not clip.
        balance: strategy -> coefficient; by default aux and z-loss for a Mixture of Experts, nothing with
            a frozen router.
        freeze_router: the routers' weights stay as they are.
        precision: bf16 or fp32; by default bf16 on a GPU, fp32 on a CPU.
        moments: how the optimizer's are kept: fp32, bf16 or 8bit.
        master_weights: update fp32 weights beside the bf16 ones of the forward; without them the bf16 ones are
            updated, rounded up or down at random.
        gradient_checkpointing: compute each layer a second time in the backward instead of keeping it.
        compile: each layer with torch.compile; by default on a GPU in bf16, where the weights are not shared out.
        liger: with the kernels of liger-kernel.
        deterministic: torch's deterministic kernels alone.
        save_dtype: of saved checkpoints; auto is the source's.
        save_every: updates between checkpoints; by default a tenth of the run.
        eval_every: updates between validations; by default a tenth of the run.
        keep_checkpoints: how many step folders are kept.
        keep_optimizer: begin with the optimizer's moments and fp32 weights of `model`, a step folder.
        resume: go on from the newest step folder; False begins again.
        log_with: trackers to tell the metrics to.
        seed: of the data order and of dropout.
    """

    model: Path
    out: Path
    train: Mapping[str, str]
    replay: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    replay_ratio: float = UNSET
    val: Mapping[str, str] = field(default_factory=dict)
    val_fraction: float = 0.01
    text_field: str = "text"
    document: str = "file"
    cross_document: bool = True
    max_steps: int = UNSET
    max_tokens: int = UNSET
    seq_len: int = UNSET
    global_batch_size: int = 32
    micro_batch_size: int = UNSET
    schedule: str = "cosine"
    lr: float = 3e-4
    min_lr: float = UNSET
    constant_lr: float = UNSET
    cooldown_end: float = UNSET
    constant_end: float = UNSET
    warmup_ratio: float = UNSET
    warmup_steps: int = UNSET
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    balance: Mapping[str, float] = UNSET
    freeze_router: bool = False
    precision: str = UNSET
    moments: str = "fp32"
    master_weights: bool = True
    gradient_checkpointing: bool = False
    compile: bool = UNSET
    liger: bool = False
    deterministic: bool = False
    save_dtype: str = "auto"
    save_every: int = UNSET
    eval_every: int = UNSET
    keep_checkpoints: int = 2
    keep_optimizer: bool = False
    resume: bool = True
    log_with: Sequence[str] = ()
    seed: int = 0

    def resolve(
        self, max_seq_len: int, default_balance: Mapping[str, float], gpu: bool, compiled: bool = False
    ) -> TrainConfig:
        """Fill in what depends on the model and the machine.

        Args:
            max_seq_len: the longest sequence that the model knows positions for.
            default_balance: for the model; empty when it is dense.
            gpu: whether it trains on a GPU.
            compiled: whether layers are compiled there in bf16, if the user does not say.

        Raises:
            ConfigError: an option does not fit the model, or less than one step is asked for.
        """
        seq_len = self.seq_len or min(MAX_DEFAULT_SEQ_LEN, max_seq_len)
        if seq_len > max_seq_len:
            raise ConfigError(f"--seq-len {seq_len}: the model knows {max_seq_len} positions; give at most that")
        if self.balance and not default_balance:
            raise ConfigError(
                f"--balance {next(iter(self.balance))}: {self.model} is a dense model without a router to balance;"
                " leave --balance out, or upcycle the model first"
            )
        step_tokens = seq_len * self.global_batch_size
        steps = self.max_steps or self.max_tokens // step_tokens
        if steps < 1:
            raise ConfigError(
                f"--max-tokens {self.max_tokens} is less than one step: --global-batch-size {self.global_batch_size}"
                f" x --seq-len {seq_len} = {step_tokens} tokens"
            )
        warmup = self.warmup_steps
        if warmup is None:
            warmup = round((0.01 if self.warmup_ratio is None else self.warmup_ratio) * steps)
        min_lr = self.lr / 10 if self.min_lr is None else self.min_lr
        every = max(1, steps // 10)
        precision = self.precision or ("bf16" if gpu else "fp32")
        compiled = compiled and gpu and precision == "bf16" and not self.liger
        return replace(
            self,
            replay_ratio=self.replay_ratio
            if self.replay_ratio is not None
            else DEFAULT_REPLAY_RATIO * bool(self.replay),
            max_steps=steps,
            max_tokens=steps * step_tokens,
            seq_len=seq_len,
            micro_batch_size=self.micro_batch_size or default_micro_batch(self.global_batch_size),
            min_lr=min_lr,
            # The midpoint: 1.65e-4 between the 3e-4 and 3e-5 of the runs that this schedule is known from.
            constant_lr=(self.lr + min_lr) / 2 if self.constant_lr is None else self.constant_lr,
            cooldown_end=0.7 if self.cooldown_end is None else self.cooldown_end,
            constant_end=0.8 if self.constant_end is None else self.constant_end,
            warmup_steps=warmup,
            balance=dict(({} if self.freeze_router else default_balance) if self.balance is None else self.balance),
            precision=precision,
            compile=compiled if self.compile is None else self.compile,
            save_every=self.save_every or every,
            eval_every=self.eval_every or every,
        )

    def to_json(self) -> dict[str, Any]:
        """The options as plain values, for the lineage."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("out", "resume")}
        return {
            key: str(v) if isinstance(v, Path) else dict(v) if isinstance(v, Mapping) else v
            for key, v in values.items()
        }

    def identity(self, model: str, sources: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
        """What makes two runs the same run, by option name; of a resolved config.

        How often a run saves and validates, and how many checkpoints it keeps, does not change what it
        computes; nor do the number of processes and the place of MODEL and of the data, which are
        known by their content.

        Args:
            model: fingerprint of the source checkpoint.
            sources: option (train, replay, val) -> name -> fingerprint of its tokens.
        """
        options = (
            "replay_ratio", "val_fraction", "max_steps", "seq_len", "global_batch_size", "micro_batch_size", "schedule",
            *parameters(self.schedule), "weight_decay", "beta1", "beta2", "grad_clip", "precision", "save_dtype",
            "seed", "keep_optimizer", "cross_document",
        )  # fmt: skip
        return {
            "model": model,
            **{kind: dict(named) for kind, named in sources.items()},
            "weight": {name: self.weights.get(name, 1) for name in (*self.train, *self.replay)},
            **{name.replace("_", "-"): getattr(self, name) for name in options},
            "balance": dict(self.balance or {}),
            "freeze-router": self.freeze_router,
            # Runs from before these options had the defaults.
            **({} if self.moments == "fp32" else {"moments": self.moments}),
            **({} if self.master_weights else {"master-weights": False}),
        }


def default_micro_batch(global_batch_size: int) -> int:
    """The largest divisor of the global batch up to 8, whatever the number of processes."""
    return max(n for n in range(1, MAX_DEFAULT_MICRO_BATCH + 1) if global_batch_size % n == 0)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The options in which two identities differ, with both values where they say something."""
    changed = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == "model":
            changed.append("MODEL (other files)")
        elif name in ("train", "replay", "val") and isinstance(old, dict) and isinstance(new, dict):
            parts = [f"{key} ({_change(key, old, new)})" for key in {**old, **new} if old.get(key) != new.get(key)]
            changed.append(f"--{name} {', '.join(parts)}")
        else:
            changed.append(f"--{name} ({_plain(old)} before, {_plain(new)} now)")
    return changed


def _change(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return "new" if name not in old else "gone" if name not in new else "other text"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return (
            " ".join(f"{key}={item:g}" if isinstance(item, float) else f"{key}={item}" for key, item in value.items())
            or "none"
        )
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_batches(global_batch_size: int, micro_batch_size: int, num_processes: int) -> None:
    """Refuse a global batch that does not fall into equal micro-batches.

    Raises:
        ConfigError: names the micro-batch sizes that would do.
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
