"""A plan for people: the output of `moetool plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moetool.amounts import amount
from moetool.budget.commands import LR, written
from moetool.commands.console import count, escape, size
from moetool.commands.plan_table import narrow, numbers, two_columns

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

SHOWN_MESHES = 6


def page(found: Mapping[str, Any]) -> list[RenderableType]:
    """The parts of the page, the verdict on the law's range first.

    Args:
        found: the document of a plan.
    """
    best = found["recommended"]
    parts: list[RenderableType] = [
        _law(found),
        f"[bold]Recommended: {escape(best['title'])}[/bold], because {escape(best['because'])}.",
    ]
    parts += ["", _models(found), "", _ways(found), "", *_rules(found)]
    parts += ["", *_meshes(found), "", two_columns(_rest(found)), "", *_rate(found)]
    if found["sweep"]:
        parts += ["", *_sweep(found["sweep"])]
    parts += ["", f"[bold]commands: {escape(best['title'])}[/bold]"]
    if not _planned(found)["fitting"]:
        parts.append("[yellow]the training is left out, because it does not fit[/yellow]")
        return parts
    parts.append(f"[dim]replace data/ with your text, and --lr {LR} by the advice above[/dim]")
    if found["cluster"]["num_gpus"] > found["cluster"]["gpus_per_node"]:
        parts.append("[dim]RANK is each machine's number from 0, HOST the address of the first[/dim]")
    return parts


def _planned(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The meshes of the recommended way."""
    meshes: Mapping[str, Any] = found["dense_meshes"] or found["meshes"]
    return meshes


def _law(found: Mapping[str, Any]) -> str:
    law = found["law"]
    if not law["inside"]:
        reasons = "; ".join(law["reasons"])
        return (
            f"[bold yellow]OUTSIDE the range of the scaling law: no prediction of the loss.[/bold yellow]\n"
            f"  {escape(reasons)}"
        )
    verdict, (least, most) = law["verdict"], law["range"]["train_tokens"]

    def at(name: str) -> str:
        tokens = verdict[name]
        if tokens is None:
            return "never"
        beyond = "" if least <= tokens <= most else ", which is outside the range"
        return f"after about {rounded(tokens)} tokens{beyond}"

    lines = [
        "[bold green]INSIDE the range of the scaling law[/bold green] of plain copies. Differences of 0.02 nats decide"
        " the crossings.",
        f"  The dense model starts at {verdict['start']:.3f} nats. Copies pass it {at('break_even')}.",
        f"  Copies pass the dense model trained on as many tokens {at('beats_dense')}. Trained for the same money"
        f" ({rounded(law['same_cost']['tokens'])} tokens), it reaches {law['same_cost']['loss']:.3f} nats.",
        f"  A model trained from scratch passes copies {at('scratch_wins')}.",
    ]
    return "\n".join(lines)


def rounded(number: float) -> str:
    """Two digits of a count: `9.2 B`."""
    for unit, unit_size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= unit_size:
            return f"{float(f'{number / unit_size:.2g}'):g} {unit}"
    return f"{number:.0f}"


def _models(found: Mapping[str, Any]) -> Table:
    parameters, tokens = found["parameters"], found["dense_tokens"]
    finer = f", each 1/{found['granularity']} FFN" if found["granularity"] > 1 else ""
    shared = f", {found['shared_experts']} shared" if found["shared_experts"] else ""
    name = found["target"] or "no family of moetool"
    seen = f", trained on {rounded(tokens['tokens'])} tokens ({tokens['source']})" if tokens else ""
    run = f"{count(found['train_tokens'])} tokens, {found['steps']:,} steps of {found['global_batch_size']} x"
    rows = {
        "dense": f"{found['model']} ({found['family']}), {count(parameters['dense'])}{seen}",
        "Mixture of Experts": f"{name}, {found['num_experts']} experts{finer}, top-{found['top_k']}{shared}:"
        f" {count(parameters['total'])}, {count(parameters['active'])} active",
        "training": f"{run} {found['seq_len']} tokens",
    }
    if found["unfit"]:
        rows["cannot be upcycled"] = found["unfit"] + "; figures assume copies of its FFNs"
    return two_columns(rows)


def _ways(found: Mapping[str, Any]) -> Table:
    cluster = found["cluster"]
    title = (
        f"cost on {cluster['num_gpus']} x {escape(cluster['gpu'])} at {cluster['mfu']:.3g} of their peak"
        f" ({escape(cluster['speed'])}), computed"
    )
    priced = ["money"] if any(one["money"] is not None for one in found["ways"]) else []
    table = numbers(title, "way", "FLOP", "GPU-hours", "days", *priced, "nats", "GB/GPU")
    for one in found["ways"]:
        loss = f"{one['loss']:.3f}" if one["loss"] is not None else "no law" if one["way"] == "drop" else "outside"
        held = gigabytes(one["memory"]) if one["memory"] else "none fits"
        cells = [f"{one['operations']:.2e}", amount(one["gpu_hours"]), amount(one["days"])]
        cells += [amount(one["money"])] if priced else []
        style = "bold" if one["way"] == found["recommended"]["way"] else None
        table.add_row(escape(one["name"]), *cells, loss, held, style=style)
    return table


def _rules(found: Mapping[str, Any]) -> list[str]:
    rules = found["rules"]
    lines = []
    if rules["cost_ratio"] is not None:
        said = {
            "upcycle": "much less, so upcycle",
            "open": "neither much less nor twice as much, so it is open",
            "from scratch": "twice as much or more, so train from scratch",
        }[rules["skywork"]]
        alone = " alone" if found["law"]["inside"] else ""  # the law decides where it may be believed
        rule = "" if found["unfit"] else f". By Skywork-MoE's rule{alone} that is {said}"
        lines.append(f"the training costs {rules['cost_ratio']:.2g} times what the dense model's did{rule}")
    lines += [f"[dim]{escape(one['source'])}: {escape(one['says'])}[/dim]" for one in rules["findings"]]
    return lines


def _meshes(found: Mapping[str, Any]) -> list[RenderableType]:
    meshes, cluster = _planned(found), found["cluster"]
    of = " of the dense model" if found["dense_meshes"] else ""
    if not meshes["fitting"]:
        what = f"no mesh of {cluster['num_gpus']} x" if cluster["num_gpus"] > 1 else "the training does not fit on one"
        none = f"{what} {cluster['gpu']}" + " fits" * (cluster["num_gpus"] > 1)
        return [f"[bold yellow]{escape(none)}[/bold yellow]", *(f"  {escape(one)}" for one in meshes["advice"])]
    shown = meshes["fitting"][:SHOWN_MESHES]
    title = f"meshes{of} that fit, the recommended one first; computed, in GB (sent in a step)"
    table = numbers(title, "mesh", "micro", "GPU", "host", "sent", "network", "busy")
    for number, one in enumerate(shown):
        low, high = one["efficiency"]
        table.add_row(
            escape(one["mesh"].replace(" x ", " ")), str(one["micro_batch_size"]), gigabytes(one["memory"]["total"]),
            gigabytes(max(one["loading_per_machine"], one["saving_per_machine"])),
            gigabytes(one["sent_per_step"]), gigabytes(one["network_per_step"]), f"{low:.0%}-{high:.0%}",
            style=None if number else "bold",
        )  # fmt: skip
    more, unfit = len(meshes["fitting"]) - len(shown), len(meshes["others"])
    others = [f"{more} more fit"] * bool(more) + [f"{unfit} do{'es' * (unfit == 1)} not"] * bool(unfit)
    tail = f"; {', '.join(others)}" if others else ""
    return [
        table, "", f"[dim]{escape(meshes['recommended']['mesh'])}, because {escape(meshes['because'])}{tail}[/dim]"
    ]  # fmt: skip


def gigabytes(number: float) -> str:
    """Bytes in GB, with as many digits as matter: `47`, `0.3`."""
    return f"{number / 1e9:,.0f}" if number >= 1e10 or not number else f"{number / 1e9:.1f}"


def _rest(found: Mapping[str, Any]) -> dict[str, str]:
    dense = found["recommended"]["way"] == "dense"
    upcycling, disk = found["upcycling"], found["dense_disk"] if dense else found["disk"]
    memory = f", {size(upcycling['memory'])} of memory" if upcycling["memory"] else ""
    rows = {
        "upcycling": f"reads {size(upcycling['reads'])}, writes {size(upcycling['writes'])} in about"
        f" {duration(upcycling['seconds'])} on two cores and one disk{memory}",
        "disk": f"{size(disk['most'])} at most: step folders of {size(disk['step_folder'])}, of which three exist"
        f" briefly, and the result, {size(disk['checkpoint'])}",
        "saving": f"{duration(disk['seconds_to_save'])} for each step folder at"
        f" {size(found['assumptions']['disk_speed'])}/s, while training continues",
    }
    if dense:
        del rows["upcycling"]
    if probe := found["probe"]:
        where = f"{probe['processes']} x {probe['device']}" if probe["processes"] > 1 else probe["device"]
        rows["probe"] = (
            f"{probe['tokens_per_second']:,.0f} tokens/s here ({where}), measured in {probe['steps']} steps: all"
            f" {found['steps']:,} would take {duration(probe['predicted_seconds'])}, without validation and saving"
        )
    return rows


def duration(seconds: float) -> str:
    """Seconds for people: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 200_000:
        return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.0f} days"


def _rate(found: Mapping[str, Any]) -> list[str]:
    rate = found["learning_rate"]
    lines = [
        f"[bold]learning rate[/bold]: {escape(rate['between'])}, because {escape(rate['why'])}. The sources disagree:"
    ]
    return lines + [f"[dim]  {escape(one['source'])}: {escape(one['says'])}[/dim]" for one in rate["findings"]]


def _sweep(rows: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """The plans of a sweep side by side; below, why some are none."""
    table = narrow("sweep")
    for name in rows[0]["settings"]:  # a long one breaks where it has a dash
        table.add_column(name.replace("-", " "), min_width=max(map(len, name.split("-"))))
    for name in ("total", "active", "disk", "GPU-hours", "nats", "GB/GPU"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("mesh")
    lines = []
    for row in rows:
        cells = [written(value) if isinstance(value, int) else value for value in row["settings"].values()]
        if row["error"]:
            named = ", ".join(f"{name} {cell}" for name, cell in zip(row["settings"], cells, strict=True))
            lines.append(f"[dim]{escape(named)}: {escape(row['error'])}[/dim]")
            table.add_row(*map(escape, cells), *["-"] * 7, style="dim")
            continue
        loss = "outside" if row["loss"] is None else f"{row['loss']:.3f}"
        held, mesh = gigabytes(row["memory"]), (row["mesh"] or "none fits").replace(" x ", " ")
        sizes = [count(row["total"]), count(row["active"]), size(row["checkpoint"]), amount(row["gpu_hours"])]
        table.add_row(*map(escape, cells), *sizes, loss, held, escape(mesh))
    return [table, *lines]
