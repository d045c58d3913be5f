"""`moetool convert`: the same model in another form."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moetool.commands.console import Console, count, escape, size
from moetool.commands.options import ConfigFlag, Dtype, JsonFlag, QuietFlag, long_dtype, num_cores, parse_size
from moetool.commands.proof import carry_out, closing

if TYPE_CHECKING:
    from rich.table import Table

    from moetool.convert.plan import Conversion

UnpickleFlag = Annotated[
    bool,
    typer.Option(
        "--unpickle",
        help="Where there are no safetensors, read pickled weights (pytorch_model.bin) with torch's restricted"
        " unpickler.",
    ),
]


def convert(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="The model: a folder, or owner/name\\[@revision].", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    dtype: Annotated[
        Dtype,
        typer.Option(help="Dtype of the written weights; auto keeps the source's.", callback=long_dtype),
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file, such as 5GB.")] = "5GB",
    layout: Annotated[
        Literal["auto", "per-expert", "fused"],
        typer.Option(help="A tensor per expert, or one for all experts of a layer; auto keeps the source's."),
    ] = "auto",
    adapter: Annotated[
        str | None,
        typer.Option(metavar="LORA", help="A LoRA adapter to merge into SRC, as peft saves it.", show_default=False),
    ] = None,
    unpickle: UnpickleFlag = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads.  \\[default: one per core]", show_default=False)
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be written and stop.")] = False,
    verify: Annotated[
        Literal["quick", "full", "none"],
        typer.Option(help="Prove the result: headers and a sample of each tensor, every entry, or nothing."),
    ] = "quick",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in OUT.")] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    config: ConfigFlag = None,
) -> dict[str, Any]:
    """Write a checkpoint as the same model in another form.

    Changes the dtype, the size of files or the layout of experts, merges a LoRA adapter, reads pickled
    weights, or takes the text model out of a multimodal one. The result is a stock Hugging Face checkpoint,
    written in bounded memory. A killed run cannot be loaded, and the same command finishes it.
    """
    max_bytes = parse_size(max_shard_size)

    from moetool.checkpoint.reader import FLOAT_DTYPES
    from moetool.convert.plan import ConvertRecipe, plan_conversion
    from moetool.surgery.sources import open_sources

    console = Console(context, json, quiet)
    started = time.perf_counter()
    if unpickle:
        console.warn(
            "pickled weights are read with torch's restricted unpickler, which makes tensors and plain containers only;"
            " a pickle can run code in any other reader, so keep the converted files instead"
        )
    sources = context.with_resource(open_sources([source], out, plan, unpickle, adapter))
    short = {long: name for name, long in FLOAT_DTYPES.items()}.get(dtype, "auto")
    recipe = ConvertRecipe(short, layout, unpickle, adapter is not None)
    conversion = plan_conversion(sources.readers, recipe, max_bytes)
    workers = workers or num_cores()
    document = describe(conversion, out, workers)
    if plan:
        console.result(document, table(document))
        return document
    if conversion.layouts == ("per-expert", "fused"):
        console.warn("--layout fused is read by transformers 5; other programs may need a tensor per expert")
    carry_out(conversion.plan, sources, out, workers, verify, overwrite, started, document, context, console)
    console.result(document, table(document), closing(document))
    return document


def describe(conversion: Conversion, out: Path, workers: int) -> dict[str, Any]:
    """The plan as `--json` gives it."""
    from moetool.surgery.plan import free_disk

    plan = conversion.plan
    dtypes: dict[str, int] = {}
    for fill in plan.fills:
        dtypes[fill.dtype] = dtypes.get(fill.dtype, 0) + fill.num_elements
    return {
        "out": str(out),
        "source_family": plan.model_types[0],
        "text_model_of": conversion.text_model_of,
        "family": plan.config.get("model_type"),
        "recipe": dict(plan.recipe),
        "layout": {"source": conversion.layouts[0], "result": conversion.layouts[1]},
        "adapter": {"merged": conversion.num_merged, "replaced": conversion.num_replaced},
        "parameters": plan.num_parameters,
        "dtypes": dtypes,
        "num_tensors": len(plan.tensors),
        "num_bytes": plan.num_bytes,
        "num_shards": len(plan.shards),
        "free_disk_bytes": free_disk(out),
        "workers": workers,
        "peak_memory_bytes": plan.peak_memory(workers),
    }


def table(document: dict[str, Any]) -> Table:
    """The plan for people."""
    from rich.table import Table

    inside = f" (the text model of a {document['text_model_of']})" if document["text_model_of"] else ""
    before, after = document["layout"]["source"], document["layout"]["result"]
    too_large = "; it does not fit" if document["num_bytes"] > document["free_disk_bytes"] else ""
    rows = {"family": f"{document['family']}{inside}"}
    if after:
        rows["experts"] = f"{after}, as they were" if before == after else f"{before} -> {after}"
    if document["recipe"]["adapter"]:
        merged, replaced = document["adapter"]["merged"], document["adapter"]["replaced"]
        rows["adapter"] = f"merged into {merged} tensors" + f", replaces {replaced}" * bool(replaced)
    rows |= {
        "weights": ", ".join(f"{dtype} ({count(number)})" for dtype, number in document["dtypes"].items()),
        "on disk": f"{size(document['num_bytes'])} in {document['num_shards']} file{'s' * (document['num_shards'] > 1)}"
        f" ({size(document['free_disk_bytes'])} free{too_large})",
        "memory": f"about {size(document['peak_memory_bytes'])}, with {document['workers']} workers",
    }
    made = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for label, value in rows.items():
        made.add_row(label, escape(value))
    return made
