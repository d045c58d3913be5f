"""What the meshes of `moetool cpt` cost, side by side on processes of this machine, and which one to use.

    python -m tests.benchmarks.mesh [--processes 2,4] [--steps 6] [--rounds 3]
    python -m tests.benchmarks.mesh --recommend

Processes talk by gloo. A random Mixtral (4 layers, hidden 256, 8 experts top-2, vocabulary 2048) is
trained on 8 sequences of 256 tokens a step, of one micro-batch each. Every mesh runs in each round, in turn; of its
steps the median counts, then the median of the rounds. Bytes are counted in a step of its own (collectives.py) and held
against the closed form (moetool.cost.traffic). `--recommend` prints the table of docs/multi-gpu.md (mesh_choice.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moetool.mesh import Mesh
from tests import forked

MESHES = {
    2: [Mesh(replicas=2), Mesh(fsdp=2), Mesh(fsdp=2, ep=2)],
    4: [
        Mesh(replicas=4),
        Mesh(fsdp=4),
        Mesh(fsdp=4, ep=2),
        Mesh(fsdp=4, ep=4),
        Mesh(fsdp=2, replicas=2),
        Mesh(fsdp=2, ep=2, replicas=2),
        Mesh(fsdp=2, tp=2),
        Mesh(fsdp=2, tp=2, ep=4),
    ],
}
OPTIONS = {"seq_len": 256, "global_batch_size": 8, "micro_batch_size": 1}
COUNTED = ("sent", "payload", "calls")


def prepare(folder: Path, **changes: Any) -> None:
    """Write the model and a text."""
    from tests import tiny

    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    }
    sizes |= {"num_local_experts": 8, "vocab_size": 2048, "max_position_embeddings": 256, "initializer_range": 0.02}
    tiny.save_mixtral(folder / "model", **(sizes | changes))
    (folder / "text.txt").write_text("".join(f"{i} {i * i} {' '.join(tiny.TEXT)}\n" for i in range(3000)))


def measure(
    folder: Path, processes: int, meshes: Sequence[Mesh], steps: int, **options: Any
) -> list[list[dict[str, Any]]]:
    """Train on meshes one after the other in processes that are started once.

    Args:
        folder: where `prepare` wrote.
        processes: of each mesh.
        meshes: in their order.
        steps: that are timed.
        options: of the run, beside OPTIONS.

    Returns:
        What each process found, by mesh; see `train`.
    """
    cases = json.dumps([[vars(mesh), OPTIONS | options, steps] for mesh in meshes])
    forked.together(
        processes, folder, "tests.benchmarks.mesh:main", "--worker", cases, "--folder", folder,
        ACCELERATE_USE_CPU="true", MOETOOL_CACHE=str(folder / "cache"),
    )  # fmt: skip
    ranks = [json.loads((folder / f"found.{rank}").read_text()) for rank in range(processes)]
    return [list(each) for each in zip(*ranks, strict=True)]


def train(folder: Path, mesh: dict[str, Any], options: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train as `moetool cpt` does.

    Returns:
        `sent`, `payload` and `calls` of one step by kind; `seconds` of each of the others; `waits`, see `timed_waits`.
    """
    from moetool.train.build import build_run
    from moetool.train.config import TrainConfig
    from moetool.train.open import open_run
    from tests.benchmarks.collectives import Count

    paths: dict[str, Any] = {"model": folder / "model", "out": folder / "out"}
    paths |= {"train": {"text": str(folder / "text.txt")}, "document": "line", "val_fraction": 0}
    with open_run(TrainConfig(**paths, **mesh, **options, max_steps=1000)) as opened:
        assert opened.plan is not None
        run = build_run(opened.plan)
        for _ in range(2):  # DDP orders its buckets anew in the second
            run._update()
        with Count() as count:
            run._update()
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            run._update()
            seconds.append(time.perf_counter() - began)
        with timed_waits() as waits:
            for _ in range(steps if mesh["ep"] > 1 else 0):
                run._update()
    return {name: getattr(count, name) for name in COUNTED} | {"seconds": seconds, "waits": waits}


@contextmanager
def timed_waits() -> Iterator[dict[str, list[float]]]:
    """Time what each layer does before tokens can be sent to experts.

    Yields:
        Seconds: `sorting` of the tokens by expert, `skew`, the wait until all processes are there, and `exchange` of
        how many tokens each will get. On a CPU, gloo's collectives end when they return.
    """
    from transformers.distributed import expert_parallel as engine

    waits: dict[str, list[float]] = {"sorting": [], "skew": [], "exchange": []}
    exchange, dispatch = engine.all_to_all_single, engine.AllToAllEP._dispatch_tokens
    began = 0.0

    def timed_dispatch(*arguments: Any) -> Any:
        nonlocal began
        began = time.perf_counter()
        return dispatch(*arguments)

    def timed_exchange(*arguments: Any, group: Any) -> Any:
        import torch

        times = [began, time.perf_counter()]
        torch.distributed.barrier(group)
        times.append(time.perf_counter())
        result = exchange(*arguments, group=group)
        times.append(time.perf_counter())
        for name, start, end in zip(waits, times[:-1], times[1:], strict=True):
            waits[name].append(end - start)
        return result

    engine.all_to_all_single, engine.AllToAllEP._dispatch_tokens = timed_exchange, timed_dispatch
    try:
        yield waits
    finally:
        engine.all_to_all_single, engine.AllToAllEP._dispatch_tokens = exchange, dispatch


def worker(folder: Path, cases: str) -> None:
    """One process of `measure`."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    # A second process group over the same store would wait for ever.
    PartialState.destroy_process_group = lambda *_, **__: None
    found = []
    for case in json.loads(cases):
        found.append(train(folder, *case))
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
    (folder / f"found.{os.environ['RANK']}").write_text(json.dumps(found))


def differences(folder: Path, mesh: Mesh, ranks: Sequence[dict[str, Any]], **options: Any) -> list[str]:
    """Where what all processes of a mesh counted is not what the closed form gives; tokens by what they hand in.

    How many tokens go to another process depends on the text. Over all processes, what is handed in does not.
    """
    from moetool.checkpoint.model import skeleton
    from moetool.cost.memory import Training
    from moetool.cost.parameters import sizes_of
    from moetool.cost.traffic import step_traffic, totals

    options = OPTIONS | options
    training = Training(
        options["seq_len"],
        options["micro_batch_size"],
        options.get("precision", "fp32"),
        gradient_checkpointing=options.get("gradient_checkpointing", False),
    )
    micro_batches = options["global_batch_size"] // options["micro_batch_size"] // mesh.data_parallel
    traffic = step_traffic(sizes_of(skeleton(folder / "model")), mesh, training, micro_batches)
    wrong = []
    for what in COUNTED:
        counted: Counter[str] = Counter()
        for rank in ranks:
            counted.update(rank[what])
        closed = {kind: value * len(ranks) for kind, value in totals(traffic, what).items()}
        for kind in {*closed, *counted}:
            free = (what == "sent" and kind.startswith("tokens")) or (what == "calls" and mesh.whole)  # DDP's buckets
            if not free and abs(counted[kind] - closed.get(kind, 0)) > 0.5:
                wrong.append(f"{mesh}: {kind}: {what} {counted[kind]:.0f}, computed {closed.get(kind, 0):.0f}")
    return wrong


def compare(folder: Path, processes: int, steps: int, rounds: int) -> None:
    """Print time and bytes of all meshes of so many processes."""
    meshes = MESHES[processes]
    found = [measure(folder, processes, meshes, steps) for _ in range(rounds)]
    wrong: list[str] = []
    print(f"\n{processes} processes\n")
    print("| mesh | ms per step (rounds) | MB sent per process and step | by kind | collectives |")
    print("|---|---|---|---|---|")
    for number, mesh in enumerate(meshes):
        first = found[0][number]
        wrong += differences(folder, mesh, first)
        medians = [1000 * statistics.median(one[number][0]["seconds"]) for one in found]
        times = f"{statistics.median(medians):.0f} ({', '.join(f'{value:.0f}' for value in medians)})"
        sent = {kind: sum(rank["sent"][kind] for rank in first) / processes / 1e6 for kind in first[0]["sent"]}
        kinds = ", ".join(f"{kind} {value:.3g}" for kind, value in sent.items())
        calls = sum(first[0]["calls"].values())
        print(f"| {mesh} | {times} | {sum(sent.values()):.1f} | {kinds} | {calls} |")
    print("\n".join(wrong) or "\nThe closed form gives the same bytes.")
    print(
        "\n| mesh | ms per layer: sorting | skew | exchange of sizes | share of the step: sorting | skew | exchange |"
    )
    print("|---|---|---|---|---|---|---|")
    for number, mesh in enumerate(meshes):
        if mesh.ep > 1:
            print(f"| {mesh} | {_waits([rank for one in found for rank in one[number]], steps)} |")


def _waits(ranks: Sequence[dict[str, Any]], steps: int) -> str:
    medians, shares = [], []
    for name in ranks[0]["waits"]:
        all_waits = [wait for rank in ranks for wait in rank["waits"][name]]
        medians.append(f"{1000 * statistics.median(all_waits):.2f}")
        step = statistics.median(second for rank in ranks for second in rank["seconds"])
        a_step = len(ranks[0]["waits"][name]) / steps
        shares.append(f"{a_step * statistics.median(all_waits) / step:.1%}")
    return " | ".join(medians + shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="2,4")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--recommend", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.folder, given.worker)
        return
    if given.recommend:
        from tests.benchmarks.mesh_choice import table

        print(table())
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        prepare(Path(name))
        for processes in map(int, given.processes.split(",")):
            compare(Path(name), processes, given.steps, given.rounds)
    print(f"\n{os.cpu_count()} cores, torch {version('torch')}, transformers {version('transformers')}")


if __name__ == "__main__":
    main()
