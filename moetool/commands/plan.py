"""`moetool plan`: the cost and gain of upcycling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer

from moetool.budget.options import PlanOptions
from moetool.commands.console import Console, escape
from moetool.commands.options import Output
from moetool.commands.plan_page import page


def plan(context: typer.Context, options: PlanOptions, output: Output) -> dict[str, Any]:
    """Estimate what upcycling a model would cost and gain.

    Reads only config.json and the headers of DENSE, from a folder or the hub. Compares training the dense model
    further, upcycling it and training from scratch: operations, GPU-hours, money, and the loss predicted by a
    scaling law within its fitted range. Says which meshes fit, and prints the commands of the recommended way.
    """
    from moetool.budget.report import document, make_plan
    from moetool.budget.sweep import swept
    from moetool.checkpoint.hub import fetch_headers
    from moetool.checkpoint.reader import CheckpointReader

    console = Console(context, output.json, output.quiet)
    folder = Path(context.with_resource(TemporaryDirectory(prefix="moetool-")))
    reader = context.with_resource(CheckpointReader(fetch_headers(options.dense, folder)))
    settled, probe = make_plan(options, reader), None
    if options.probe:
        from moetool.budget.probe import measure

        with console.progress() as progress:
            probe = measure(settled, progress)
        if (probe.device, probe.processes) == ("cuda", options.num_gpus):
            settled = replace(settled, measured=(probe.tokens_per_second, "measured by --probe"))
    found = document(settled)
    found["probe"] = probe and probe.to_json(found["steps"])
    found["sweep"] = swept(options, reader) if options.sweep else []
    if options.html:
        from moetool.budget.html import render
        from moetool.checkpoint.folder import write_file

        options.html.parent.mkdir(parents=True, exist_ok=True)
        write_file(options.html, render(found).encode())
    console.result(found, *page(found))
    if not output.json:
        for line in found["commands"]:
            console.say(escape(line), whole=True)
    return found
