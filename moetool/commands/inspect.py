"""`moetool inspect`: describe a checkpoint from its headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import typer

from moetool.commands.console import Console, count, escape, size
from moetool.commands.options import Output
from moetool.commands.plan_table import two_columns
from moetool.commands.upcycle_table import clients_line
from moetool.layers import by_layers
from moetool.option import option
from moetool.outside import fits

EXPERTS = ".experts."  # in the name of a routed expert's tensor, whatever the family


@dataclass(frozen=True)
class InspectOptions:
    """The options of `moetool inspect`."""

    path: str = option("A model: a folder, or owner/name\\[@revision].", positional=True, metavar="PATH")
    tensors: bool = option("List every tensor.", False, flag="--tensors")


def inspect(context: typer.Context, options: InspectOptions, output: Output) -> dict[str, Any]:
    """Describe a checkpoint: family, parameters, experts, files, lineage.

    Reads config.json and the headers of the safetensors files. No weights are loaded.
    """
    from moetool.checkpoint.hub import resolve_model
    from moetool.checkpoint.reader import CheckpointReader
    from moetool.lineage import lineage_entries

    console = Console(context, output.json, output.quiet)
    with CheckpointReader(resolve_model(options.path)) as reader:
        document = describe(reader)
        document["lineage"] = lineage_entries(reader.folder)
        if options.tensors:
            document["tensors"] = {
                name: {"dtype": info.dtype, "shape": list(info.shape), "file": info.shard}
                for name, info in reader.tensors.items()
            }
    console.result(document, *render(document))
    return document


def describe(reader: Any) -> dict[str, Any]:
    """Family, parameters, experts and files of an opened checkpoint."""
    from moetool.arch.clients import obstacles
    from moetool.arch.forms import is_wrapped, text_config
    from moetool.arch.moe_source import moe_source
    from moetool.arch.spec import detect
    from moetool.checkpoint.folder import beside

    config = reader.config
    source, text = moe_source(reader), text_config(config)
    total = sum(info.num_elements for info in reader.tensors.values())
    architectures = config.get("architectures")
    document: dict[str, Any] = {
        "path": str(reader.folder),
        "model_type": config.get("model_type"),
        "architecture": next(iter(architectures), None) if isinstance(architectures, list) else None,
        "num_layers": text.get("num_hidden_layers"),
        "hidden_size": text.get("hidden_size"),
        "intermediate_size": text.get("intermediate_size"),
        "vocab_size": text.get("vocab_size"),
        "parameters": {"total": total, "active": None if any(EXPERTS in name for name in reader.tensors) else total},
        "num_experts": None,
        "top_k": None,
        "has_text_model": is_wrapped(config),
    }
    if source is not None:
        experts, top_k, routed = source.num_experts, source.top_k, source.num_routed
        document |= {"num_experts": experts, "top_k": top_k, "intermediate_size": config.get(source.spec.units_key)}
        if source.spec.shared:
            shared = source.shared(source.layers[0], "down") if source.layers else None
            document["shared_intermediate_size"] = shared.shape[-1] if shared else 0
        document["parameters"]["active"] = total - routed + routed * top_k // experts if routed else None
        # Whether other programs can run experts in one tensor was measured only for families that always store them so.
        if source.spec.experts == detect(config).experts:  # type: ignore[union-attr]
            document["clients"] = obstacles(config, beside(reader.folder))
    dtypes: dict[str, int] = {}
    files: dict[str, int] = {}
    for info in reader.tensors.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.num_elements
        files[info.shard] = files.get(info.shard, 0) + info.size
    return document | {
        "dtypes": dtypes,
        "files": files,
        "num_bytes": sum(files.values()),
        "num_tensors": len(reader.tensors),
    }


def render(document: dict[str, Any]) -> list[Any]:
    """The document for people."""
    from rich.table import Table

    parameters = document["parameters"]
    rows = {"family": f"{document['model_type']} ({document['architecture']})"}
    if document["num_experts"]:
        active = "active unknown" if parameters["active"] is None else f"{count(parameters['active'])} active"
        rows["parameters"] = f"{count(parameters['total'])} total, {active}"
        shared = document.get("shared_intermediate_size")
        rows["experts"] = f"{document['num_experts']} per layer, top-{document['top_k']}" + (
            f", and a shared expert of {shared} units" if shared else ""
        )
    else:
        unknown = " total, active unknown" if parameters["active"] is None else ""
        rows["parameters"] = f"{count(parameters['total'])}{unknown}"
    inside = "of its text model: " if document["has_text_model"] else ""
    rows["sizes"] = (
        f"{inside}{document['num_layers']} layers, hidden {document['hidden_size']},"
        f" intermediate {document['intermediate_size']}, vocabulary {document['vocab_size']}"
    )
    rows["weights"] = ", ".join(f"{dtype} ({count(number)})" for dtype, number in document["dtypes"].items())
    files = document["files"]
    rows["files"] = f"{len(files)}, {size(document['num_bytes'])}, {document['num_tensors']} tensors"
    if "clients" in document:
        rows["runs in"] = clients_line(document["clients"])
    table = two_columns(rows)
    for number, entry in enumerate(document["lineage"], start=1):
        table.add_row("lineage" if number == 1 else "", escape(f"{number}. {lineage_line(entry)}"))
    shown: list[Any] = [table]
    if "tensors" in document:
        listing = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("tensor", "dtype", "shape", "file"):
            listing.add_column(column, overflow="fold")
        for name, info in document["tensors"].items():
            listing.add_row(escape(name), info["dtype"], " x ".join(map(str, info["shape"])), escape(info["file"]))
        shown.append(listing)
    return shown


def _units_line(recorded: dict[str, Any], what: str) -> str:
    """How many units of an expert were changed, by layer where layers differ."""
    numbers: Any = recorded.get("num_redrawn")
    layers: Any = recorded.get("layers")
    said = f"of {recorded.get('num_units')} {what}"
    if fits(numbers, [int]) and fits(layers, [int]) and len(numbers) == len(layers):
        return by_layers(numbers, layers, said)
    return f"{numbers} {said}"


def lineage_line(entry: dict[str, Any]) -> str:
    """One step of a checkpoint's history, in one line."""
    from moetool.lineage import recorded_sources

    if entry.get("command") == "upcycle":
        recipe, source = entry.get("recipe", {}), entry.get("source", {})
        units = entry.get("redrawn_units")
        what = "given noise" if recipe.get("method") == "noise" else "redrawn"
        how = f"{recipe.get('drop_index')}{', least-used' * (recipe.get('drop_units') == 'least-used')}"
        redrawn = f", {_units_line(units, f'units {what}')} ({how})" if units else ""
        weights = [None, *(found if isinstance(found := recipe.get("donor_weights"), list) else [])]
        of = [f" (weight {weight})" if weight is not None else "" for weight in weights]
        sources = recorded_sources(entry)
        names = " and ".join(f"{one.get('name')}{of[n] if n < len(of) else ''}" for n, one in enumerate(sources))
        parts = "".join(
            f", {name} {recipe[key]}"
            for key, name, usual in (
                ("granularity", "granularity", 1),
                ("split", "split", "contiguous"),
                ("shared_experts", "shared experts", 0),
                ("moe_layers", "layers", "all"),
                ("router", "router", "normal"),
                ("keep_experts_whole", "experts kept whole", 0),
            )
            if recipe.get(key, usual) != usual
        )
        return (
            f"upcycle of {names} ({source.get('model_type')}): {recipe.get('num_experts')} experts,"
            f" top-{recipe.get('top_k')}{parts}, method {recipe.get('method')}{redrawn}, seed {recipe.get('seed')}"
        )
    if entry.get("command") == "convert":
        recipe = entry.get("recipe", {})
        base, *adapter = (str(source.get("name")) for source in recorded_sources(entry))
        changes = [f"{key} {recipe[key]}" for key in ("dtype", "layout") if recipe.get(key, "auto") != "auto"]
        changes += [f"with {name} merged" for name in adapter]
        return ", ".join([f"convert of {base} ({entry.get('source', {}).get('model_type')})", *changes])
    if entry.get("command") == "average":
        averaged = [str(source.get("name")) for source in recorded_sources(entry)]
        between = f"{averaged[0]} to {averaged[-1]}" if len(averaged) > 2 else " and ".join(averaged)
        return f"average of {len(averaged)}: {between}, weights {entry.get('recipe', {}).get('weights')}"
    if entry.get("command") == "grow":
        recipe, source = entry.get("recipe", {}), entry.get("source", {})
        asleep = f" for {recipe['wake_after']} steps" if recipe.get("wake_after") else ""
        by = f", copies by {recipe['utility']}" if recipe.get("utility", "none") != "none" else ""
        return (
            f"grow of {source.get('name')} ({source.get('model_type')}): {recipe.get('num_experts')} experts,"
            f" top-{recipe.get('top_k')}, {recipe.get('start')}{asleep}{by}"
        )
    if entry.get("command") in ("prune", "densify"):
        recipe, source = entry.get("recipe", {}), entry.get("source", {})
        by = f" by {recipe['score']}" if recipe.get("score") else ""
        merged = f", the others merged into them ({recipe['merge']})" if recipe.get("merge") else ""
        return (
            f"{entry['command']} of {source.get('name')} ({source.get('model_type')}): {recipe.get('keep_experts')}"
            f" experts kept{by}{merged}"
        )
    if entry.get("command") == "cpt":
        return f"cpt: {entry.get('steps')} steps, {entry.get('tokens')} tokens, seed {entry.get('seed')}"
    return str(entry.get("command"))
