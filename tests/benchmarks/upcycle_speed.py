"""Time and memory of `moetool upcycle` against copying its output, in one run.

    python -m tests.benchmarks.upcycle_speed [--rounds 5] [--folder DIR]

A random Llama (hidden 1024, 24 layers, intermediate 4096, vocabulary 32000; 0.44 B parameters, bf16)
becomes 8 experts, with ratio 0.5 and 0; `cp` copies the result and fsyncs it. Rounds are interleaved,
medians reported; the interpreter's start and imports are timed apart.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

SAVE = "from tests.benchmarks.upcycle_speed import save_source as save"


def save_source(folder: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident megabytes of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def copy(source: Path, target: Path) -> float:
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        dense, made, copied = folder / "dense", folder / "moe", folder / "copied"
        # In a process of its own: a child's peak memory counts what it had of its parent's.
        subprocess.run([sys.executable, "-c", f"{SAVE}; save({str(dense)!r})"], check=True)
        imports = "import moetool.cli, torch, moetool.upcycle.run, moetool.upcycle.verify"
        seconds: dict[str, list[float]] = {"imports": [], "cp": [], "ratio 0.5": [], "ratio 0": []}
        peak = {"ratio 0.5": 0.0, "ratio 0": 0.0}
        for _ in range(arguments.rounds):
            seconds["imports"].append(timed([sys.executable, "-c", imports])[0])
            for ratio in ("0.5", "0"):
                shutil.rmtree(made, ignore_errors=True)
                options = ["--drop-ratio", ratio, "--verify", "none", "--quiet"]
                took, memory = timed([sys.executable, "-m", "moetool", "upcycle", str(dense), str(made), *options])
                seconds[f"ratio {ratio}"].append(took)
                peak[f"ratio {ratio}"] = max(peak[f"ratio {ratio}"], memory)
            shutil.rmtree(copied, ignore_errors=True)
            seconds["cp"].append(copy(made, copied))
        size = sum(p.stat().st_size for p in made.iterdir())
        median = {name: statistics.median(values) for name, values in seconds.items()}
        print(f"{size / 1e9:.2f} GB, {os.cpu_count()} cores, torch {version('torch')}, medians of {arguments.rounds}")
        print(f"interpreter and imports {median['imports']:.2f} s; cp with fsync {median['cp']:.2f} s")
        for name in ("ratio 0.5", "ratio 0"):
            net = median[name] - median["imports"]
            print(
                f"{name}: {median[name]:.2f} s, less imports {net:.2f} s = {net / median['cp']:.2f} x cp;"
                f" peak {peak[name]:.0f} MB"
            )


if __name__ == "__main__":
    main()
