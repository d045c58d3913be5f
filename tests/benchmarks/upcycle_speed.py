"""Time and memory of `moetool upcycle` against copying its output and against other converters, in one run.

    python -m tests.benchmarks.upcycle_speed [--rounds 5] [--folder DIR]
        [--mergekit PYTHON] [--authors PYTHON SCRIPT]
    python -m tests.benchmarks.upcycle_speed --scaling [--rounds 5] [--folder DIR]
    python -m tests.benchmarks.upcycle_speed --memory [--rounds 1] [--folder DIR]

A random Llama (hidden 1024, 24 layers, intermediate 4096, vocabulary 32000; 0.44 B parameters, bf16)
becomes 8 experts, with ratio 0.5 and 0; `cp` copies the result and fsyncs it. Rounds are interleaved,
medians reported; the start of each program's interpreter and its imports are timed apart. The source is
warm in the page cache and nothing is left to be written back when a program starts.

`--mergekit` runs mergekit-moe (8 copies, gate_mode random) and `--authors` the Drop-Upcycling paper's
conversions/drop_upcycling.py (ratio 0.5), each with the interpreter of an environment that has what it
needs; `--authors` may be given again with another environment. Neither fsyncs what it writes: the time that
this takes is measured apart. What each program wrote in the first round is loaded, and the units of the
dense model are searched in its experts.

`--scaling` upcycles (ratio 0.5) and verifies (full) with 1, 2 and 16 workers: processor seconds per GB written, what
the main process has of them (all else is done in workers, in parallel), and from these the seconds that 8 cores
would need, beside those measured. On a machine that others use, trust the processor seconds.

`--memory` shows the peak of resident memory at three shapes of source: that one, one of 112 narrow layers,
and one with a tensor of 2.21 GB. It needs 20 GB of disk, and the speed 12 GB.
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
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from moetool.checkpoint.reader import sha256_file
from tests.benchmarks.upcycle_folders import SIZES

FOLDERS = [sys.executable, "-m", "tests.benchmarks.upcycle_folders"]
IMPORTS = [sys.executable, "-c", "import moetool.cli, torch, moetool.surgery.apply, moetool.upcycle.plan"]
EXPERTS = 8
WORKERS = (1, 2, 16)


@dataclass(frozen=True, eq=False)
class Program:
    """What is measured: `command` writes `out`; `start` ends after the imports that it needs."""

    name: str
    command: list[str]
    start: list[str]
    out: Path
    versions: str


@dataclass(frozen=True)
class Run:
    """A process that has ended, with its workers.

    Attributes:
        seconds: by the clock.
        cpu: processor seconds of all.
        main: those of the process itself.
        peak: MB of memory of all, pages that they share counted once.
        anonymous: MB of it that are no files' pages.
    """

    seconds: float
    cpu: float
    main: float
    peak: float
    anonymous: float


def memory_of(process: int) -> tuple[int, int]:
    """Bytes of anonymous memory of a process and its children (shared pages once), and of files that it has mapped."""

    def sizes(number: str, file: str) -> dict[str, int]:
        try:
            lines = Path(f"/proc/{number}/{file}").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            return {}
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}

    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        children = []
    own = sizes(str(process), "status")
    # What a worker shares it shares with this process; shares of pages (Pss) jump while workers end.
    workers = sum(sizes(number, "smaps_rollup").get("Private_Dirty", 0) for number in children)
    return own.get("RssAnon", 0) + workers, own.get("RssFile", 0)


def measure(command: list[str]) -> Run:
    """Run a process to its end; its memory is looked at every 50 ms."""
    anonymous, peak, ended = 0, 0, threading.Event()

    def sample(process: int) -> None:
        nonlocal anonymous, peak
        while not ended.wait(0.25):
            found, files = memory_of(process)
            anonymous, peak = max(anonymous, found), max(peak, found + files)

    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        sampler = threading.Thread(target=sample, args=(process.pid,))
        sampler.start()
        # Not reaped before the sampler has ended, so that its number stays its own.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - began
        ended.set()
        sampler.join()
        times = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:15]
        own, own_system, workers, workers_system = (int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in times)
        process.wait()
        if process.returncode:
            log.seek(0)
            end = log.read()[-2000:].decode(errors="replace")
            raise SystemExit(f"{' '.join(command)} failed ({process.returncode}):\n{end}")
    main = own + own_system
    return Run(seconds, main + workers + workers_system, main, peak / 1e6, anonymous / 1e6)


def flush(folder: Path) -> float:
    """Seconds until the files of a folder are on the disk."""
    began = time.perf_counter()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - began


def copy(source: Path, target: Path) -> float:
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    flush(target)
    return time.perf_counter() - began


def settle(source: Path) -> None:
    """The source is in the page cache, and nobody else's pages are waiting for the disk."""
    os.sync()
    for path in source.iterdir():
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def moetool(dense: Path, out: Path, ratio: str) -> Program:
    options = ["--drop-ratio", ratio, "--num-experts", str(EXPERTS), "--verify", "none", "--quiet"]
    command = [sys.executable, "-m", "moetool", "upcycle", str(dense), str(out), *options]
    return Program(f"moetool, ratio {ratio}", command, IMPORTS, out, versions(sys.executable, "moetool"))


def mergekit(python: str, dense: Path, folder: Path) -> Program:
    config, out = folder / "mergekit.yaml", folder / "mergekit"
    experts = f"  - source_model: {dense}\n" * EXPERTS
    config.write_text(f"base_model: {dense}\ngate_mode: random\ndtype: bfloat16\nexperts:\n{experts}")
    command = [python, "-m", "mergekit.scripts.moe", str(config), str(out), "--quiet"]
    start = [python, "-c", "import mergekit.scripts.moe"]
    return Program("mergekit-moe, copies", command, start, out, versions(python, "mergekit"))


def authors(python: str, script: str, dense: Path, folder: Path, number: int) -> Program:
    target, out = folder / f"authors-{number}-config", folder / f"authors-{number}"
    target.mkdir()
    given = json.loads((dense / "config.json").read_text())
    # Only what releases 4 and 5 of transformers read alike; the rest is their default.
    config = {key: given[key] for key in SIZES["small"]} | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "rms_norm_eps": given["rms_norm_eps"],
        "rope_theta": 10000.0,
        "max_position_embeddings": given["max_position_embeddings"],
        "torch_dtype": "bfloat16",
    }
    (target / "config.json").write_text(json.dumps(config))
    options = {
        "source_model_path": str(dense),
        "target_config_path": str(target),
        "output_path": str(out),
        "num_experts": str(EXPERTS),
        "num_layers": str(given["num_hidden_layers"]),
        "ffn_init_ratio": "0.5",
        "init_method": "torch_normal_002",
    }
    command = [python, script, *(part for key, value in options.items() for part in (f"--{key}", value))]
    # The script's own imports, and the two classes that transformers imports on their first use.
    imports = f"import runpy; runpy.run_path({script!r}, run_name='imports')"
    start = [python, "-c", f"{imports}; from transformers import LlamaForCausalLM, MixtralForCausalLM"]
    found = versions(python)
    # Which release of transformers it runs under decides whether it works.
    return Program(f"authors' script, ratio 0.5, {found.split(', ')[-1]}", command, start, out, found)


def versions(python: str, *packages: str) -> str:
    """As "torch 2.13.0, transformers 5.23.0" of an environment."""
    code = "import sys, importlib.metadata as m; print(', '.join(f'{p} {m.version(p)}' for p in sys.argv[1:]))"
    command = [python, "-c", code, *packages, "torch", "transformers"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def machine(folder: Path) -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = names[0].split(":")[1].strip() if names else "processor unknown"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    free = shutil.disk_usage(folder).free / 1e9
    python = ".".join(map(str, sys.version_info[:3]))
    return (
        f"{os.cpu_count()} cores of {model}, {memory:.0f} GiB, {free:.0f} GB of disk free, Linux {os.uname().release}\n"
        f"Python {python}, torch {version('torch')}, transformers {version('transformers')}, "
        f"safetensors {version('safetensors')}"
    )


def source(folder: Path, size: str) -> Path:
    dense = folder / f"dense-{size}"
    # In a process of its own: a child's peak memory counts what it had of its parent's.
    subprocess.run([*FOLDERS, "write", dense, size], check=True)
    return dense


def size_of(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e9


def what_came(out: Path, dense: Path) -> str:
    ran = subprocess.run([*FOLDERS, "check", out, dense], capture_output=True, text=True)
    if ran.returncode:
        return f"does not load: {ran.stderr.strip().splitlines()[-1]}"
    found = json.loads(ran.stdout)
    keys = f"{found['missing']} missing, {found['unexpected']} unexpected keys"
    state = "experts RANDOM: no unit of the dense model in one of them" if not found["units"] else "experts found"
    return f"{state}; units kept {found['units']:.4f}; {keys}"


def speed(folder: Path, rounds: int, mergekit_python: str | None, scripts: list[list[str]]) -> None:
    dense = source(folder, "small")
    programs = [moetool(dense, folder / "half", "0.5"), moetool(dense, folder / "copies", "0")]
    if mergekit_python:
        programs.append(mergekit(mergekit_python, dense, folder))
    programs += [authors(python, script, dense, folder, i) for i, (python, script) in enumerate(scripts)]
    starts: dict[Program, list[float]] = defaultdict(list)
    runs: dict[Program, list[Run]] = defaultdict(list)
    flushes: dict[Program, list[float]] = defaultdict(list)
    copies: list[float] = []
    came: dict[Program, str] = {}
    gigabytes: dict[Program, float] = {}
    for number in range(rounds):
        for program in programs:
            settle(dense)
            starts[program].append(measure(program.start).seconds)
            runs[program].append(measure(program.command))
            flushes[program].append(flush(program.out))
            print(f"round {number + 1}: {program.name} {runs[program][-1].seconds:.2f} s", file=sys.stderr)
            gigabytes[program] = size_of(program.out)
            if not number:
                came[program] = what_came(program.out, dense)
            if program is programs[1]:
                settle(program.out)
                copies.append(copy(program.out, folder / "copied"))
                shutil.rmtree(folder / "copied")
            shutil.rmtree(program.out)
    cp = statistics.median(copies)
    print(f"\nsource {size_of(dense):.2f} GB, warm; {EXPERTS} experts top-2; medians of {rounds}; MB = 10^6 bytes\n")
    print("| | GB | seconds | start and imports | net | net / cp | fsync after | peak MB | of it anonymous |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(f"| cp and fsync | {gigabytes[programs[1]]:.2f} | {cp:.2f} | | {cp:.2f} | 1 | | | |")
    for program in programs:
        seconds = statistics.median(run.seconds for run in runs[program])
        start, after = statistics.median(starts[program]), statistics.median(flushes[program])
        print(
            f"| {program.name} | {gigabytes[program]:.2f} | {seconds:.2f} | {start:.2f} | {seconds - start:.2f}"
            f" | {(seconds - start) / cp:.2f} | {after:.2f} | {max(run.peak for run in runs[program]):.0f}"
            f" | {max(run.anonymous for run in runs[program]):.0f} |"
        )
    print("\nall seconds, by round")
    print(f"cp and fsync: {', '.join(f'{value:.2f}' for value in copies)}")
    for program in programs:
        print(f"{program.name}: {', '.join(f'{run.seconds:.2f}' for run in runs[program])}")
    print("\nwhat came of it, loaded by the transformers named above")
    for program in programs:
        print(f"{program.name} ({program.versions}): {came[program]}")


def scaling(folder: Path, rounds: int) -> None:
    dense, out = source(folder, "small"), folder / "made"
    starts: list[Run] = []
    runs: dict[tuple[str, int], list[Run]] = defaultdict(list)
    copies: list[float] = []
    for number in range(rounds):
        for workers in WORKERS:
            settle(dense)
            starts.append(measure(IMPORTS))
            options = ["--drop-ratio", "0.5", "--verify", "none", "--quiet", "--workers", str(workers)]
            command = [sys.executable, "-m", "moetool", "upcycle", str(dense), str(out), *options]
            runs["upcycle, ratio 0.5", workers].append(measure(command))
            gigabytes = size_of(out)
            settle(out)
            command = [sys.executable, "-m", "moetool", "verify", str(out), "--quiet", "--workers", str(workers)]
            runs["verify, full", workers].append(measure(command))
            if workers == WORKERS[0]:
                copies.append(copy(out, folder / "copied"))
                shutil.rmtree(folder / "copied")
            shutil.rmtree(out)
            print(f"round {number + 1}: {workers} workers", file=sys.stderr)
    began = time.perf_counter()
    sha256_file(dense / "model.safetensors")
    hashed = time.perf_counter() - began
    cp, start = statistics.median(copies), statistics.median(run.seconds for run in starts)
    start_cpu = statistics.median(run.cpu for run in starts)
    print(f"\nmedians of {rounds}, net of interpreter and imports ({start:.2f} s); {gigabytes:.2f} GB written")
    print(f"cp and fsync: {cp:.2f} s; SHA-256 of the source, which one process makes: {hashed:.2f} s\n")
    print(
        "| | workers | seconds | / cp | processor s per GB | of it main process | 8 cores: seconds | / cp | peak MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for (name, workers), some in runs.items():
        seconds = statistics.median(run.seconds for run in some) - start
        cpu = statistics.median(run.cpu for run in some) - start_cpu
        main = statistics.median(run.main for run in some) - start_cpu
        eight = max(hashed, main + (cpu - main) / 8)
        print(
            f"| {name} | {workers} | {seconds:.2f} | {seconds / cp:.2f} | {cpu / gigabytes:.2f} | {main / cpu:.1%}"
            f" | {eight:.2f} | {eight / cp:.2f} | {max(run.peak for run in some):.0f} |"
        )
    print("\nall seconds, by round")
    print(f"cp and fsync: {', '.join(f'{value:.2f}' for value in copies)}")
    for (name, workers), some in runs.items():
        print(f"{name}, {workers}: {', '.join(f'{run.seconds:.2f}' for run in some)}")


def memory(folder: Path, rounds: int) -> None:
    start = measure(IMPORTS)
    print(f"peaks of {rounds} runs each, medians of their seconds, {os.cpu_count()} workers, in MB = 10^6 bytes\n")
    print("| source GB | layers | largest tensor GB | ratio | written GB | seconds | peak MB | of it anonymous |")
    print("|---|---|---|---|---|---|---|---|")
    print(f"| imports only | | | | | {start.seconds:.2f} | {start.peak:.0f} | {start.anonymous:.0f} |")
    for size, config in SIZES.items():
        dense = source(folder, size)
        largest = 2 * int(config["vocab_size"]) * int(config["hidden_size"]) / 1e9
        for ratio in ("0.5", "0"):
            program, runs = moetool(dense, folder / "made", ratio), []
            for _ in range(rounds):
                settle(dense)
                runs.append(measure(program.command))
                written = size_of(program.out)
                shutil.rmtree(program.out)
            print(
                f"| {size_of(dense):.2f} | {config['num_hidden_layers']} | {largest:.2f} | {ratio} | {written:.2f}"
                f" | {statistics.median(run.seconds for run in runs):.2f} | {max(run.peak for run in runs):.0f}"
                f" | {max(run.anonymous for run in runs):.0f} |",
                flush=True,
            )
        shutil.rmtree(dense)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--mergekit", metavar="PYTHON", help="of an environment with mergekit")
    parser.add_argument("--authors", nargs=2, action="append", default=[], metavar=("PYTHON", "SCRIPT"))
    parser.add_argument("--scaling", action="store_true", help="1, 2 and 16 workers instead")
    parser.add_argument("--memory", action="store_true", help="peak memory at three shapes of source instead")
    given = parser.parse_args()
    if (given.memory or given.scaling) and (given.mergekit or given.authors):
        parser.error("--memory and --scaling measure moetool only")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        print(machine(folder), flush=True)
        if given.scaling:
            scaling(folder, given.rounds)
        elif given.memory:
            memory(folder, given.rounds)
        else:
            speed(folder, given.rounds, given.mergekit, given.authors)


if __name__ == "__main__":
    main()
