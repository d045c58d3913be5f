"""From a plan to a proven folder, for every command that rewrites checkpoints, and what a proof tells."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moetool.commands.console import Console, count, escape
from moetool.commands.options import options_text

if TYPE_CHECKING:
    from moetool.surgery.plan import Plan
    from moetool.surgery.sources import Sources


def carry_out(
    plan: Plan,
    sources: Sources,
    out: Path,
    workers: int,
    level: str,
    overwrite: bool,
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
        workers: processes.
        level: of the proof: quick, full or none.
        overwrite: whether a checkpoint in `out` goes first.
        started: when the command began (`time.perf_counter`).
        document: of the command.
        context: of the command; its options go to moetool.yaml.
        console: of the command.
    """
    from moetool.surgery.apply import prove, write_out

    with console.progress() as progress:
        files = {"moetool.yaml": options_text(context).encode()}
        if write_out(plan, sources, out, workers, files, overwrite, progress):
            document["already_finished"] = True
    document["seconds"] = round(time.perf_counter() - started, 2)
    if level != "none":
        with console.progress() as progress:
            document["proof"] = prove(plan, sources, out, level, workers, progress).to_json()


def proof_line(proof: dict[str, Any]) -> str:
    """What a proof has shown, in one sentence."""
    told = f"{proof['tensors']} tensors, {count(proof['copied'])} kept entries equal to the source"
    if proof.get("redrawn_units"):
        told += (
            f", {proof['redrawn_units']} units changed, their statistics within"
            f" {proof['worst_sigma']:.1f} standard errors of the plan"
        )
    if proof["files"]:
        told += f", {proof['files']} files beside them as they were written"
    else:
        told += "; the files beside them were not compared, because moetool.json has no digests of them"
    if proof.get("split_groups"):
        told += (
            f"; router scores tie for {proof['split_groups']:.1%} of random tokens, which then miss a part of the dense"
            " FFN: take another --router-std or a family whose router does not tie (docs/upcycle.md)"
        )
    return f"[green]verified[/green] ({proof['level']}): {told}"


def closing(document: dict[str, Any]) -> str:
    """The last lines: what was proved, how long it took."""
    lines = [proof_line(document["proof"])] if "proof" in document else []
    done = "was finished already" if document.get("already_finished") else f"written in {document['seconds']:.1f} s"
    return "\n".join([*lines, f"{escape(document['out'])} {done}"])
