"""`moetool verify`: repeat, on a finished folder, the checks of the command that wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from moetool.commands.console import Console, escape
from moetool.commands.options import Output, num_cores
from moetool.commands.proof import proof_line
from moetool.option import (
    device_option,
    document_option,
    option,
    text_field_option,
    unpickle_option,
    workers_option,
)
from moetool.values import named

if TYPE_CHECKING:
    from moetool.checkpoint.reader import CheckpointReader
    from moetool.progress import Progress
    from moetool.surgery.plan import Operation


@dataclass(frozen=True)
class VerifyOptions:
    """The options of `moetool verify`."""

    path: Path = option(
        "A folder written by moetool upcycle, convert, average, grow, prune or densify.",
        positional=True,
        metavar="PATH",
    )
    source: str | None = option(
        "The model that the folder was made from.", None, shown="the path in moetool.json", metavar="MODEL"
    )
    donor: Sequence[str] = option(
        "The other sources (donors, an adapter, checkpoints), in the order of moetool.json.",
        (),
        shown="the paths in moetool.json",
        metavar="MODEL",
    )
    level: Literal["quick", "full"] = option(
        "Check a sample of each tensor, or every entry and the digest of every file.", "full"
    )
    unpickle: bool = unpickle_option()
    workers: int | None = workers_option()
    calibrate: Mapping[str, str] = option(
        "Text that the routers of an upcycled model were fitted on (repeatable): fit them again and compare the loads.",
        dict, panel="Calibration", metavar="NAME=PATH", make=named,
    )  # fmt: skip
    text_field: str = text_field_option("Calibration")
    document: Literal["file", "line", "paragraph"] = document_option("Calibration")
    device: str = device_option("Calibration")


def verify(context: typer.Context, options: VerifyOptions, output: Output) -> dict[str, Any]:
    """Verify a folder written by upcycle, convert, average, grow, prune or densify against its sources.

    Checks that kept weights equal the source bit for bit, that redrawn units differ from it and have the
    statistics of the weights they replaced, and that no file was changed, removed or added. (Hidden
    files, README.md and folders other than those of chat templates may be added.)
    """
    from moetool import registry
    from moetool.checkpoint.hub import resolve_model
    from moetool.errors import CheckpointError, MoetoolError
    from moetool.lineage import recorded_sources
    from moetool.surgery.lineage import provable_entry
    from moetool.surgery.sources import open_readers
    from moetool.surgery.verify import check_sources
    from moetool.surgery.verify import verify as prove

    console = Console(context, output.json, output.quiet)
    folder = resolve_model(str(options.path))
    entry = provable_entry(folder)
    operation, recorded = registry.load("operation", entry["command"]), recorded_sources(entry)
    if operation.one_source and len(recorded) != 1:
        raise CheckpointError(f"{folder}: moetool.json names {len(recorded)} sources of a command that has one")
    names = [one["name"] for one in recorded]
    if options.donor and len(options.donor) != len(names) - 1:
        raise typer.BadParameter(
            f"--donor is given {len(options.donor)} times, but {folder} was made from {len(names) - 1} other donors"
        )
    names = [options.source or names[0], *(options.donor or names[1:])]
    try:
        folders = [resolve_model(name, unpickle=options.unpickle) for name in names]
    except MoetoolError as error:
        raise CheckpointError(f"{error} (or give the current sources with --source and --donor)") from None
    with ExitStack() as stack:
        has_adapter = entry.get("recipe", {}).get("adapter") is True and len(folders) > 1
        opened = open_readers(folders, options.unpickle, has_adapter, operation.reader(entry))
        readers = [stack.enter_context(reader) for reader in opened]
        progress = stack.enter_context(console.progress())
        if options.level == "full":
            hashes = [one.get("sha256") for one in recorded]
            check_sources(readers, hashes, operation.done, options.workers or num_cores(), progress)
        plan = operation.replan(readers, entry, entry["max_shard_size"])
        proof = prove(plan, readers, folder, options.level, options.workers or num_cores(), progress).to_json()
        if options.calibrate:
            proof |= _measure_again(operation, readers, entry, options, progress)
    document = {"path": str(folder), "source": str(folders[0]), "proof": proof}
    console.result(document, proof_line(proof), escape(str(folder)))
    return document


def _measure_again(
    operation: Operation,
    readers: Sequence[CheckpointReader],
    entry: Mapping[str, Any],
    options: VerifyOptions,
    progress: Progress,
) -> dict[str, Any]:
    from moetool.errors import ConfigError
    from moetool.upcycle.texts import TextOptions

    if operation.measure_again is None:
        raise ConfigError(f"--calibrate has no effect with a folder written by moetool {entry['command']}")
    run = TextOptions(options.calibrate, options.text_field, options.document, device=options.device)
    return operation.measure_again(readers, entry, run, progress)
