"""`moetool upcycle`: dense to Mixture of Experts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from moetool.arch.clients import CLIENTS
from moetool.commands.console import Console
from moetool.commands.memory_estimate import estimated, tell_unwritten
from moetool.commands.options import Output
from moetool.commands.proof import Writing, carry_out, closing
from moetool.commands.upcycle_table import describe, table, warnings
from moetool.option import option
from moetool.recipe import UpcycleRecipe
from moetool.upcycle.texts import TextOptions, check_texts
from moetool.values import parse_size


@dataclass(frozen=True)
class Models:
    """The models to read, the folder to write, and the programs that must run the result."""

    dense: str = option("The dense model: a folder, or owner/name\\[@revision].", positional=True, metavar="DENSE")
    out: Path = option("The folder to write.", positional=True, metavar="OUT")
    donor: Sequence[str] = option(
        "Another dense model (repeatable). DENSE and each donor provide an equal share of the experts; all other"
        " tensors are averaged (Branch-Train-MiX). MODEL=WEIGHT sets the donor's share of that mean.",
        (), metavar="MODEL|MODEL=0..1", needs=("method", ("drop", "copy", "noise").__contains__), after="noise_std",
    )  # fmt: skip
    keep_optimizer: bool = option(
        "Carry AdamW's moments and the fp32 weights over to the result, for cpt --keep-optimizer. DENSE must be a"
        " step folder of moetool cpt. They take 8 to 12 bytes per parameter of the result.",
        False, flag="--keep-optimizer", needs=("method", ("drop", "copy", "noise").__contains__), after="dtype",
    )  # fmt: skip
    for_: Sequence[str] = option(
        "Program that must run the result correctly (repeatable); --target auto then picks a family it can run.",
        (), flag="--for", names=CLIENTS, what="client", after="target",
    )  # fmt: skip


def upcycle(
    context: typer.Context,
    models: Models,
    options: UpcycleRecipe,
    texts: TextOptions,
    writing: Writing,
    output: Output,
) -> dict[str, Any]:
    """Convert a dense model to a Mixture of Experts.

    Attention, norms and embeddings are copied. Each expert starts as the dense FFN, with a share of its
    intermediate units redrawn from the statistics of the weights they replace (Drop-Upcycling). The
    result is a standard Hugging Face checkpoint, written with bounded memory. A killed run leaves
    nothing that loads, and the same command finishes it.
    """
    from moetool.checkpoint.writer import check_out
    from moetool.surgery.sources import open_sources
    from moetool.upcycle.donors import read_donors
    from moetool.upcycle.plan import plan_upcycling, reader_of

    console = Console(context, output.json, output.quiet)
    started = time.perf_counter()
    donors, weights = read_donors(models.donor if options.method != "scratch" else [])
    names = [models.dense, *donors]
    recipe, max_size = options.settled(len(names), weights), parse_size(writing.max_shard_size)
    check_texts(recipe, texts)
    reads = bool(texts.calibrate)
    reader = reader_of({"training_state": models.keep_optimizer})
    sources = context.with_resource(open_sources(names, models.out, writing.plan and not reads, reader=reader))
    upcycling = plan_upcycling(sources.readers, recipe, max_size, models.for_, keep_optimizer=models.keep_optimizer)
    if reads:
        from moetool.surgery.lineage import recorded
        from moetool.upcycle.measure import measure

        if not writing.plan and not writing.overwrite:
            check_out(models.out, "upcycle")
        estimate = tell_unwritten(console, upcycling.plan, texts)
        with console.progress() as progress, estimated(estimate):
            upcycling = measure(upcycling, sources.readers, texts, models.for_, progress, recorded(models.out))
    document = describe(upcycling, models.out, writing.num_workers)
    for warning in warnings(upcycling, sources.repeated()):
        console.warn(warning)
    if writing.plan:
        console.result(document, table(document))
        return document
    if upcycling.state:
        upcycling.state.reader.check_state()
    carry_out(upcycling.plan, sources, models.out, writing, started, document, context, console)
    console.result(document, table(document), closing(document))
    return document
