"""What `moetool upcycle` and `moetool verify` tell: the plan, warnings, the proof."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetool.commands.console import count, escape, size

if TYPE_CHECKING:
    from rich.table import Table

    from moetool.upcycle.plan import Plan


def describe(plan: Plan, out: Path, workers: int) -> dict[str, Any]:
    """The plan as `--json` gives it."""
    from moetool.upcycle.plan import free_disk

    recipe = plan.recipe
    return {
        "out": str(out),
        "dense_family": plan.dense["model_type"],
        "text_model_of": plan.dense["text_model_of"],
        "target": plan.spec.model_type,
        "architecture": plan.spec.architecture,
        "recipe": recipe.to_json(),
        "num_layers": int(plan.dense["num_hidden_layers"]),
        "moe_layers": list(plan.moe_layers),
        "parameters": plan.parameters,
        "flops_per_token": plan.flops_per_token,
        "redrawn_units": {"per_expert": plan.num_redrawn, "of": plan.num_units, "common": plan.common_share},
        "num_bytes": plan.num_bytes,
        "num_shards": len(plan.shards),
        "free_disk_bytes": free_disk(out),
        "workers": workers,
        "peak_memory_bytes": plan.peak_memory(workers),
        "clients": dict(plan.clients),
    }


def table(document: dict[str, Any]) -> Table:
    """The plan for people."""
    from rich.table import Table

    recipe, parameters = document["recipe"], document["parameters"]
    layers, flops = len(document["moe_layers"]), document["flops_per_token"]
    of = "" if layers == document["num_layers"] else f" of {document['num_layers']}"
    shared = f" and {recipe['shared_experts']} shared" if recipe["shared_experts"] else ""
    inside = f" (the text model of a {document['text_model_of']})" if document["text_model_of"] else ""
    too_large = "; it does not fit" if document["num_bytes"] > document["free_disk_bytes"] else ""
    parts = f", each 1/{recipe['granularity']} of the dense FFN" if recipe["granularity"] > 1 else ""
    rows = {
        "family": f"{document['dense_family']}{inside} -> {document['target']} ({document['architecture']})",
        "experts": f"{recipe['num_experts']}{shared} a layer, top-{recipe['top_k']}, {layers}{of} layers{parts}",
        "method": method_line(document),
        "parameters": f"{count(parameters['dense'])} dense -> {count(parameters['total'])} total,"
        f" {count(parameters['active'])} active",
        "compute": f"{flops['moe'] / flops['dense']:.2f} times the dense model's, {count(flops['moe'])} FLOPs a token",
        "on disk": f"{size(document['num_bytes'])} in {document['num_shards']} file{'s' * (document['num_shards'] > 1)}"
        f" ({size(document['free_disk_bytes'])} free{too_large})",
        "memory": f"about {size(document['peak_memory_bytes'])}, with {document['workers']} workers",
        "runs in": escape(clients_line(document["clients"])),
    }
    made = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for label, value in rows.items():
        made.add_row(label, value)
    return made


def clients_line(clients: dict[str, str | None]) -> str:
    """Where a checkpoint runs, and why not elsewhere."""
    from moetool.arch.clients import CLIENTS

    runs = ", ".join(["transformers 5", *(CLIENTS[name] for name, reason in clients.items() if not reason)])
    refused = "".join(f"; not in {CLIENTS[name]}, because {reason}" for name, reason in clients.items() if reason)
    return runs + refused


def method_line(document: dict[str, Any]) -> str:
    """What is done to the experts, in words."""
    recipe, units = document["recipe"], document["redrawn_units"]
    donors = f"from {recipe['num_donors']} dense models, " if recipe["num_donors"] > 1 else ""
    if recipe["method"] == "scratch":
        return "every tensor drawn anew, nothing of the dense model kept"
    if not units["per_expert"]:
        return f"{donors}{recipe['method']}: plain copies"
    where = "in gate, up and down alike" if recipe["drop_index"] == "shared" else "in each matrix, units permuted"
    what = "redrawn"
    if recipe["method"] == "noise":
        std = f"std {recipe['noise_std']}" if recipe["noise_std"] else f"{recipe['noise_scale']} x each matrix's std"
        what = f"given noise of {std}"
    return (
        f"{donors}{recipe['method']}: {units['per_expert']} of {units['of']} units {what} in each expert, {where};"
        f" two experts have {units['common']:.1%} in common"
    )


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
    if proof["split_groups"]:
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


def warnings(plan: Plan) -> list[str]:
    """What a recipe means that its user may not want."""
    told = []
    if plan.recipe.top_k == plan.recipe.group_size:
        what = "expert" if plan.recipe.top_k == 1 else "group of experts"
        more = plan.recipe.group_size * 2
        told.append(
            f"with --top-k {plan.recipe.top_k}, {plan.spec.model_type} gives every chosen {what} the same weight: the"
            f" router gets no gradient from the language loss, only from a balance loss; use --top-k {more} to train it"
        )
    if plan.recipe.router == "zeros":
        told.append(
            "--router zeros sends every token to the same first experts of each layer until training moves them apart"
        )
    return told
