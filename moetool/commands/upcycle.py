"""`moetool upcycle`: dense to Mixture of Experts."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import typer

from moetool.arch.clients import CLIENTS
from moetool.commands.console import Console, size
from moetool.commands.options import Output, num_cores, options_text
from moetool.commands.upcycle_table import closing, describe, table, warnings
from moetool.option import option, workers_option
from moetool.recipe import UpcycleRecipe
from moetool.values import parse_size

if TYPE_CHECKING:
    from moetool.checkpoint.reader import CheckpointReader
    from moetool.upcycle.plan import Plan


@dataclass(frozen=True)
class Sources:
    """The models that are read, the folder that is written, and what must run the result."""

    dense: str = option("The dense model: a folder, or owner/name\\[@revision].", positional=True, metavar="DENSE")
    out: Path = option("The folder to write.", positional=True, metavar="OUT")
    donor: Sequence[str] = option(
        "Another dense model (repeatable): DENSE and each donor give an equal share of the experts; all other"
        " tensors are averaged (Branch-Train-MiX).",
        (), metavar="MODEL", needs=("method", ("drop", "copy", "noise").__contains__), after="noise_std",
    )  # fmt: skip
    for_: Sequence[str] = option(
        "A program that must run the result correctly (repeatable); --target auto then picks a family it can run.",
        (), flag="--for", names=CLIENTS, what="client", after="target",
    )  # fmt: skip


@dataclass(frozen=True)
class Writing:
    """How a checkpoint is written."""

    max_shard_size: str = option("Largest shard, such as 5GB.", "5GB", metavar="SIZE")
    workers: int | None = workers_option()
    plan: bool = option("Print what would be written, then stop.", False, flag="--plan", recorded=False)
    verify: Literal["quick", "full", "none"] = option(
        "Verify the result: headers and a sample of each tensor, every entry, or nothing.", "quick"
    )
    overwrite: bool = option("Replace an existing checkpoint in OUT.", False, flag="--overwrite", recorded=False)

    def check(self, typed: Collection[str]) -> None:
        """Raise ConfigError if the size of a file cannot be read."""
        parse_size(self.max_shard_size)


def upcycle(
    context: typer.Context, sources: Sources, asked: UpcycleRecipe, writing: Writing, output: Output
) -> dict[str, Any]:
    """Convert a dense model to a Mixture of Experts.

    Attention, norms and embeddings are copied. Each expert starts as the dense FFN, with a share of its
    intermediate units redrawn from the statistics of the weights they replace (Drop-Upcycling). The
    result is a standard Hugging Face checkpoint, written with bounded memory. A killed run leaves
    nothing that loads, and the same command finishes it.
    """
    from moetool.checkpoint.folder import FolderLock
    from moetool.checkpoint.hub import fetch_headers, resolve_model
    from moetool.checkpoint.reader import CheckpointReader
    from moetool.checkpoint.writer import prepare
    from moetool.errors import CheckpointError
    from moetool.upcycle.plan import build_plan, free_disk

    out = sources.out
    console = Console(context, output.json, output.quiet)
    started = time.perf_counter()
    names = [sources.dense, *(sources.donor if asked.method != "scratch" else [])]
    stack = context.with_resource(ExitStack())
    if writing.plan:  # of a hub model the headers are enough
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
    recipe = asked.settled(len(names))
    workers = writing.workers or num_cores()
    readers = [stack.enter_context(CheckpointReader(folder)) for folder in folders]
    planned = build_plan(readers, recipe, parse_size(writing.max_shard_size), sources.for_)
    document = describe(planned, out, workers)
    if writing.plan:
        console.result(document, table(document))
        return document
    for name, folder in zip(names[1:], folders[1:], strict=True):
        if os.path.realpath(folder) == os.path.realpath(folders[0]):
            console.warn(f"--donor {name} is DENSE itself, so its experts start like DENSE's own")
    for warning in warnings(planned):
        console.warn(warning)
    with FolderLock(out):
        if not writing.overwrite and _is_finished(planned, readers, out):
            document["already_finished"] = True
        else:
            prepare(out, planned.identity(), writing.overwrite)
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
    if writing.verify != "none":
        from moetool.upcycle.verify import verify as prove

        with console.progress() as progress:
            try:
                document["proof"] = prove(planned, readers, out, writing.verify, workers, progress).to_json()
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
