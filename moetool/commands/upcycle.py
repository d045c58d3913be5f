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
from moetool.commands.options import Output
from moetool.commands.proof import Writing, carry_out, closing
from moetool.commands.upcycle_table import describe, table, warnings
from moetool.option import option
from moetool.recipe import UpcycleRecipe
from moetool.values import parse_size


@dataclass(frozen=True)
class Models:
    """The models that are read, the folder that is written, and what must run the result."""

    dense: str = option("The dense model: a folder, or owner/name\\[@revision].", positional=True, metavar="DENSE")
    out: Path = option("The folder to write.", positional=True, metavar="OUT")
    donor: Sequence[str] = option(
        "Another dense model (repeatable): DENSE and each donor give an equal share of the experts; all other"
        " tensors are averaged (Branch-Train-MiX).",
        (), metavar="MODEL", needs=("method", ("drop", "copy", "noise").__contains__), after="noise_std",
    )  # fmt: skip
    keep_optimizer: bool = option(
        "Carry the moments of AdamW and the fp32 weights of DENSE, a step folder of moetool cpt, to the result, for"
        " cpt --keep-optimizer. They take 8 to 12 bytes per parameter of the result.",
        False, flag="--keep-optimizer", needs=("method", ("drop", "copy", "noise").__contains__), after="dtype",
    )  # fmt: skip
    for_: Sequence[str] = option(
        "A program that must run the result correctly (repeatable); --target auto then picks a family it can run.",
        (), flag="--for", names=CLIENTS, what="client", after="target",
    )  # fmt: skip


def upcycle(
    context: typer.Context, models: Models, asked: UpcycleRecipe, writing: Writing, output: Output
) -> dict[str, Any]:
    """Convert a dense model to a Mixture of Experts.

    Attention, norms and embeddings are copied. Each expert starts as the dense FFN, with a share of its
    intermediate units redrawn from the statistics of the weights they replace (Drop-Upcycling). The
    result is a standard Hugging Face checkpoint, written with bounded memory. A killed run leaves
    nothing that loads, and the same command finishes it.
    """
    from moetool.surgery.sources import open_sources
    from moetool.upcycle.plan import plan_upcycling, reader_of

    console = Console(context, output.json, output.quiet)
    started = time.perf_counter()
    names = [models.dense, *(models.donor if asked.method != "scratch" else [])]
    reader = reader_of({"training_state": models.keep_optimizer})
    sources = context.with_resource(open_sources(names, models.out, headers_only=writing.plan, reader=reader))
    recipe = asked.settled(len(names))
    max_size = parse_size(writing.max_shard_size)
    upcycling = plan_upcycling(sources.readers, recipe, max_size, models.for_, keep_optimizer=models.keep_optimizer)
    document = describe(upcycling, models.out, writing.num_workers)
    if writing.plan:
        console.result(document, table(document))
        return document
    for warning in warnings(upcycling, sources.repeated()):
        console.warn(warning)
    if upcycling.state:
        upcycling.state.reader.check_state()
    carry_out(upcycling.plan, sources, models.out, writing, started, document, context, console)
    console.result(document, table(document), closing(document))
    return document
