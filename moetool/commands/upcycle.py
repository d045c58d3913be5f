"""`moetool upcycle`: dense to Mixture of Experts."""

from __future__ import annotations

import time
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moetool import registry
from moetool.arch.clients import CLIENTS
from moetool.commands.console import Console
from moetool.commands.options import (
    ConfigFlag,
    Dtype,
    JsonFlag,
    QuietFlag,
    completing,
    long_dtype,
    num_cores,
    one_of,
    parse_size,
    typed,
)
from moetool.commands.proof import carry_out, closing
from moetool.commands.upcycle_table import describe, table, warnings

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
        int | None, typer.Option(min=1, help="Processes.  \\[default: one a core]", show_default=False)
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

    from moetool.checkpoint.reader import FLOAT_DTYPES
    from moetool.recipe import UpcycleRecipe
    from moetool.surgery.sources import open_sources
    from moetool.upcycle.plan import plan_upcycling

    console = Console(context, json, quiet)
    started = time.perf_counter()
    names = [dense, *(donor or [] if method != "scratch" else [])]
    sources = context.with_resource(open_sources(names, out, headers_only=plan))
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
    upcycling = plan_upcycling(sources.readers, recipe, max_bytes, for_ or ())
    document = describe(upcycling, out, workers)
    if plan:
        console.result(document, table(document))
        return document
    for warning in warnings(upcycling, sources.repeated()):
        console.warn(warning)
    carry_out(upcycling.plan, sources, out, workers, verify, overwrite, started, document, context, console)
    console.result(document, table(document), closing(document))
    return document
