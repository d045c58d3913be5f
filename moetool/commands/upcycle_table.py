"""The plan and the warnings of `moetool upcycle`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetool.commands.console import count, size
from moetool.commands.plan_table import resource_rows, two_columns
from moetool.layers import by_layers

if TYPE_CHECKING:
    from rich.table import Table

    from moetool.upcycle.plan import Upcycling


def describe(upcycling: Upcycling, out: Path, workers: int) -> dict[str, Any]:
    """The plan as `--json` gives it."""
    from moetool.surgery.fill import peak_memory
    from moetool.surgery.plan import free_disk
    from moetool.upcycle.measured_loads import fitted

    recipe, plan = upcycling.recipe, upcycling.plan
    return {
        "out": str(out),
        "dense_family": upcycling.dense["model_type"],
        "text_model_of": upcycling.dense["text_model_of"],
        "target": upcycling.spec.model_type,
        "architecture": upcycling.spec.architecture,
        "recipe": recipe.to_json(),
        "num_layers": int(upcycling.dense["num_hidden_layers"]),
        "moe_layers": list(upcycling.moe_layers),
        "parameters": upcycling.parameters,
        "flops_per_token": upcycling.flops_per_token,
        "redrawn_units": _redrawn_units(upcycling),
        "trunk_shares": [float(share) for share in recipe.trunk_shares],
        "training_state_bytes": plan.num_bytes - sum(shard.size for shard in plan.model_shards),
        "num_bytes": plan.num_bytes,
        "num_shards": len(plan.shards),
        "free_disk_bytes": free_disk(out),
        "workers": workers,
        "peak_memory_bytes": peak_memory(plan.fills, workers),
        "clients": dict(upcycling.clients),
        "fitted": fitted(upcycling),
    }


def _redrawn_units(upcycling: Upcycling) -> dict[str, Any]:
    """Units changed in an expert; of layers that differ also a row for each."""
    layers, numbers, common = upcycling.moe_layers, upcycling.num_redrawn, upcycling.common_shares
    mean = sum(common) / len(common) if len(set(common)) > 1 else common[0]
    if len(set(numbers)) == 1:
        return {"per_expert": numbers[0], "of": upcycling.num_units, "common": mean}
    rows = [{"layer": n, "per_expert": m, "common": c} for n, m, c in zip(layers, numbers, common, strict=True)]
    return {"per_expert": None, "of": upcycling.num_units, "common": mean, "layers": rows}


def table(document: dict[str, Any]) -> Table:
    """The plan for people."""
    recipe, parameters = document["recipe"], document["parameters"]
    layers, flops = len(document["moe_layers"]), document["flops_per_token"]
    of = "" if layers == document["num_layers"] else f" of {document['num_layers']}"
    shared = f" and {recipe['shared_experts']} shared" if recipe["shared_experts"] else ""
    inside = f" (the text model of a {document['text_model_of']})" if document["text_model_of"] else ""
    split = f" ({recipe['split']} split)" if recipe.get("split", "contiguous") != "contiguous" else ""
    parts = f", each 1/{recipe['granularity']} of the dense FFN{split}" if recipe["granularity"] > 1 else ""
    resources = resource_rows(document)
    rows = {
        "family": f"{document['dense_family']}{inside} -> {document['target']} ({document['architecture']})",
        "experts": f"{recipe['num_experts']}{shared} per layer, top-{recipe['top_k']}, {layers}{of} layers{parts}",
        "method": method_line(document),
        **trunk_row(document),
        **router_rows(document),
        "parameters": f"{count(parameters['dense'])} dense -> {count(parameters['total'])} total,"
        f" {count(parameters['active'])} active",
        "compute": f"{flops['moe'] / flops['dense']:.2f} times the dense model's,"
        f" {count(flops['moe'])} FLOPs per token",
        "on disk": resources["on disk"],
        **optimizer_row(document),
        "memory": resources["memory"],
        "runs in": clients_line(document["clients"]),
    }
    return two_columns(rows)


def router_rows(document: dict[str, Any]) -> dict[str, str]:
    """The predicted loads of fitted routers."""
    from moetool.upcycle.measured_loads import spread

    if not (fitted := document["fitted"]):
        return {}
    largest = [max(load) for row in fitted["layers"] for load in row["load"].values()]
    even = 1 / document["recipe"]["num_experts"]
    told = f"{fitted['router']} on {', '.join(fitted['texts'])}; predicted largest load of a layer"
    told += f" {min(largest):.1%} to {max(largest):.1%} of the routes ({even:.1%} is even)"
    told += f", ± {spread(one for row in fitted['layers'] for one in row['halves'].values()):.1%}"
    if fitted["router"] == "ridge":
        shares = [share for row in fitted["layers"] for share in row["to_donor"].values()]
        told += f"; {min(shares):.0%} to {max(shares):.0%} of a text's routes go to its donor"
    return {"router": told}


def optimizer_row(document: dict[str, Any]) -> dict[str, str]:
    """The optimizer state that is kept; empty if none."""
    state = document["training_state_bytes"]
    return {"optimizer": f"moments kept for cpt --keep-optimizer: {size(state)} of that"} if state else {}


def clients_line(clients: dict[str, str | None]) -> str:
    """Where a checkpoint runs, and why not elsewhere."""
    from moetool.arch.clients import CLIENTS

    runs = ", ".join(["transformers 5", *(CLIENTS[name] for name, reason in clients.items() if not reason)])
    refused = "".join(f"; not in {CLIENTS[name]}, because {reason}" for name, reason in clients.items() if reason)
    return runs + refused


def method_line(document: dict[str, Any]) -> str:
    """The changes to the experts, in words."""
    recipe, units = document["recipe"], document["redrawn_units"]
    donors = f"from {recipe['num_donors']} dense models, " if recipe["num_donors"] > 1 else ""
    if recipe["method"] == "scratch":
        return "every tensor is initialised at random; no dense weights are kept"
    rows = units.get("layers") or [units | {"layer": 0}]
    numbers = [row["per_expert"] for row in rows]
    if not any(numbers):
        return f"{donors}{recipe['method']}: plain copies"
    where = "in gate, up and down alike" if recipe["drop_index"] == "shared" else "in each matrix, units permuted"
    what = "redrawn"
    if recipe["method"] == "noise":
        std = f"std {recipe['noise_std']}" if recipe["noise_std"] else f"{recipe['noise_scale']} x each matrix's std"
        what = f"given noise of {std}"
    what += ", preferring those that contribute little," if recipe.get("drop_units") == "least-used" else ""
    whole = recipe.get("keep_experts_whole", 0)
    where += f", except in {whole} kept whole" if whole else ""
    changed = by_layers(numbers, [row["layer"] for row in rows], f"of {units['of']} units {what} in each expert")
    shares = sorted(row["common"] for row in rows)
    common = " to ".join(dict.fromkeys(f"{share:.1%}" for share in (shares[0], shares[-1])))
    return f"{donors}{recipe['method']}: {changed}, {where}; two experts have {common} in common" + (
        ", on average" if whole else ""
    )


def trunk_row(document: dict[str, Any]) -> dict[str, str]:
    """Where all but the experts comes from, if donors have weights."""
    if "donor_weights" not in document["recipe"]:
        return {}
    shares = document["trunk_shares"]
    if 1 in shares:
        whose = f"donor {shares.index(1)}" if shares.index(1) else "DENSE"
        return {"trunk": f"everything outside the experts is {whose}'s alone"}
    named = [f"{share:.4g} of {f'donor {n}' if n else 'DENSE'}" for n, share in enumerate(shares)]
    return {"trunk": f"everything outside the experts is a mean, {', '.join(named)}"}


def warnings(upcycling: Upcycling, repeated: Sequence[str]) -> list[str]:
    """Consequences of a recipe that its user may not want.

    Args:
        upcycling: the plan.
        repeated: names of donors that are DENSE itself.
    """
    from moetool.upcycle.measured_loads import ROUGH, rough, spread
    from moetool.upcycle.texts import reads_units

    recipe = upcycling.recipe
    told = [f"--donor {name} is DENSE itself, so its experts start like DENSE's own" for name in repeated]
    if recipe.top_k == recipe.group_size:
        what = "expert" if recipe.top_k == 1 else "group of experts"
        more = recipe.group_size * 2
        experts = f" and --num-experts {2 * more}" * (more >= recipe.num_experts)  # all would be no routing
        told.append(
            f"with --top-k {recipe.top_k}, {upcycling.spec.model_type} gives every chosen {what} the same weight, so"
            f" only a balance loss trains the router; use --top-k {more}{experts}"
        )
    elif recipe.top_k == recipe.num_experts:
        told.append(f"--top-k {recipe.top_k} sends every token to all {recipe.num_experts} experts; lower it to route")
    ratio = {"drop": recipe.drop_ratio, "noise": recipe.noise_ratio}.get(recipe.method)
    if ratio and not any(recipe.num_redrawn(upcycling.num_units, layer) for layer in upcycling.moe_layers):
        told.append(f"--method {recipe.method} changes no unit here, so experts start as with --method copy")
    if upcycling.state and upcycling.state.rounded:
        told.append(
            f"the moments of {upcycling.state.reader.folder} are not all fp32 (cpt --moments bf16), but the result's"
            " are; continue with --moments fp32, the default"
        )
    told += [
        f"--calibrate {name}: loads in the two halves of its held-out text differ by up to {2 * off:.1%}, so predicted"
        f" ones may be off by {off:.1%}; give more text, from more documents"
        for name, off in rough(upcycling).items()
    ]
    if (apart := upcycling.measured.units_apart) and spread([apart]) > ROUGH:
        told.append(
            f"{' and '.join(reads_units(recipe))}: the units' contributions in the two halves of the text differ by"
            f" {apart:.1%}, so they may be off by {spread([apart]):.1%}; give more text"
        )
    if recipe.method != "scratch" and (recipe.router == "zeros" or not recipe.router_std):
        zeros = "--router zeros" if recipe.router == "zeros" else "--router-std 0"
        told.append(
            f"{zeros} sends every token to the same first experts of each layer until training moves them apart"
        )
    return told
