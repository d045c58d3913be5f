"""`moetool upcycle`: dense to Mixture of Experts."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from decimal import Decimal, InvalidOperation
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moetool import registry
from moetool.arch.clients import CLIENTS
from moetool.commands.console import Console, size
from moetool.commands.options import (
    ConfigFlag,
    Dtype,
    JsonFlag,
    QuietFlag,
    completing,
    long_dtype,
    num_cores,
    one_of,
    options_text,
    parse_size,
    typed,
)
from moetool.commands.upcycle_table import closing, describe, table, warnings

if TYPE_CHECKING:
    from moetool.checkpoint.reader import CheckpointReader
    from moetool.upcycle.plan import Plan


MAX_EXPONENT = 1000  # the digits of a number beyond it, written out, could fill the memory


def decimal(text: str) -> Decimal:
    """A number exactly as typed."""
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise typer.BadParameter(f"'{text}' is no number") from None
    if not value.is_finite() or value < 0:
        raise typer.BadParameter(f"{text} is no number of 0 or more")
    if value and abs(value.adjusted()) > MAX_EXPONENT:
        raise typer.BadParameter(
            f"{text} is out of range: give a number between 1e-{MAX_EXPONENT} and 1e{MAX_EXPONENT}"
        )
    return Decimal(f"{value.normalize():f}")  # 0.50 is the recipe of 0.5


def ratio(text: str) -> Decimal:
    """A share between 0 and 1, exactly as typed."""
    value = decimal(text)
    if value > 1:
        raise typer.BadParameter(f"{text} is not between 0 and 1")
    return value


# Options that only some methods read.
READ_BY = {
    "drop_ratio": ("drop",),
    "drop_index": ("drop", "noise"),
    "noise_ratio": ("noise",),
    "noise_scale": ("noise",),
    "noise_std": ("noise",),
    "donor": ("drop", "copy", "noise"),
    "router": ("drop", "copy", "noise"),
    "router_std": ("drop", "copy", "noise"),
}


def _choices(kind: str, *more: str) -> str:
    return "|".join([*more, *registry.names(kind)])


def _target(value: str) -> str:
    return value if value == "auto" else one_of("target")(value)


def _clients(values: list[str] | None) -> list[str] | None:
    for value in values or ():
        if value not in CLIENTS:
            near = registry.suggest(value, CLIENTS)
            raise typer.BadParameter(f"unknown client '{value}'{near}; choose from {', '.join(CLIENTS)}")
    return values


def upcycle(
    context: typer.Context,
    dense: Annotated[
        str,
        typer.Argument(
            metavar="DENSE", help="The dense model: a folder, or owner/name\\[@revision].", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    num_experts: Annotated[int, typer.Option(min=2, help="Routed experts.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="Experts a token goes to.")] = 2,
    method: Annotated[
        str,
        typer.Option(
            metavar=_choices("method"),
            callback=one_of("method"),
            autocompletion=completing(registry.names("method")),
            help="How experts come from the dense FFN: part of the units redrawn, plain copies, noise added to a part,"
            " or all drawn anew.",
        ),
    ] = "drop",
    drop_ratio: Annotated[
        Decimal,
        typer.Option(parser=ratio, metavar="0..1", help="Share of the intermediate units redrawn in each expert."),
    ] = Decimal("0.5"),
    drop_index: Annotated[
        Literal["shared", "per-matrix"],
        typer.Option(help="One index set for gate, up and down (the paper), or one each, units permuted (its script)."),
    ] = "shared",
    noise_ratio: Annotated[
        Decimal,
        typer.Option(parser=ratio, metavar="0..1", help="With noise: share of the units that it is added to."),
    ] = Decimal("0.5"),
    noise_scale: Annotated[
        Decimal,
        typer.Option(parser=decimal, metavar="SCALE", help="With noise: its std, relative to each matrix's own."),
    ] = Decimal(1),
    noise_std: Annotated[
        Decimal | None,
        typer.Option(parser=decimal, metavar="STD", help="With noise: its std in absolute terms.", show_default=False),
    ] = None,
    donor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Another dense model for the next share of the experts, DENSE being the first; all other tensors are"
            " averaged (Branch-Train-MiX). Repeatable.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            metavar=_choices("target", "auto"),
            callback=_target,
            autocompletion=completing(["auto", *registry.names("target")]),
            help="The MoE family to write.",
        ),
    ] = "auto",
    for_: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            metavar="|".join(CLIENTS),
            callback=_clients,
            autocompletion=completing([*CLIENTS]),
            help="A program that must compute the result exactly; auto picks such a family. Repeatable.",
            show_default=False,
        ),
    ] = None,
    granularity: Annotated[
        int, typer.Option(min=1, metavar="G", help="Split each dense FFN into G parts; an expert is one.")
    ] = 1,
    shared_experts: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="S", help="Experts every token goes to.  \\[default: the family's]", show_default=False
        ),
    ] = None,
    moe_layers: Annotated[
        str, typer.Option(metavar="all|4-|0-3,8|every:2", help="Layers that get experts; the others stay dense.")
    ] = "all",
    router: Annotated[
        str,
        typer.Option(
            metavar=_choices("router"),
            callback=one_of("router"),
            autocompletion=completing(registry.names("router")),
            help="How the router's rows are drawn.",
        ),
    ] = "normal",
    router_std: Annotated[
        Decimal, typer.Option(parser=decimal, metavar="STD", help="Standard deviation of the router's rows.")
    ] = Decimal("0.02"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    dtype: Annotated[
        Dtype,
        typer.Option(help="Of the written tensors; auto keeps the source's.", callback=long_dtype),
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file, such as 5GB.")] = "5GB",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads.  \\[default: one a core]", show_default=False)
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be written and stop.")] = False,
    verify: Annotated[
        Literal["quick", "full", "none"],
        typer.Option(help="Prove the result: headers and a sample of each tensor, every entry, or nothing."),
    ] = "quick",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in OUT.")] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    config: ConfigFlag = None,
) -> dict[str, Any]:
    """Make a Mixture of Experts of a dense model.

    Attention, norms and embeddings are carried over. Every expert starts as the dense FFN, with a
    share of its intermediate units redrawn from the statistics of the weights that they replace
    (Drop-Upcycling). The result is a stock Hugging Face checkpoint, written in bounded memory. A
    killed run cannot be loaded, and the same command finishes it.
    """
    for name, methods in READ_BY.items():
        # Not `given`: moetool.yaml holds every option, and `--config FILE --method copy` overrides one of them.
        if method not in methods and typed(context, name):
            raise typer.BadParameter(f"--{name.replace('_', '-')} has no effect with --method {method}")
    if typed(context, "noise_scale") and noise_std is not None:
        raise typer.BadParameter("--noise-scale and --noise-std exclude each other")
    if top_k > num_experts:
        raise typer.BadParameter(f"--top-k {top_k} is more than --num-experts {num_experts}")
    max_bytes = parse_size(max_shard_size)

    from moetool.checkpoint.folder import FolderLock
    from moetool.checkpoint.hub import fetch_headers, resolve_model
    from moetool.checkpoint.reader import CheckpointReader
    from moetool.checkpoint.writer import prepare
    from moetool.errors import CheckpointError
    from moetool.recipe import UpcycleRecipe
    from moetool.upcycle.check import FLOAT_DTYPES
    from moetool.upcycle.plan import build_plan, free_disk

    console = Console(context, json, quiet)
    started = time.perf_counter()
    names = [dense, *(donor or [] if method != "scratch" else [])]
    stack = context.with_resource(ExitStack())
    if plan:  # of a hub model the headers are enough
        headers = Path(stack.enter_context(TemporaryDirectory()))
        folders = [fetch_headers(name, headers) for name in names]
    else:
        folders = [resolve_model(name) for name in names]
    real = Path(os.path.realpath(out))  # a loop of links is no error here
    for folder in folders:
        real_source = Path(os.path.realpath(folder))
        if real_source in (real, *real.parents):
            raise CheckpointError(
                f"{out} is the source or inside it; a source is never modified: choose another folder"
            )
    noise, drawn = method == "noise", method != "scratch"
    recipe = UpcycleRecipe(
        target=target,
        num_experts=num_experts,
        top_k=top_k,
        method=method,
        drop_ratio=drop_ratio if method == "drop" else Decimal(0),
        drop_index=drop_index if method in READ_BY["drop_index"] else "shared",
        noise_ratio=noise_ratio if noise else Decimal(0),
        noise_scale=noise_scale if noise and noise_std is None else Decimal(0),
        noise_std=noise_std if noise else None,
        num_donors=len(names),
        granularity=granularity,
        shared_experts=shared_experts,
        moe_layers=moe_layers,
        router=router if drawn else "normal",
        router_std=router_std if drawn else Decimal(0),
        seed=seed,
        dtype={long: short for short, long in FLOAT_DTYPES.items()}.get(dtype, "auto"),
    )
    workers = workers or num_cores()
    readers = [stack.enter_context(CheckpointReader(folder)) for folder in folders]
    planned = build_plan(readers, recipe, max_bytes, for_ or ())
    document = describe(planned, out, workers)
    if plan:
        console.result(document, table(document))
        return document
    for name, folder in zip(names[1:], folders[1:], strict=True):
        if os.path.realpath(folder) == os.path.realpath(folders[0]):
            console.warn(f"--donor {name} is DENSE itself, so its experts start like DENSE's own")
    for warning in warnings(planned):
        console.warn(warning)
    with FolderLock(out):
        if not overwrite and _is_finished(planned, readers, out):
            document["already_finished"] = True
        else:
            prepare(out, planned.identity(), overwrite)
            need, free = planned.num_bytes, free_disk(out) + _written(out)
            if need > free:
                raise CheckpointError(
                    f"{out}: {size(need)} to write, {size(free)} free; free some space or choose another disk"
                )
            from moetool.upcycle.run import run_plan

            with console.progress() as progress:
                files = {"moetool.yaml": options_text(context).encode()}
                places = [
                    str(Path(name).expanduser().absolute()) if at == Path(name).expanduser() else name
                    for name, at in zip(names, folders, strict=True)
                ]
                run_plan(planned, readers, out, places, workers, files, progress)
    document["seconds"] = round(time.perf_counter() - started, 2)
    if verify != "none":
        from moetool.upcycle.verify import verify as prove

        with console.progress() as progress:
            try:
                document["proof"] = prove(planned, readers, out, verify, workers, progress).to_json()
            except CheckpointError as error:
                raise CheckpointError(f"{out} does not prove: {error}; --overwrite writes it again") from None
    console.result(document, table(document), closing(document))
    return document


def _is_finished(plan: Plan, readers: Sequence[CheckpointReader], out: Path) -> bool:
    """Whether OUT is finished, with the same recipe, source and files (the proof then compares the weights)."""
    from moetool.checkpoint.folder import PARTIAL
    from moetool.checkpoint.reader import sha256_file
    from moetool.recipe import read_lineage, recorded_sources

    if not (out / "config.json").is_file() or (out / PARTIAL).exists():
        return False
    document = read_lineage(out) or {}
    lineage = document.get("lineage", [])
    if len(lineage) != 1 or lineage[0].get("recipe") != plan.recipe.to_json():
        return False
    shards = document.get("shards")
    if not isinstance(shards, dict) or set(shards) != {shard.name for shard in plan.shards}:
        return False
    recorded = [source.get("sha256") for source in recorded_sources(lineage[0])]
    return recorded == [{shard: sha256_file(reader.folder / shard) for shard in reader.shards} for reader in readers]


def _written(out: Path) -> int:
    return sum(path.stat().st_size for path in out.glob("model*.safetensors*"))
