"""Saving a step of a sharded model in several processes: time, the stop of training, host memory, bytes sent.

    python -m tests.benchmarks.saving [--processes 1 2 4] [--rounds 3] [--folder DIR]

A random Mixtral of about 200 M parameters in fp32, sharded by FSDP2 over CPU processes, with AdamW's moments; bf16 on
disk, so that a step folder takes 14 bytes per parameter. Two sides, in turn, in the same processes:

* shares: what `moetool cpt` does. Every process copies its share, and writes its files.
* gathered: every tensor is put together in all processes and kept by the first one, which writes all with safetensors.

Memory is the peak of a process while it saves (VmHWM, reset before) above what it held before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = ("shares", "gathered")


def resident(what: str) -> int:
    """A line of this process's memory in /proc, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def sharded(num_processes: int) -> tuple[Any, dict[str, Any], Any]:
    """A model of which each process holds a share, its weights by name, and its optimizer after one update."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM, MixtralConfig

    from moetool.train.config import TrainConfig
    from moetool.train.optimizer import adamw

    config = MixtralConfig(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if num_processes > 1:
        fully_shard(model)
    model.to_empty(device="cpu")
    weights = dict(model.named_parameters())
    optimizer = adamw(weights.values(), TrainConfig(model=Path("m"), out=Path("o"), train={}))
    with torch.no_grad():
        for weight in weights.values():
            weight.normal_(std=0.02)
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    return model, weights, optimizer


def worker(folder: Path, rounds: int) -> None:
    """One process: save in turn, and print what each save took as JSON."""
    import torch.distributed as dist
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor

    from moetool.train import resume, state
    from moetool.train.export import lay_out
    from moetool.train.ranks import new_ranks
    from moetool.train.saving import Saver

    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    ranks = new_ranks()
    model, weights, optimizer = sharded(ranks.size)
    layout = lay_out(model, "bfloat16")
    moments = dict(resume.moments(weights, optimizer))
    units = [*layout.units, *((name,) for name in moments)]

    def shares(out: Path, step: int) -> tuple[float, int]:
        def write(put: Any) -> None:
            state.save_step(state.step_folder(out, step), put, 1, ranks)

        with Saver(1, ranks) as saver:
            began = time.perf_counter()
            saver.save(weights | moments, units, lambda whole: layout.contents(whole, step), write)
            stop = time.perf_counter() - began
            saver.wait()
            assert saver.assignment is not None
            return stop, saver.assignment.sent(ranks.rank)

    def gathered(out: Path, step: int) -> tuple[float, int]:
        began = time.perf_counter()
        kept: dict[str, Any] = {}
        sent = 0
        for name, tensor in (weights | moments).items():
            whole = tensor.detach()
            if isinstance(whole, DTensor):
                sent += whole.to_local().nbytes * (ranks.size - 1)  # every process gets it
                whole = whole.full_tensor()
            if ranks.is_main:
                kept[name] = whole.clone()
        stop = time.perf_counter() - began
        if ranks.is_main:
            made: dict[str, dict[str, Any]] = {"model": {}, "master": {}, "optimizer": {}}
            for kind, name, tensor in layout.contents(kept, step):
                made[kind][name] = tensor.contiguous()
            out.mkdir(exist_ok=True)
            for kind, tensors in made.items():
                save_file(tensors, out / f"{kind}.safetensors")
                with (out / f"{kind}.safetensors").open("rb") as file:
                    os.fsync(file.fileno())
        ranks.gather(None)
        return stop, sent

    for number in range(rounds):
        for side, save in (("shares", shares), ("gathered", gathered)):
            out = folder / side
            out.mkdir(exist_ok=True)
            ranks.gather(None)
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            began = time.perf_counter()
            stop, sent = save(out, number + 1)
            row = {"side": side, "rank": ranks.rank, "stop": stop, "seconds": time.perf_counter() - began, "sent": sent}
            row |= {"memory": resident("VmHWM") - before, "parameters": sum(w.numel() for w in weights.values())}
            print(json.dumps(row), flush=True)
            ranks.gather(None)
            if ranks.is_main:
                shutil.rmtree(out)
    if ranks.size > 1:
        dist.destroy_process_group()


def main() -> None:
    """Run every number of processes, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.folder, options.rounds)
        return
    print("| processes | side | s | stop of training, s | memory above, MB: first, others | sent by each, MB |")
    for processes in options.processes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            command = [sys.executable, *(launcher if processes > 1 else []), "-m", "tests.benchmarks.saving"]
            command += ["--worker", "--folder", folder, "--rounds", str(options.rounds)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        for side in SIDES:
            own = [row for row in rows if row["side"] == side]
            seconds, stop = (
                statistics.median(row[name] for row in own if row["rank"] == 0) for name in ("seconds", "stop")
            )
            memory = [max(row["memory"] for row in own if row["rank"] == rank) / 1e6 for rank in range(processes)]
            sent = max(row["sent"] for row in own) / 1e6
            others = f", {max(memory[1:]):.0f}" if processes > 1 else ""
            print(f"| {processes} | {side} | {seconds:.1f} | {stop:.2f} | {memory[0]:.0f}{others} | {sent:.0f} |")
    print(f"{rows[0]['parameters'] / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
