"""`moetool densify`: a Mixture of Experts to a dense model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from moetool.calibration.options import CalibrationOptions
from moetool.commands.console import Console
from moetool.commands.memory_estimate import estimated, tell_calibration
from moetool.commands.options import Output
from moetool.commands.plan_table import describe_files, file_rows, loss_rows, two_columns
from moetool.commands.proof import Folders, Writing, carry_out, closing, healing, open_model
from moetool.option import option
from moetool.values import parse_size


@dataclass(frozen=True)
class DensifyOptions:
    """The experts to keep."""

    keep_experts: int = option("Number of routed experts per layer that form its FFN.", min=1, metavar="K")


def densify(
    context: typer.Context,
    models: Folders,
    options: DensifyOptions,
    run: CalibrationOptions,
    writing: Writing,
    output: Output,
) -> dict[str, Any]:
    """Convert a Mixture of Experts to a dense model.

    The FFN of each layer is built from the shared expert and the K experts that contribute most on --data, each
    with its mean weight. Everything else is copied to the dense family with the same attention. The result is a
    standard Hugging Face checkpoint that needs training. A killed run leaves nothing that loads, and the same
    command finishes it.
    """
    from moetool.calibration.measure import calibration_of, load, losses, read_texts
    from moetool.densify.measure import parts_of
    from moetool.densify.plan import check_source, plan_dense
    from moetool.errors import ConfigError
    from moetool.surgery.experts import open_moe
    from moetool.surgery.lineage import recorded

    console = Console(context, output.json, output.quiet)
    started = time.perf_counter()
    sources = open_model(context, models, writing, "densify")
    folder, source = sources.readers[0].folder, open_moe(sources.readers[0], "densified")
    check_source(source)
    if (keep := options.keep_experts) > source.num_experts:
        raise ConfigError(f"--keep-experts {keep}: {folder} has {source.num_experts} experts; keep at most that")
    estimate = tell_calibration(console, folder, run)
    with console.progress() as progress, estimated(estimate):
        known = recorded(models.out)
        texts, validation = (read_texts(named, folder, run, progress, known) for named in (run.data, run.val))
        model = load(folder, run)
        measured = calibration_of(model, folder, texts, run, progress)
        parts = parts_of(source, measured, keep)
        before = losses(model, validation, run, progress)
        del model
    data = {name: text.manifest["sha256"] for name, text in texts.items()}
    plan = plan_dense(sources.readers, {"keep_experts": keep, "data": data}, parts, parse_size(writing.max_shard_size))
    document: dict[str, Any] = {
        "out": str(models.out),
        "family": {"before": source.spec.model_type, "after": plan.config["model_type"]},
        "num_experts": source.num_experts,
        "intermediate_size": plan.config["intermediate_size"],
        "layers": [{"layer": layer, **vars(part)} for layer, part in parts.items()],
        "val": {name: {"before": loss, "after": None} for name, loss in before.items()},
        **describe_files(plan, models.out, writing.num_workers),
    }
    if not writing.plan:
        carry_out(plan, sources, models.out, writing, started, document, context, console)
        with console.progress() as progress, estimated(estimate):
            for name, loss in losses(load(models.out, run), validation, run, progress).items() if validation else ():
                document["val"][name]["after"] = loss
    show(document, keep, run.data, console)
    return document


def show(document: dict[str, Any], keep: int, data: Mapping[str, str], console: Console) -> None:
    """Print the result, and the command that trains it further."""
    family, weights = document["family"], [sum(row["weights"]) for row in document["layers"]]
    rows = {
        "model": f"{family['before']} -> {family['after']}",
        "FFN": f"{document['intermediate_size']} units from {keep} of {document['num_experts']} experts",
        "mean weights": f"per layer sum to {min(weights):.3f} to {max(weights):.3f}",
    }
    lines = [closing(document)] if "seconds" in document else []
    lines += [healing(Path(document["out"]), data)] if lines else []
    console.result(document, two_columns(rows | loss_rows(document) | file_rows(document)), *lines)
