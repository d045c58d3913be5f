"""`moetool quickstart`: the whole journey on text that is on every machine."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moetool.commands.console import Console, count, escape
from moetool.commands.options import Output, write_options
from moetool.errors import ConfigError
from moetool.option import option

if TYPE_CHECKING:
    from moetool.checkpoint.folder import FolderLock
    from moetool.quickstart import Step


@dataclass(frozen=True)
class QuickstartOptions:
    """The options of `moetool quickstart`."""

    folder: Path = option("Output folder.", Path("quickstart"), positional=True, metavar="DIR")
    seed: int = option("Random seed for the models, the data order and the redrawn units.", 0, min=0)


def quickstart(context: typer.Context, options: QuickstartOptions, output: Output) -> dict[str, Any]:
    """Run the whole journey in a few minutes: dense model, upcycling, continual pretraining, routing, evaluation.

    Needs no network and no GPU: the text is the documentation and the standard library of the
    installed Python. Each step prints the moetool command it runs. The same command continues after an
    interruption.
    """
    from moetool import quickstart as domain

    folder, seed = options.folder, options.seed
    console = Console(context, output.json, output.quiet)
    began = time.perf_counter()
    context.with_resource(_claimed(folder))
    root = context.find_root().command
    number = 1

    console.say("[bold]1. Collect a corpus, train a tokenizer, initialise a random Llama[/bold]")
    with console.progress() as progress:
        made = domain.prepare(folder, seed, progress)
    write_options(context, folder)
    sizes = made["corpus"]
    console.say(
        f"   prose: {count(sizes['prose-train']['characters'])} characters of documentation,"
        f" code: {count(sizes['code-train']['characters'])} characters of the standard library;"
        f" {count(made['parameters'])} parameters"
    )

    def tell(step: Step) -> None:
        nonlocal number
        number += 1
        console.say(f"\n[bold]{number}. {escape(step.title)}[/bold]")
        console.say(f"[dim]   moetool {escape(shlex.join(step.arguments))}[/dim]", whole=True)

    def run(arguments: list[str]) -> dict[str, Any]:
        stepped = time.perf_counter()
        quietly = ["--quiet"] if output.quiet else []
        result = root.main([*arguments, *quietly], standalone_mode=False, obj={"step": True})
        if not isinstance(result, dict):
            raise KeyboardInterrupt  # Typer turns Ctrl-C within the step into an exit code
        console.say(f"   {_outcome(arguments[0], result)} [dim]({time.perf_counter() - stepped:.0f} s)[/dim]")
        return result

    document = domain.journey(folder, seed, run, tell)
    document["seconds"] = round(time.perf_counter() - began, 1)
    console.result(document, *_closing(document))
    return document


def _claimed(folder: Path) -> FolderLock:
    """The folder, locked; refused if it holds something else."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder for the quickstart")
    ours = {"corpus", "init", "tasks", "moetool.yaml", "dense", "moe", "moe-copy", "cpt-replay", "cpt-no-replay"}
    ours |= {"cpt-copy", "routing", "eval"}
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in ours) if folder.exists() else []
    if foreign:
        raise ConfigError(
            f"{folder} holds other files ({', '.join(foreign[:3])}); give a new folder for the quickstart"
        )
    from moetool.checkpoint.folder import FolderLock

    return FolderLock(folder)


def _outcome(command: str, result: dict[str, Any]) -> str:
    """The outcome of a step, in one line."""
    if command == "upcycle":
        parameters, proof = result["parameters"], result.get("proof", {})
        return (
            f"{count(parameters['dense'])} dense -> {count(parameters['total'])} parameters,"
            f" {count(parameters['active'])} active; {proof.get('tensors')} tensors verified"
        )
    if command == "cpt":
        losses = ", ".join(f"{name} {v['before']:.3f} -> {v['after']:.3f}" for name, v in result["val"].items())
        again = "already finished; " if result.get("already_finished") else ""
        return f"{again}validation loss: {escape(losses)}; {count(result['tokens'])} tokens"
    if command == "analyze-routing":
        return f"before: {escape(result['verdict']['title'])}"
    return f"{len(result['results'])} checkpoints scored"


def _closing(document: dict[str, Any]) -> list[Any]:
    from rich.table import Table

    losses = document["losses"]
    rows = {
        "random": "random initialisation",
        "dense": "dense, trained on prose",
        "moe-copy": "MoE, ratio 0, before training",
        "moe": "MoE, ratio 0.5, before training",
        "cpt-no-replay": "MoE, trained on code, no replay",
        "cpt-replay": "MoE, trained on code, 30 % replay",
    }
    table = Table(title="\nValidation loss, nats per token", title_justify="left", title_style="bold")
    table.add_column("checkpoint", overflow="fold")
    for name in ("prose", "code", "forgetting", "accuracy"):
        table.add_column(name, justify="right", no_wrap=True)
    chance = f"{document['ln_vocabulary']:.3f}"
    table.add_row("chance: a uniform guess", chance, chance, "", "25%")
    for name, label in rows.items():
        forgotten = document["forgetting"].get(name)
        accuracy = document["accuracy"].get(name)
        table.add_row(
            label,
            f"{losses[name]['prose']:.3f}",
            f"{losses[name]['code']:.3f}",
            f"{round(forgotten, 3) + 0.0:+.3f}" if forgotten is not None else "",  # + 0.0: not -0.000
            f"{accuracy['value']:.0%} ± {accuracy['stderr']:.0%}" if accuracy else "",
        )
    table.caption = (
        "Forgetting: loss on prose minus the dense model's; before training it is what upcycling itself costs. "
        "Accuracy: finding which of four passages has its words in order."
        " The loss of a uniform guess is ln(vocabulary)."
    )
    table.caption_justify = "left"
    routing = document["routing"]
    routers = Table(
        title="\nRouting: mri, the largest share of tokens that one expert gets; mean / worst layer",
        title_justify="left",
        title_style="bold",
        caption=f"Balanced is {routing['balanced']:.2f}.",
        caption_justify="left",
    )
    routers.add_column("domain", overflow="fold")
    for name in ("upcycled", "after training", "same experts chosen"):
        routers.add_column(name, justify="right", overflow="fold")
    for name, domain in routing["domains"].items():
        shares = (f"{domain[when]['mean']:.2f} / {domain[when]['max']:.2f}" for when in ("before", "after"))
        routers.add_row(name, *shares, f"{domain['saturation']:.0%}")
    paths = [f"routing report           {document['report']}", f"evaluation               {document['eval']}"]
    paths += [f"{'checkpoint ' + name:24} {path}" for name, path in document["checkpoints"].items()]
    told = "\n".join(escape(path) for path in paths)
    return [table, routers, f"\n{told}\n\nDone in {document['seconds']:.0f} s."]
