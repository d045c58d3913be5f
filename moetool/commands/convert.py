"""`moetool convert`: the same model with another dtype or layout."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moetool.commands.console import Console
from moetool.commands.options import Output
from moetool.commands.plan_table import describe_files, file_rows, two_columns
from moetool.commands.proof import Writing, carry_out, closing
from moetool.convert.recipe import ConvertRecipe
from moetool.errors import ConfigError
from moetool.option import option
from moetool.values import parse_size

if TYPE_CHECKING:
    from rich.table import Table

    from moetool.convert.plan import Conversion


@dataclass(frozen=True)
class Models:
    """The model that is read, the adapter that is merged into it, and the folder that is written."""

    source: str = option("The model: a folder, or owner/name\\[@revision].", positional=True, metavar="SRC")
    out: Path = option("The folder to write.", positional=True, metavar="OUT")
    adapter: str | None = option(
        "LoRA adapter to merge into SRC, as saved by peft.", None, metavar="LORA", after="layout"
    )


def convert(
    context: typer.Context, models: Models, options: ConvertRecipe, writing: Writing, output: Output
) -> dict[str, Any]:
    """Write the same model with another dtype or layout.

    Changes the dtype, the size of the shards or the layout of the experts, merges a LoRA adapter, reads
    pickled weights, or extracts the text model of a multimodal one. The result is a standard Hugging Face
    checkpoint, written with bounded memory. A killed run leaves nothing that loads, and the same command
    finishes it.
    """
    from moetool.convert.plan import plan_conversion
    from moetool.surgery.sources import open_sources

    console = Console(context, output.json, output.quiet)
    started = time.perf_counter()
    sources = context.with_resource(
        open_sources([models.source], models.out, writing.plan, options.unpickle, models.adapter)
    )
    if options.unpickle:
        if not any(reader.pickled for reader in sources.readers):
            raise ConfigError(f"--unpickle has no effect, because {models.source} has safetensors; leave it out")
        console.warn(
            "torch's restricted unpickler reads the weights; elsewhere a pickle can run code, so use only the converted"
            " files"
        )
    recipe = replace(options, adapter=models.adapter is not None)
    conversion = plan_conversion(sources.readers, recipe, parse_size(writing.max_shard_size))
    document = describe(conversion, models.out, writing.num_workers)
    if conversion.layouts == ("per-expert", "fused"):
        console.warn("--layout fused is read by transformers 5; other programs may need one tensor per expert")
    if writing.plan:
        console.result(document, table(document))
        return document
    carry_out(conversion.plan, sources, models.out, writing, started, document, context, console)
    console.result(document, table(document), closing(document))
    return document


def describe(conversion: Conversion, out: Path, workers: int) -> dict[str, Any]:
    """The plan as `--json` gives it."""
    plan = conversion.plan
    return {
        "out": str(out),
        "source_family": plan.model_types[0],
        "text_model_of": conversion.text_model_of,
        "family": plan.config.get("model_type"),
        "recipe": dict(plan.recipe),
        "layout": {"source": conversion.layouts[0], "result": conversion.layouts[1]},
        "adapter": {
            "merged": conversion.num_merged,
            "replaced": conversion.num_replaced,
            "untied": conversion.untied,
        },
        **describe_files(plan, out, workers),
    }


def table(document: dict[str, Any]) -> Table:
    """The plan for people."""
    inside = f" (the text model of a {document['text_model_of']})" if document["text_model_of"] else ""
    before, after = document["layout"]["source"], document["layout"]["result"]
    rows = {"family": f"{document['family']}{inside}"}
    if after:
        rows["experts"] = f"{after}, unchanged" if before == after else f"{before} -> {after}"
    if document["recipe"]["adapter"]:
        merged, replaced = document["adapter"]["merged"], document["adapter"]["replaced"]
        untied = "; embeddings and output head, which were one tensor, become two" * document["adapter"]["untied"]
        rows["adapter"] = f"merged into {merged} tensors" + f", replaces {replaced}" * bool(replaced) + untied
    return two_columns(rows | file_rows(document))
