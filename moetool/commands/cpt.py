"""`moetool cpt`: go on with pretraining, of a dense model or a Mixture of Experts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from moetool import registry
from moetool.commands.console import Console, count, escape, size
from moetool.commands.memory_estimate import estimated
from moetool.commands.options import (
    ConfigFlag,
    Dtype,
    JsonFlag,
    QuietFlag,
    completing,
    long_dtype,
    named_paths,
    one_of,
    parse_count,
    typed,
    write_options,
)
from moetool.errors import ConfigError
from moetool.launch import is_first, num_processes

if TYPE_CHECKING:
    from moetool.train.config import TrainConfig
    from moetool.train.run_plan import RunPlan


def _balance(values: list[str] | None) -> list[str] | None:
    for value in values or []:
        one_of("balance")(value.partition("=")[0])
    return values


# accelerate's names, which are the packages' own.
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "aim", "comet_ml", "clearml", "dvclive", "swanlab")


def _trackers(values: list[str] | None) -> list[str] | None:
    for value in values or []:
        if value not in TRACKERS:
            near = registry.suggest(value, TRACKERS)
            raise typer.BadParameter(f"unknown tracker '{value}'{near}; choose from {', '.join(TRACKERS)}")
    return values


def _option(panel: str, help: str, default: str = "", **more: Any) -> Any:
    """An option of a panel of --help; `default` tells one that is no fixed value."""
    if default:
        help, more["show_default"] = f"{help}  \\[default: {default}]", False
    return typer.Option(help=help, rich_help_panel=panel, **more)


DATA, SIZE, RATE, MOE, RUN = (
    "Data (options with NAME repeat)", "Size", "Optimizer and schedule", "Mixture of Experts", "Saving and resuming",
)  # fmt: skip


def cpt(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint to start from: a folder or owner/name\\[@revision]; a step folder of another run, too.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the run.", show_default=False)],
    train: Annotated[
        list[str],
        _option(
            DATA,
            "New text (or tokens): a file, folder, glob or hf:owner/name.",
            metavar="NAME=PATH",
            show_default=False,
        ),
    ],
    replay: Annotated[
        list[str] | None, _option(DATA, "Earlier text, mixed in against forgetting.", metavar="NAME=PATH")
    ] = None,
    weight: Annotated[
        list[str] | None,
        _option(DATA, "Share of a source relative to the others of its kind; 1 where none is given.", metavar="NAME=W"),
    ] = None,
    replay_ratio: Annotated[
        float | None,
        _option(
            DATA, "Share of replay in every batch, which displaces new tokens.", "0.3 with --replay", min=0.0, max=1.0
        ),
    ] = None,
    val: Annotated[list[str] | None, _option(DATA, "Text that is only validated on.", metavar="NAME=PATH")] = None,
    val_fraction: Annotated[
        float,
        _option(DATA, "Share of documents held out of every source without a --val of its name.", min=0.0, max=1.0),
    ] = 0.01,
    text_field: Annotated[str, _option(DATA, "Field or column that holds the text.", metavar="NAME")] = "text",
    document: Annotated[
        Literal["file", "line", "paragraph"],
        _option(DATA, "What one document of a plain-text file is (elsewhere it is a row)."),
    ] = "file",
    cross_document: Annotated[
        bool,
        _option(DATA, "Let tokens attend to earlier documents of their sequence, or begin anew at each document."),
    ] = True,
    max_tokens: Annotated[
        int | None,
        _option(
            SIZE,
            "Length of the run in tokens, such as 2B or 500M (rounded down to whole steps).",
            parser=parse_count,
            metavar="COUNT",
        ),
    ] = None,
    max_steps: Annotated[int | None, _option(SIZE, "Length of the run in steps, instead.", min=1)] = None,
    seq_len: Annotated[
        int | None, _option(SIZE, "Tokens of a sequence.", "2048, or the model's positions", min=1)
    ] = None,
    global_batch_size: Annotated[int, _option(SIZE, "Sequences of a step, over all processes.", min=1)] = 32,
    micro_batch_size: Annotated[
        int | None,
        _option(SIZE, "Sequences that a process runs at once.", "the largest divisor of the batch up to 8", min=1),
    ] = None,
    schedule: Annotated[
        str,
        _option(
            RATE,
            "Learning rate over the steps.",
            metavar="|".join(registry.names("schedule")),
            callback=one_of("schedule"),
            autocompletion=completing(registry.names("schedule")),
        ),
    ] = "cosine",
    lr: Annotated[float, _option(RATE, "Peak learning rate.", min=0.0)] = 3e-4,
    min_lr: Annotated[
        float | None, _option(RATE, "Learning rate of the last step.", "a tenth of --lr", min=0.0)
    ] = None,
    constant_lr: Annotated[
        float | None,
        _option(RATE, "Learning rate of the constant phase (infinite).", "halfway between --lr and --min-lr", min=0.0),
    ] = None,
    cooldown_end: Annotated[
        float | None,
        _option(
            RATE, "Share of the run after which the cooldown ends (infinite); 0: no cooldown.", "0.7", min=0.0, max=1.0
        ),
    ] = None,
    constant_end: Annotated[
        float | None,
        _option(RATE, "Share of the run after which the constant phase ends (infinite, wsd).", "0.8", min=0.0, max=1.0),
    ] = None,
    warmup_ratio: Annotated[
        float | None, _option(RATE, "Share of the steps in which the rate rises from 0.", "0.01", min=0.0, max=1.0)
    ] = None,
    warmup_steps: Annotated[int | None, _option(RATE, "Number of those steps, instead.", min=0)] = None,
    weight_decay: Annotated[float, _option(RATE, "AdamW's, on all matrices.", min=0.0)] = 0.1,
    beta1: Annotated[float, _option(RATE, "AdamW's.", min=0.0, max=0.9999)] = 0.9,
    beta2: Annotated[float, _option(RATE, "AdamW's.", min=0.0, max=0.9999)] = 0.95,
    grad_clip: Annotated[float, _option(RATE, "Largest norm of the gradient; 0: any.", min=0.0)] = 1.0,
    keep_optimizer: Annotated[
        bool,
        _option(
            RATE, "Begin with the optimizer state and fp32 weights of MODEL, a step folder; the schedule is this run's."
        ),
    ] = False,
    balance: Annotated[
        list[str] | None,
        _option(
            MOE,
            f"What keeps the load of the experts even: {', '.join(registry.names('balance'))}; repeats.",
            "aux=0.01 and z-loss=0.001",
            metavar="NAME[=COEFFICIENT]",
            callback=_balance,
            autocompletion=completing(registry.names("balance")),
        ),
    ] = None,
    freeze_router: Annotated[bool, _option(MOE, "Train everything but the routers.")] = False,
    precision: Annotated[
        Literal["bf16", "fp32"] | None,
        _option(RUN, "Compute precision. The optimizer works in fp32 with either.", "bf16 on a GPU, fp32 on a CPU"),
    ] = None,
    moments: Annotated[
        Literal["fp32", "bf16", "8bit"],
        _option(RUN, "How the optimizer keeps its moments; bf16 and 8bit need less memory, and torchao."),
    ] = "fp32",
    master_weights: Annotated[
        bool,
        _option(RUN, "Update fp32 weights beside the bf16 ones; without them bf16 weights are rounded at random."),
    ] = True,
    gradient_checkpointing: Annotated[
        bool, _option(RUN, "Compute layers again in the backward pass: less memory, a third slower.")
    ] = False,
    compile: Annotated[
        bool | None,
        _option(
            RUN,
            "Compile each layer with torch.compile: a minute at first, then faster.",
            "on a GPU in bf16, without --liger",
        ),
    ] = None,
    liger: Annotated[bool, _option(RUN, "With liger-kernel's Triton kernels, on a GPU.")] = False,
    deterministic: Annotated[
        bool, _option(RUN, "Deterministic kernels alone, so that a GPU gives the same bits again.")
    ] = False,
    save_dtype: Annotated[Dtype, _option(RUN, "Of saved weights; auto is MODEL's.", callback=long_dtype)] = "auto",
    save_every: Annotated[int | None, _option(RUN, "Steps between checkpoints.", "a tenth of the run", min=1)] = None,
    eval_every: Annotated[int | None, _option(RUN, "Steps between validations.", "a tenth of the run", min=1)] = None,
    keep_checkpoints: Annotated[int, _option(RUN, "Step folders to keep.", min=1)] = 2,
    resume: Annotated[
        bool, _option(RUN, "Go on from the newest step folder in OUT, or delete that run and begin again.")
    ] = True,
    log_with: Annotated[
        list[str] | None,
        _option(
            RUN,
            f"Also log to a tracker: {', '.join(TRACKERS)}; repeats.",
            metavar="NAME",
            callback=_trackers,
            autocompletion=completing(TRACKERS),
        ),
    ] = None,
    seed: Annotated[int, _option(RUN, "Of the data order and of dropout.", min=0)] = 0,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    config: ConfigFlag = None,
) -> dict[str, Any]:
    """Go on with a model's pretraining, on new text with the old as replay.

    Trains dense models and Mixtures of Experts with AdamW, keeps the routers balanced, and validates
    each domain. OUT becomes a stock Hugging Face checkpoint; OUT/checkpoints holds step folders, from
    which the same command goes on after an interruption, on a CPU to the same result bit for bit.
    """
    sources = {"train": named_paths(train, "--train"), "replay": named_paths(replay or [], "--replay")}
    sets = named_paths(val or [], "--val")
    weights = _weights(weight or [], list(sources.values()))
    if (max_tokens is None) == (max_steps is None):
        raise typer.BadParameter("give the length of the run: either --max-tokens 2B or --max-steps 1000")
    if warmup_ratio is not None and warmup_steps is not None:
        raise typer.BadParameter("give --warmup-ratio or --warmup-steps, not both")

    from moetool.train.config import TrainConfig, check_batches, default_micro_batch
    from moetool.train.schedules import parameters

    taken = parameters(schedule)
    for name in ("min_lr", "constant_lr", "cooldown_end", "constant_end", "warmup_ratio", "warmup_steps"):
        if typed(context, name) and name.replace("ratio", "steps") not in taken:
            raise typer.BadParameter(f"--{name.replace('_', '-')} has no effect with --schedule {schedule}")
    held_out = [name for named in sources.values() for name in named if name not in sets]
    if typed(context, "val_fraction") and val_fraction and not held_out:
        raise typer.BadParameter("--val-fraction has no effect: every source has a --val of its name")
    if typed(context, "eval_every") and not (sets or (val_fraction and held_out)):
        raise typer.BadParameter(
            "--eval-every has no effect: there is no --val, and nothing is held out of the sources"
        )
    if typed(context, "min_lr") and constant_end == 1 and "constant_end" in taken:
        raise typer.BadParameter("--min-lr has no effect with --constant-end 1: nothing anneals to it")
    if not 0 < lr < float("inf"):
        raise typer.BadParameter(f"--lr {lr:g}: a number above 0 is needed")
    if min_lr is not None and min_lr > lr:
        raise typer.BadParameter(f"--min-lr {min_lr:g} is above --lr {lr:g}; it is where the learning rate ends")
    try:
        micro = micro_batch_size or default_micro_batch(global_batch_size)
        check_batches(global_batch_size, micro, num_processes())
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None

    from moetool.checkpoint.hub import resolve_model
    from moetool.train.balance import check_frozen, parse

    try:
        strategies = parse(balance) if balance else None
        check_frozen(strategies or {}, freeze_router)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    console = Console(context, json and is_first(), quiet or not is_first())
    asked: dict[str, Any] = {  # None is TrainConfig's UNSET
        "model": resolve_model(model),
        "out": out,
        "train": sources["train"],
        "replay": sources["replay"],
        "weights": weights,
        "replay_ratio": replay_ratio,
        "val": sets,
        "val_fraction": val_fraction,
        "text_field": text_field,
        "document": document,
        "cross_document": cross_document,
        "max_steps": max_steps,
        "max_tokens": max_tokens,
        "seq_len": seq_len,
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
        "schedule": schedule,
        "lr": lr,
        "min_lr": min_lr,
        "constant_lr": constant_lr,
        "cooldown_end": cooldown_end,
        "constant_end": constant_end,
        "warmup_ratio": warmup_ratio,
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
        "beta1": beta1,
        "beta2": beta2,
        "grad_clip": grad_clip,
        "balance": strategies,
        "freeze_router": freeze_router,
        "precision": precision,
        "gradient_checkpointing": gradient_checkpointing,
        "moments": moments,
        "master_weights": master_weights,
        "compile": compile,
        "liger": liger,
        "deterministic": deterministic,
        "save_dtype": save_dtype,
        "save_every": save_every,
        "eval_every": eval_every,
        "keep_checkpoints": keep_checkpoints,
        "keep_optimizer": keep_optimizer,
        "resume": resume,
        "log_with": log_with or [],
        "seed": seed,
    }
    return _run(context, console, TrainConfig(**asked))


def _run(context: typer.Context, console: Console, config: TrainConfig) -> dict[str, Any]:
    """Train what is left to train; print what came of it."""
    from moetool.train.open import open_run

    with ExitStack() as stack:
        with console.progress() as progress:
            opened = stack.enter_context(open_run(config, progress))
        summary = opened.summary if opened.plan is None else _train(context, console, opened.plan)
    document = {"out": str(config.out), "already_finished": opened.plan is None, **summary}
    if opened.plan:
        document |= {name: opened.plan.values[name] for name in ("memory", "saving_memory")}
    if is_first():
        console.result(document, *_result_text(document))
    return document


def _train(context: typer.Context, console: Console, plan: RunPlan) -> dict[str, Any]:
    """Tell the plan before the weights are loaded, then train; returns the summary."""
    from moetool.train.build import build_run
    from moetool.train.state import saved_steps

    out = plan.config.out
    console.say(_plan_text(plan.values))
    for warning in plan.warnings:
        console.warn(warning)
    with estimated(_memory_text(plan.values)):
        with console.progress() as progress:
            progress("load the model", 0, 1)
            run = build_run(plan)
        for warning in run.warnings:
            console.warn(warning)
        run.claim()
        if is_first():
            write_options(context, out)
        try:
            with console.progress() as progress:
                return run.train(progress)
        except (KeyboardInterrupt, SystemExit):
            saved = saved_steps(out)
            where = f"the checkpoint of step {saved[-1]}" if saved else "the beginning: no checkpoint is saved yet"
            console.warn(f"stopped after step {run.step}; the same command goes on from {where}")
            raise


def _weights(values: list[str], kinds: list[dict[str, str]]) -> dict[str, float]:
    weights, sources = {}, [name for named in kinds for name in named]
    for name, text in named_paths(values, "--weight").items():
        if name not in sources:
            raise typer.BadParameter(
                f"--weight {name}: no --train or --replay has that name{registry.suggest(name, sources)}"
            )
        try:
            weights[name] = float(text)
        except ValueError:
            weights[name] = -1.0
        if not 0 < weights[name] < float("inf"):
            raise typer.BadParameter(f"--weight {name}={text}: a number above 0 is needed")
        if any(list(named) == [name] for named in kinds):
            raise typer.BadParameter(f"--weight {name} has no effect: there is no other source of its kind")
    return weights


def _plan_text(plan: Mapping[str, Any]) -> str:
    active = plan["num_active_parameters"]
    sparse = f" ({count(active)} active)" if active != plan["num_parameters"] else ""
    balance = ", ".join(f"{name} {value:g}" if value else name for name, value in plan["balance"].items())
    start = f" from step {plan['step']}" if plan["step"] else ""
    lines = [
        f"[bold]{count(plan['num_parameters'])}[/bold] parameters{sparse} on {escape(plan['device'])}"
        f"{' x ' + str(plan['num_processes']) if plan['num_processes'] > 1 else ''} in {plan['precision']}"
        f"{', balance ' + escape(balance) if balance else ''};"
        f" {plan['steps']} steps{start} x {plan['global_batch_size']} sequences x {plan['seq_len']} tokens"
        f" = {count(plan['tokens'])} tokens"
    ]
    for name, source in plan["sources"].items():
        lines.append(
            f"  {'replay' if source['replay'] else 'train '} {escape(name)}: {count(source['tokens'])} tokens,"
            f" {source['epochs']:.2g} epochs of {count(source['available_tokens'])}"
        )
    lines += [f"  val    {escape(name)}: {count(tokens)} tokens" for name, tokens in plan["val"].items()]
    return "\n".join([*lines, f"  {_memory_text(plan)}"])


def _memory_text(plan: Mapping[str, Any]) -> str:
    need = plan["memory"]
    parts = ", ".join(f"{name} {size(need[name])}" for name in ("weights", "gradients", "optimizer", "activations"))
    each = " in each process" if plan["num_processes"] > 1 else ""
    return f"memory about {size(need['total'])}{each}: {parts}; to save, {size(plan['saving_memory'])} of the machine's"


def _result_text(summary: dict[str, Any]) -> list[Any]:
    parts: list[Any] = []
    if summary["val"]:
        table = Table("domain", title="validation loss", title_justify="left")
        routed = summary.get("mri", {})
        for name in ("before", "after", "change", *(["mri before", "mri after"] if routed else [])):
            table.add_column(name, justify="right")
        table.add_column("")
        for name, value in summary["val"].items():
            before, after = value["before"], value["after"]
            cells = [f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"]
            if routed:
                cells += [f"{max(routed[name][when]):.2f}" for when in ("before", "after")]
            table.add_row(escape(name), *cells, "adaptation" if name in summary["adaptation"] else "forgetting")
        parts.append(table)
    table = Table("source", title="text that was trained on", title_justify="left")
    for name in ("tokens", "epochs"):
        table.add_column(name, justify="right")
    for name, entry in summary["ledger"].items():
        table.add_row(escape(name), count(entry["tokens"]), f"{entry['epochs']:.2g}")
    parts.append(table)
    done = "finished before, with the same options: " if summary["already_finished"] else ""
    # Unknown where metrics.jsonl was deleted before the last step folder became the result.
    speed = f", {count(summary['tokens_per_second'])} tokens/s" if summary["tokens_per_second"] else ""
    parts.append(
        f"{done}{summary['steps']} steps, {count(summary['tokens'])} tokens{speed};"
        f" the checkpoint is {escape(summary['out'])}"
    )
    return parts
