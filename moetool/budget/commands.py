"""The commands that carry out a plan."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from pathlib import Path

from moetool.budget.meshes import Choice, Cluster
from moetool.budget.ways import Way
from moetool.mesh import Mesh
from moetool.option import flag
from moetool.recipe import UpcycleRecipe
from moetool.values import FLOAT_DTYPES

LR = "2e-4"  # Drop-Upcycling's; the advice on the rate says how it relates to the dense run's
NEW, OLD = "new=data/new.jsonl", "old=data/old.jsonl"  # text to learn, text like the model's own


def written(number: int) -> str:
    """A count as a user types it: `20B`."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size and number * 1000 % size == 0:
            return f"{number / size:.10g}{unit}"
    return str(number)


def mesh_options(mesh: Mesh) -> list[str]:
    """A mesh as options of `cpt`; replicas follow from the number of processes."""
    sizes = {"--fsdp": mesh.fsdp, "--ep": mesh.ep, "--tp": mesh.tp}
    return [word for flag, size in sizes.items() if size > 1 for word in (flag, str(size))]


def launcher(cluster: Cluster) -> list[str]:
    """The words that start a command on all GPUs; each machine runs it, with its own RANK and the first's HOST."""
    if cluster.num_gpus == 1:
        return ["moetool"]
    words = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(cluster.num_gpus)]
    if (machines := cluster.num_gpus // cluster.per_machine) > 1:
        words += ["--num_machines", str(machines), "--machine_rank", "RANK", "--main_process_ip", "HOST"]
        words += ["--main_process_port", "29500"]
    return [*words, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "moetool"]


def commands(
    way: Way,
    dense: str,
    recipe: UpcycleRecipe,
    clients: tuple[str, ...],
    cluster: Cluster,
    choice: Choice | None,
    train_tokens: int,
    seq_len: int,
    batch: int,
    spread: bool,
) -> list[str]:
    """The commands of a way, in their order; text is read from data/.

    Args:
        way: that is taken.
        dense: the dense model as it was typed.
        recipe: of the upcycling, as typed.
        clients: programs in which the result must run.
        cluster: the GPUs.
        choice: the mesh; None where none fits, and the training is left out.
        train_tokens: of the training.
        seq_len: tokens of a sequence.
        batch: sequences of a step.
        spread: whether the model must be spread over GPUs to be evaluated.
    """
    name = Path(dense.partition("@")[0]).name.lower() or "model"
    start = dense if way == "dense" else f"models/{name}-moe"
    run, lines = f"runs/{name}" if way == "dense" else f"runs/{name}-moe", []
    if way != "dense":
        made = ["moetool", "upcycle", dense, start, *recipe_options(recipe, way)]
        lines.append(made + [word for client in clients for word in ("--for", client)])
    if choice:
        lines.append([
            *launcher(cluster), "cpt", start, run, "--train", NEW, "--replay", OLD, "--replay-ratio", "0.3",
            "--max-tokens", written(train_tokens), "--seq-len", str(seq_len), "--global-batch-size", str(batch),
            "--micro-batch-size", str(choice.training.micro_batch_size), "--lr", LR, *mesh_options(choice.mesh),
            "--gradient-checkpointing",
        ])  # fmt: skip
        name = Path(run).name
        placed = ["--device-map", "auto"] if spread else []
        if way != "dense":
            analysis = ["moetool", "analyze-routing", start, "--compare", run, "--data", NEW, "--data", OLD]
            lines.append([*analysis, "--out", f"reports/{name}", *placed])
        models = [start, run] if way != "dense" else [run]
        scores = ["moetool", "eval", *models, "--baseline", dense, "--text", NEW, "--text", OLD]
        lines.append([*scores, "--out", f"results/{name}", *placed])
    return [shlex.join(line) for line in lines]


def recipe_options(recipe: UpcycleRecipe, way: Way) -> list[str]:
    """The options of `upcycle` that are not its defaults.

    Args:
        recipe: as typed.
        way: that is taken.
    """
    words, recipe = [], replace(recipe, method=way)
    for field in fields(UpcycleRecipe):
        value = getattr(recipe, field.name)
        if "option" in field.metadata and value != field.default:
            words += [flag(field.name), FLOAT_DTYPES.get(str(value), str(value))]
    return words
