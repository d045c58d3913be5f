"""From a plan to a verified folder, for every command that rewrites checkpoints, and the result in words."""

from __future__ import annotations

import shlex
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from moetool.commands.console import Console, count, escape
from moetool.commands.options import num_cores, options_text
from moetool.option import option, workers_option
from moetool.values import parse_size

if TYPE_CHECKING:
    from moetool.surgery.plan import Plan
    from moetool.surgery.sources import Sources


@dataclass(frozen=True)
class Folders:
    """The Mixture of Experts that is read, and the folder that is written."""

    model: str = option("A Mixture of Experts: a folder, or owner/name\\[@revision].", positional=True, metavar="MODEL")
    out: Path = option("The folder to write.", positional=True, metavar="OUT")


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

    @property
    def num_workers(self) -> int:
        """How many workers: by default one per core."""
        return self.workers or num_cores()

    def check(self, typed: Collection[str]) -> None:
        """Raise ConfigError if --max-shard-size is not a size."""
        parse_size(self.max_shard_size)


def open_model(context: typer.Context, models: Folders, writing: Writing, command: str) -> Sources:
    """Open the model of a command that runs it before it writes; OUT is checked first.

    Args:
        context: of the command, which closes the model.
        models: what is read and written.
        writing: how.
        command: its name.

    Raises:
        CheckpointError: the model cannot be read, or OUT holds something else.
    """
    from moetool.checkpoint.writer import check_out
    from moetool.surgery.sources import open_sources

    sources = context.with_resource(open_sources([models.model], models.out))
    if not writing.plan and not writing.overwrite:
        check_out(models.out, command)
    return sources


def carry_out(
    plan: Plan,
    sources: Sources,
    out: Path,
    writing: Writing,
    started: float,
    document: dict[str, Any],
    context: typer.Context,
    console: Console,
) -> None:
    """Write a plan and prove it; add `already_finished`, `seconds` and `proof` to the command's document.

    Args:
        plan: what to write.
        sources: it was made from.
        out: the folder.
        writing: how.
        started: when the command began (`time.perf_counter`).
        document: of the command.
        context: of the command; its options go to moetool.yaml.
        console: of the command.
    """
    from moetool.surgery.apply import prove, write_out

    with console.progress() as progress:
        files = {"moetool.yaml": options_text(context).encode()}
        if write_out(plan, sources, out, writing.num_workers, files, writing.overwrite, progress):
            document["already_finished"] = True
    document["seconds"] = round(time.perf_counter() - started, 2)
    if writing.verify != "none":
        with console.progress() as progress:
            document["proof"] = prove(plan, sources, out, writing.verify, writing.num_workers, progress).to_json()


def proof_line(proof: dict[str, Any]) -> str:
    """The result of a proof, in one sentence."""
    told = f"{proof['tensors']} tensors, {count(proof['copied'])} kept entries equal to the source"
    if proof.get("redrawn_units"):
        told += (
            f", {proof['redrawn_units']} changed units with statistics within"
            f" {proof['worst_sigma']:.1f} standard errors of the plan"
        )
    if proof["files"]:
        told += f", {proof['files']} other files unchanged since they were written"
    else:
        told += "; the other files were not compared, because moetool.json has no digests of them"
    if "load_difference" in proof:
        told += f", loads on text within {proof['load_difference']:.4f} of those predicted"
    if proof.get("split_groups"):
        told += (
            f"; router scores tie for {proof['split_groups']:.1%} of random tokens, which then lose part of the dense"
            f" FFN; use another --router-std or a family whose router does not tie (docs/upcycle.md)"
        )
    return f"[green]verified[/green] ({proof['level']}): {told}"


def closing(document: dict[str, Any]) -> str:
    """The last lines: the proof, and the time taken."""
    lines = [proof_line(document["proof"])] if "proof" in document else []
    done = "was already finished" if document.get("already_finished") else f"written in {document['seconds']:.1f} s"
    return "\n".join([*lines, f"{escape(document['out'])} {done}"])


def healing(out: Path, data: Mapping[str, str]) -> str:
    """The command that trains a result further.

    Args:
        out: its folder.
        data: the texts that it was measured on.
    """
    train = " ".join(f"--train {shlex.quote(f'{name}={path}')}" for name, path in data.items())
    folders = shlex.join((str(out), f"{out}-healed"))
    return escape(f"train it further: moetool cpt {folders} {train} --max-tokens 100M")
