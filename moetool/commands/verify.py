"""`moetool verify`: the proof of an upcycling again, for a finished folder."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moetool.commands.console import Console, escape
from moetool.commands.options import ConfigFlag, JsonFlag, QuietFlag, num_cores
from moetool.commands.proof import proof_line


def verify(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder that moetool upcycle has written.")],
    source: Annotated[
        str | None, typer.Option(help="The dense model.  \\[default: where moetool.json says it was]", metavar="DENSE")
    ] = None,
    donor: Annotated[
        list[str] | None,
        typer.Option(
            help="The other donors, in their order.  \\[default: where moetool.json says they were]",
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    level: Annotated[
        Literal["quick", "full"], typer.Option(help="A sample of each tensor, or every entry and every file's digest.")
    ] = "full",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes.  \\[default: one a core]", show_default=False)
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    config: ConfigFlag = None,
) -> dict[str, Any]:
    """Prove a finished upcycling against the dense model that it came from.

    Kept entries equal the source bit for bit, redrawn units differ from it and have the statistics
    of what they replaced, and no file has changed, is missing, or was added since it was written
    (hidden files, README.md and folders other than those of chat templates may be added).
    """
    from moetool import registry
    from moetool.checkpoint.hub import resolve_model
    from moetool.checkpoint.reader import CheckpointReader
    from moetool.errors import CheckpointError, MoetoolError
    from moetool.recipe import recorded_sources
    from moetool.surgery.lineage import provable_entry
    from moetool.surgery.verify import check_sources
    from moetool.surgery.verify import verify as prove

    console = Console(context, json, quiet)
    folder = resolve_model(str(path))
    entry = provable_entry(folder)
    operation, recorded = registry.load("operation", entry["command"]), recorded_sources(entry)
    names = [one["name"] for one in recorded]
    if donor and len(donor) != len(names) - 1:
        raise typer.BadParameter(f"--donor is given {len(donor)} times, {folder} has {len(names) - 1} other donors")
    names = [source or names[0], *(donor or names[1:])]
    try:
        folders = [resolve_model(name) for name in names]
    except MoetoolError as error:
        raise CheckpointError(f"{error} (or say with --source and --donor where the sources are now)") from None
    with ExitStack() as stack:
        readers = [stack.enter_context(CheckpointReader(dense)) for dense in folders]
        progress = stack.enter_context(console.progress())
        if level == "full":
            hashes = [one.get("sha256") for one in recorded]
            check_sources(readers, hashes, operation.done, workers or num_cores(), progress)
        plan = operation.replan(readers, entry, entry["max_shard_size"])
        proof = prove(plan, readers, folder, level, workers or num_cores(), progress).to_json()
    document = {"path": str(folder), "source": str(folders[0]), "proof": proof}
    console.result(document, proof_line(proof), escape(str(folder)))
    return document
