"""The options of a training run as data, and which of them define the result."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from moetool import registry
from moetool.errors import ConfigError
from moetool.mesh import SHARING, Mesh, ep_option, fsdp_option, mesh_of, tp_option
from moetool.option import document_option, dtype_option, option, options, text_field_option, without_effect
from moetool.train import checks, weights
from moetool.train.schedules import default_shape, parameters
from moetool.values import named, parse_count

MAX_DEFAULT_SEQ_LEN = 2048
DEFAULT_REPLAY_RATIO = 0.3
UNSET: Any = None  # not given; `resolve` fills it in
# accelerate's names, which are the packages' own.
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "aim", "comet_ml", "clearml", "dvclive", "swanlab")
DATA, TEACHER, SIZE, RATE, MOE, RUN = (
    "Data (options with NAME repeat)", "Teacher", "Size", "Optimizer and schedule", "Mixture of Experts",
    "Saving and resuming",
)  # fmt: skip


def _strategies(values: Sequence[str], flag: str) -> dict[str, float]:
    from moetool.train.balance import parse

    return parse(values)


def _scheduled(parameter: str) -> dict[str, Any]:
    """An option that only the schedules with this parameter read."""
    return {"panel": RATE, "needs": ("schedule", lambda name: parameter in parameters(name))}


@dataclass(frozen=True)
class TrainConfig:
    """The options of `moetool cpt`; UNSET ones depend on the model, the machine or each other."""

    model: Path = option(
        "Checkpoint to start from: a folder, owner/name\\[@revision], or a step folder of another run.",
        positional=True, metavar="MODEL", typed=str,
    )  # fmt: skip
    out: Path = option("Output folder of the run.", positional=True, metavar="OUT")
    train: Mapping[str, str] = option(
        "New text or tokens: a file, folder, glob or hf:owner/name.", panel=DATA, metavar="NAME=PATH", make=named
    )
    replay: Mapping[str, str] = option(
        "Earlier text, mixed in to prevent forgetting.", dict, panel=DATA, metavar="NAME=PATH", make=named
    )
    weight: Mapping[str, weights.Weight] = option(
        "Weight of a source relative to the others of its kind (default 1). Phases such as 0.2@0,0.6@50% change it"
        " during the run; each begins at a step or a share of the run.",
        dict, panel=DATA, metavar="NAME=W", make=weights.parse,
    )  # fmt: skip
    replay_ratio: float = option(
        "Share of replayed text in each batch.",
        UNSET, panel=DATA, shown="0.3 with --replay", min=0, max=1, defines=True,
    )  # fmt: skip
    val: Mapping[str, str] = option("Text used for validation only.", dict, panel=DATA, metavar="NAME=PATH", make=named)
    val_fraction: float = option(
        "Share of each source held out for validation, unless a --val has its name: whole documents, or the last part"
        " of a single document.",
        0.01, panel=DATA, min=0, max=1, defines=True,
    )  # fmt: skip
    text_field: str = text_field_option(DATA)
    document: Literal["file", "line", "paragraph"] = document_option(DATA)
    cross_document: bool = option(
        "Let tokens attend to earlier documents in the same sequence, or only to their own document.",
        True, panel=DATA, defines=True,
    )  # fmt: skip
    teacher: Path = option(
        "Model whose predictions the trained model should stay close to, such as the model before training: a folder"
        " or owner/name\\[@revision].",
        UNSET, panel=TEACHER, metavar="MODEL", typed=str,
    )  # fmt: skip
    teacher_on: Literal["replay", "all"] = option(
        "Sequences that use the teacher: replayed ones, or all.",
        "replay", panel=TEACHER, needs=("teacher", bool), defines=True,
    )  # fmt: skip
    teacher_weight: float = option(
        "Weight of the divergence from the teacher; the language loss gets the rest.",
        0.5, panel=TEACHER, min=0, max=1, needs=("teacher", bool), defines=True,
    )  # fmt: skip
    teacher_temperature: float = option(
        "Temperature applied to both models' predictions.",
        1.0, panel=TEACHER, min=0, needs=("teacher", bool), defines=True,
    )  # fmt: skip
    max_steps: int = option(
        "Length of the run in steps, instead of --max-tokens.",
        UNSET, panel=SIZE, min=1, defines=True, after="max_tokens",
    )  # fmt: skip
    max_tokens: int = option(
        "Length of the run in tokens, such as 2B or 500M, rounded down to whole steps.",
        UNSET, panel=SIZE, metavar="COUNT", parse=parse_count,
    )  # fmt: skip
    shares_of: int = option(
        "Number of steps to which --warmup-ratio, --cooldown-end and starts of --weight in % refer.",
        UNSET, panel=SIZE, shown="the first length of the run", min=1, metavar="STEPS", defines=True,
    )  # fmt: skip
    seq_len: int = option(
        "Sequence length in tokens.",
        UNSET, panel=SIZE, shown="2048, or the model's maximum if that is less", min=1, defines=True,
    )  # fmt: skip
    global_batch_size: int = option(
        "Number of sequences per step, over all processes.", 32, panel=SIZE, min=1, defines=True
    )
    micro_batch_size: int = option(
        "Number of sequences per forward pass of one process.",
        UNSET, panel=SIZE, shown="the largest divisor of --global-batch-size up to 8", min=1, defines=True,
    )  # fmt: skip
    schedule: str = option("Learning-rate schedule.", "cosine", panel=RATE, kind="schedule", defines=True)
    lr: float = option("Peak learning rate.", 3e-4, min=0, defines=True, **_scheduled("lr"))
    min_lr: float = option(
        "Final learning rate.", UNSET, shown="a tenth of --lr", min=0, defines=True, **_scheduled("min_lr")
    )
    constant_lr: float = option(
        "Learning rate of the constant phase (infinite).",
        UNSET, shown="halfway between --lr and --min-lr", min=0, defines=True, **_scheduled("constant_lr"),
    )  # fmt: skip
    cooldown_end: float = option(
        "End of the cooldown as a share of the run (infinite); 0 means no cooldown.",
        UNSET, shown="0.7", min=0, max=1, defines=True, **_scheduled("cooldown_end"),
    )  # fmt: skip
    constant_end: float = option(
        "End of the constant phase as a share of the run (infinite, wsd).",
        UNSET, shown="0.8", min=0, max=1, defines=True, **_scheduled("constant_end"),
    )  # fmt: skip
    decay_shape: Literal["linear", "minus-sqrt", "exponential"] = option(
        "Shape of the decay to --min-lr after the constant phase (infinite, wsd).",
        UNSET, shown="linear with wsd, exponential with infinite", defines=True, **_scheduled("decay_shape"),
    )  # fmt: skip
    warmup_ratio: float = option(
        "Length of the warm-up from 0, as a share of the steps.",
        UNSET, shown="0.01", min=0, max=1, **_scheduled("warmup_steps"),
    )  # fmt: skip
    warmup_steps: int = option(
        "Number of warm-up steps, instead of --warmup-ratio.", UNSET, min=0, defines=True, **_scheduled("warmup_steps")
    )
    weight_decay: float = option("AdamW weight decay, applied to matrices only.", 0.1, panel=RATE, min=0, defines=True)
    beta1: float = option("AdamW beta1.", 0.9, panel=RATE, min=0, max=0.9999, defines=True)
    beta2: float = option("AdamW beta2.", 0.95, panel=RATE, min=0, max=0.9999, defines=True)
    grad_clip: float = option("Maximum gradient norm; 0 means no clipping.", 1.0, panel=RATE, min=0, defines=True)
    balance: Mapping[str, float] = option(
        f"Load-balancing strategy (repeatable): {', '.join(registry.names('balance'))}.",
        UNSET, panel=MOE, shown="aux=0.01 and z-loss=0.001", kind="balance", metavar="NAME[=COEFFICIENT]",
        make=_strategies, defines=True,
    )  # fmt: skip
    balance_end: float = option(
        "Share of the run after which loss-free no longer moves the selection bias.",
        1.0, panel=MOE, min=0, max=1, defines=True,
    )  # fmt: skip
    train_only: Literal["routers", "experts", "everything"] = option(
        "Train only the routers, only the experts (routed and shared), or everything.",
        "everything", panel=MOE, defines=True,
    )  # fmt: skip
    freeze_router: bool = option("Do not train the routers.", False, panel=MOE, defines=True)
    router_lr: float = option(
        "Factor on the routers' learning rate, such as 0.1 or 10.", 1.0, panel=MOE, min=0, defines=True
    )
    router_gradient: Literal["sparse", "default", "dense"] = option(
        "Experts from which a router learns: only the chosen ones (sparse), or all, whose outputs are moving averages"
        " (default) or computed in the backward pass (dense, slower). The model's outputs stay the same.",
        "sparse", panel=MOE, defines=True,
    )  # fmt: skip
    fsdp: int = fsdp_option()
    ep: int = ep_option()
    tp: int = tp_option()
    replicas: int = option(
        "Number of copies of the sharded model, each with its own text.",
        UNSET, panel=SHARING, shown="processes / (--fsdp x --tp)", min=1,
    )  # fmt: skip
    precision: Literal["bf16", "fp32"] = option(
        "Compute precision. The optimizer works in fp32 with both.",
        UNSET, panel=RUN, shown="bf16 on a GPU, fp32 on a CPU", defines=True,
    )  # fmt: skip
    moments: Literal["fp32", "bf16", "8bit", "offload"] = option(
        "Precision of the optimizer's moments. bf16 and 8bit save memory and need torchao. offload keeps the moments"
        " and master weights of a GPU run in host memory, in fp32, which is slow.",
        "fp32", panel=RUN, defines=True,
    )  # fmt: skip
    master_weights: bool = option(
        "Keep fp32 master weights beside the bf16 ones; without them, bf16 weights are updated with stochastic"
        " rounding.",
        True, panel=RUN, defines=True,
    )  # fmt: skip
    gradient_checkpointing: bool = option(
        "Recompute layers in the backward pass: less memory, about a third slower.", False, panel=RUN
    )
    compile: bool = option(
        "Compile each layer with torch.compile: a slower first step, then faster training.",
        UNSET, panel=RUN, shown="on a GPU in bf16, without --liger",
    )  # fmt: skip
    liger: bool = option("Use the Triton kernels of liger-kernel (GPU only).", False, panel=RUN)
    experts_implementation: Literal["auto", "grouped_mm", "batched_mm", "eager", "sonicmoe", "deepgemm"] = option(
        "Function of transformers that computes the experts; auto lets transformers choose. The outputs and gradients"
        " of other choices are compared with those of eager before training.",
        "auto", panel=RUN,
    )  # fmt: skip
    deterministic: bool = option(
        "Use only deterministic kernels, so that a GPU reproduces results bit for bit.", False, panel=RUN
    )
    save_dtype: str = dtype_option("Dtype of saved weights; auto keeps MODEL's.", RUN, defines=True)
    save_every: int = option(
        "Number of steps between checkpoints.", UNSET, panel=RUN, shown="a tenth of the run", min=1
    )
    eval_every: int = option(
        "Number of steps between validations.", UNSET, panel=RUN, shown="a tenth of the run", min=1
    )
    keep_checkpoints: int = option("Number of step folders to keep.", 2, panel=RUN, min=1)
    keep_weights: int = option(
        "Also save a weights-only snapshot every N steps in OUT/weights, for averaging.",
        UNSET, panel=RUN, shown="none", min=1, metavar="N",
    )  # fmt: skip
    average_last: int = option(
        "At the end, write the mean of the last N snapshots of --keep-weights to OUT/average, and validate it.",
        UNSET, panel=RUN, shown="none", min=1, metavar="N",
    )  # fmt: skip
    keep_optimizer: bool = option(
        "Start with the optimizer state and fp32 weights of MODEL, which must be a step folder, or the result of grow"
        " or upcycle --keep-optimizer on one. The schedule starts from its beginning.",
        False, panel=RATE, defines=True,
    )  # fmt: skip
    resume: bool = option(
        "Continue from the newest step folder in OUT, or delete that run and start again.",
        True, panel=RUN, recorded=False,
    )  # fmt: skip
    log_with: Sequence[str] = option(
        f"Also log to a tracker (repeatable): {', '.join(TRACKERS)}.",
        (), panel=RUN, names=TRACKERS, what="tracker", metavar="NAME",
    )  # fmt: skip
    seed: int = option("Random seed for data order and dropout.", 0, panel=RUN, min=0, defines=True)

    @property
    def mesh(self) -> Mesh:
        """How the processes share the model."""
        return mesh_of(self)

    @property
    def keeps_copies(self) -> bool:
        """Whether bf16 weights lie beside the fp32 ones (mixed.py); FSDP gathers rounded weights instead."""
        return self.precision == "bf16" and self.mesh.whole

    @property
    def frozen_routers(self) -> str:
        """The option that keeps routers from learning; nothing where they learn."""
        if self.freeze_router:
            return "--freeze-router"
        return "--train-only experts" if self.train_only == "experts" else ""

    def check(self, typed: Collection[str]) -> None:
        """See `checks.check`."""
        checks.check(self, typed)

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
            raise ConfigError(f"--seq-len {seq_len}: the model has only {max_seq_len} positions; give at most that")
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
        base = self.shares_of or steps
        if base > steps:
            raise ConfigError(
                f"--shares-of {base}: the run has only {steps} steps; give at most that, the length with which it began"
            )
        warmup = self.warmup_steps
        if warmup is None:
            warmup = round((0.01 if self.warmup_ratio is None else self.warmup_ratio) * base)
        cooldown_end = 0.7 if self.cooldown_end is None else self.cooldown_end
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
            shares_of=base,
            weight={name: weights.in_steps(name, one, base, steps) for name, one in self.weight.items()},
            seq_len=seq_len,
            micro_batch_size=self.micro_batch_size or checks.default_micro_batch(self.global_batch_size),
            min_lr=min_lr,
            # The midpoint: 1.65e-4 between the 3e-4 and 3e-5 of the runs that this schedule is known from.
            constant_lr=(self.lr + min_lr) / 2 if self.constant_lr is None else self.constant_lr,
            # Of the whole run, as the schedule takes it: the same step.
            cooldown_end=cooldown_end if base == steps else round(cooldown_end * base) / steps,
            constant_end=0.8 if self.constant_end is None else self.constant_end,
            decay_shape=UNSET if self.decay_shape == default_shape(self.schedule) else self.decay_shape,
            warmup_steps=warmup,
            balance=dict(({} if self.frozen_routers else default_balance) if self.balance is None else self.balance),
            precision=precision,
            compile=compiled if self.compile is None else self.compile,
            save_every=self.save_every or every,
            eval_every=self.eval_every or every,
        )

    def to_json(self) -> dict[str, Any]:
        """The options as plain values, for the lineage."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("out", "resume")}
        values = {("weights" if name == "weight" else name): value for name, value in named.items()}  # as in 0.1
        return {
            k: dict(v) if isinstance(v, Mapping) else str(v) if isinstance(v, Path) else v for k, v in values.items()
        }

    def identity(self, model: str, sources: Mapping[str, Mapping[str, str]], teacher: str = "") -> dict[str, Any]:
        """The identity of a run: options of a resolved config, by name.

        How often a run saves and validates, and how many checkpoints it keeps, does not change what it
        computes; nor do the number of processes and the place of MODEL and of the data, which are
        known by their content.

        Args:
            model: fingerprint of the source checkpoint.
            sources: option (train, replay, val) -> name -> fingerprint of its tokens.
            teacher: fingerprint of its checkpoint; nothing: there is none.
        """
        declared = options(self)
        ignored = {name for name, _ in without_effect(self, declared)}
        defining = [name for name, one in declared.items() if one.defines and name not in ignored]
        return {
            "model": model,
            **({"teacher": teacher} if teacher else {}),
            **{kind: dict(named) for kind, named in sources.items()},
            "weight": {name: self.weight.get(name, 1) for name in (*self.train, *self.replay)},
            **{name.replace("_", "-"): getattr(self, name) for name in defining},
            "balance": dict(self.balance or {}),
            **({"centred": True} if "loss-free" in (self.balance or {}) else {}),
        }
