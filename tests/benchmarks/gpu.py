"""Everything about one GPU in one program, without a network.

    python -m tests.benchmarks.gpu [--out FILE.json] [--only PART,...] [--tiny] [--budget SECONDS] [--folder DIR]

Makes two models by `moetool upcycle` (Qwen3-0.6B's geometry as 8 experts, two layers of Mixtral 8x7B's), then, part
by part: throughput of `moetool cpt`, the loop that a user would write, checks (bf16, --compile and --liger against
fp32, resuming after a kill), one profiled step, analyze-routing against a bare forward, the quickstart in small, every
option and command with code of its own for a GPU once on a small model, and cpt's options for speed and memory. Each
run is a process of its own with a timeout. What fails is told, and the rest goes on; what would begin after the budget
is skipped, so a second call may do it (--only once,options). The JSON is written after every part. Exit code 1: a check
did not hold, or something failed.

--tiny: everything in small, so that the program itself can be tried on a CPU. --folder keeps the models for the
next run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu_models import LR, flops_per_token, geometry

ROOT = Path(__file__).parents[2]
MODELS = {"qwen3": "0.6B x 8", "mistral": "Mixtral, 2 layers"}
SEQ_LEN, BATCH, STEPS, STEP_SECONDS = 4096, 8, 13, 18
# Largest differences from fp32 that pass: of a loss, of a router's gradient (norm of the difference over the norm).
# On a CPU bf16 gives 0.0001 and 0.087: a token near a tie goes to another expert.
LOSS_BOUND, GRADIENT_BOUND = 0.01, 0.15
# Share of the routes that may differ from a bare forward in the same precision: ties break either way.
ROUTES_BOUND = 0.005
CHECKPOINTING = "--gradient-checkpointing"
Rows = list[dict[str, Any]]


class OutOfTimeError(Exception):
    """The budget is used up."""


class FailedError(Exception):
    """A process failed; the end of what it wrote."""


class Bench:
    """Where a run of this program stands.

    Attributes:
        folder: models, text and runs.
        tiny: everything in small.
        name: of the GPU, or CPU.
        gpu: whether there is one.
        flops: dense bf16 operations a second of the card, as moetool counts them; None if it does not know.
        help: of `moetool cpt`, to know which options there are.
    """

    def __init__(self, folder: Path, tiny: bool, budget: float) -> None:
        self.folder, self.tiny = folder, tiny
        self.threads: str | None = None
        self._end = time.monotonic() + budget
        self.seq_len, self.steps = (64, 6) if tiny else (SEQ_LEN, STEPS)
        self.text, self.tokenizer = folder / "text.jsonl", folder / "tokenizer"
        # Asked in a process of its own: this one takes none of the GPU's memory.
        found = attempt(self, "machine", lambda: self.job("machine", {}))
        self.name, self.flops = str(found.get("device", "unknown")), found.get("flops")
        self.gpu = self.name not in ("CPU", "unknown")

    def left(self) -> float:
        return self._end - time.monotonic()

    def run(self, *arguments: object, timeout: float = 120) -> str:
        """Run Python with these arguments; returns its stdout.

        Raises:
            FailedError: it failed, or took too long.
            OutOfTimeError: it would not even begin in time.
        """
        if self.left() < 3:
            raise OutOfTimeError
        seconds = min(timeout, self.left())
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            command = [sys.executable, *map(str, arguments)]
            process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment(), stdout=out, stderr=err, start_new_session=True
            )
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:  # with its children, and also after Ctrl-C
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            out.seek(0)
            err.seek(0)
            stdout, stderr = out.read(), err.read()
        if code is None and self.left() < 3:
            raise OutOfTimeError
        if code:
            tail = [line for line in (stdout + "\n" + stderr).splitlines() if line.strip()][-6:]
            raise FailedError("\n".join([f"exit code {code}: {' '.join(map(str, arguments))[:300]}", *tail]))
        if code is None:
            raise FailedError(f"no end after {seconds:.0f} s: {' '.join(map(str, arguments))[:300]}")
        return stdout

    def job(self, name: str, arguments: dict[str, Any], timeout: float = 120) -> dict[str, Any]:
        """Run one of `gpu_models`' jobs; returns its document."""
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()}
        stdout = self.run("-m", "tests.benchmarks.gpu_models", name, json.dumps(plain), timeout=timeout)
        return dict(json.loads(stdout.splitlines()[-1]))

    def moetool(self, *arguments: object, timeout: float = 120) -> dict[str, Any]:
        """Run a moetool command; returns what its --json prints."""
        return dict(json.loads(self.run("-m", "moetool", *arguments, "--json", "--quiet", timeout=timeout)))

    def cpt(self, model: Path, out: Path, settings: dict[str, Any], *options: object, **more: Any) -> dict[str, Any]:
        """Run `moetool cpt` under `gpu_watch`; returns its report, also of one that killed itself as told."""
        report, began = out.with_suffix(".json"), time.time()
        report.unlink(missing_ok=True)
        command = ["cpt", model, out, "--train", f"text={self.text}", "--val-fraction", 0, "--lr", LR, "--quiet"]
        try:
            self.run("-m", "tests.benchmarks.gpu_watch", report, json.dumps(settings), *command, *options, **more)
        except FailedError as error:
            if "kill" not in settings or f"exit code {-signal.SIGKILL}:" not in str(error):
                raise
        seen: dict[str, Any] = json.loads(report.read_text())
        return seen | {"start_seconds": seen["first_step"] - began, "seconds": time.time() - began}

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        ours = {"PYTHONPATH": path, "MOETOOL_CACHE": str(self.folder / "cache"), "COLUMNS": "1000"}
        if self.threads:
            ours["OMP_NUM_THREADS"] = self.threads
        return os.environ | ours | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}


def attempt(bench: Bench, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """One row of a part, whatever happens: what `work` returns, or its error, or that it was skipped."""
    began = time.perf_counter()
    try:
        row = {"name": name, "status": "ok", **work()}
    except OutOfTimeError:
        row = {"name": name, "status": "skipped: out of time"}
    except Exception as error:
        row = {"name": name, "status": "failed", "error": f"{type(error).__name__}: {error}"[-1500:]}
        print(f"  {name}: {row['error']}", flush=True)
    row["wall_seconds"] = time.perf_counter() - began
    told = {key: value for key, value in row.items() if isinstance(value, int | float | str) and key != "error"}
    print("  " + "  ".join(f"{key} {number(value)}" for key, value in told.items()), flush=True)
    return row


def number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# The parts.


def models(bench: Bench) -> Rows:
    """The text, the two dense parents, what is upcycled from them, and the small model of the checks."""
    folder = bench.folder

    def once(what: str, out: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Not again what an earlier run left in the folder."""

        def work() -> dict[str, Any]:
            done = out.with_name(f"{out.name}.done")
            if done.exists():
                return {"made": "before"}
            result = make()
            done.touch()
            return result

        return attempt(bench, what, work)

    def upcycle(family: str) -> dict[str, Any]:
        source, out = folder / f"{family}-dense", folder / family
        bench.moetool("upcycle", source, out, "--num-experts", 8, "--top-k", 2, "--overwrite", timeout=180)
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        shutil.rmtree(source)
        return {"gb": size / 1e9}

    def both(family: str) -> Rows:
        title, source = MODELS[family], folder / f"{family}-dense"
        return [
            once(f"{title}: dense", source, lambda: bench.job("dense", {"folder": source, "family": family, **common})),
            once(f"{title}: upcycle", folder / family, lambda: upcycle(family)),
        ]

    characters = 200_000 if bench.tiny else 2_500_000
    common = {"tokenizer": bench.tokenizer, "tiny": bench.tiny}
    made = {"file": bench.text, "tokenizer": bench.tokenizer, "characters": characters}
    small = {"folder": folder / "checked", "file": bench.text, **common}
    rows = [once("text", bench.text, lambda: bench.job("text", made))]
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(both, family) for family in MODELS]
        rows.append(once("small Mixtral of the checks", folder / "checked", lambda: bench.job("checked", small)))
        return rows + [row for each in running for row in each.result()]


def speed(bench: Bench, family: str, micro: int, *options: str, save: bool = False) -> dict[str, Any]:
    """A run of cpt on one of the two models: its speed, its memory, its start, and its save where asked for."""
    out = bench.folder / "run"
    batch = BATCH // 4 if bench.tiny else BATCH
    micro = min(micro, batch)
    length = 2 if save else 1000
    settings = {} if save else {"steps": bench.steps, "seconds": STEP_SECONDS}
    size = ["--seq-len", bench.seq_len, "--global-batch-size", batch, "--micro-batch-size", micro]
    often = ["--max-steps", length, "--save-every", length, "--warmup-steps", 0, "--no-resume"]
    try:
        seen = bench.cpt(bench.folder / family, out, settings, *size, *often, *options, timeout=150)
        metrics = read_metrics(out)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    last = metrics[len(metrics) // 2 :]
    tokens = statistics.median(row["tokens_per_second"] for row in last)
    estimate, peak = seen["plan"]["memory"]["total"], seen.get("peak")
    shape, flops = geometry(family, bench.tiny), bench.flops
    return {
        "tokens_per_second": tokens,
        "mfu": statistics.median(row["mfu"] for row in last) if "mfu" in last[-1] else None,
        "mfu_computed": tokens * flops_per_token(shape, bench.seq_len) / flops if flops else None,
        "peak_gb": peak and peak / 1e9,
        "reserved_gb": seen["reserved"] / 1e9 if peak else None,
        "estimate_gb": estimate / 1e9,
        "estimate_over_peak": estimate / peak if peak else None,
        "start_seconds": seen["start_seconds"],
        "first_step_seconds": seen["step_seconds"][0],
        "save_seconds": max(seen["save_seconds"], default=None),
        "written_seconds": seen.get("written_seconds"),
        "steps": len(metrics),
        "loss": metrics[-1]["loss"],
        "parameters": seen["plan"]["num_parameters"],
    }


def read_metrics(out: Path) -> Rows:
    """The rows of training steps."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def throughput(bench: Bench) -> Rows:
    """The arms of the published figures, and a save."""
    arms: list[tuple[str, int, tuple[str, ...]]] = [
        ("qwen3", 1, (CHECKPOINTING,)),
        ("mistral", 2, ()),
        ("qwen3", 4, (CHECKPOINTING,)),
        ("qwen3", 1, ()),
    ]
    return [*(arm(bench, *each) for each in arms), arm(bench, "qwen3", 1, (CHECKPOINTING,), save=True)]


def switches(bench: Bench) -> list[str]:
    """The switch that is not the default: layers are compiled on a GPU. In small none, compiling takes a minute."""
    return ["--no-compile"] if bench.gpu else []


def arm(bench: Bench, family: str, micro: int, options: tuple[str, ...], save: bool = False) -> dict[str, Any]:
    shown = "save" if save else " ".join(options)
    name = ", ".join([MODELS[family], f"micro-batch {micro}", *([shown] if shown else [])])
    if missing := unavailable(bench, options):
        return {"name": name, "status": f"skipped: {missing}", "wall_seconds": 0.0}
    return attempt(bench, name, lambda: speed(bench, family, micro, *options, save=save))


def unavailable(bench: Bench, options: tuple[str, ...]) -> str:
    """Why options of a run cannot be tried on this machine; nothing where they can."""
    alone = {"offload", "--no-master-weights", "--liger", "sonicmoe", "deepgemm"}
    if not bench.gpu and alone & {*options}:
        return "needs a GPU"
    if "--liger" in options and not find_spec("liger_kernel"):
        return "needs liger-kernel"
    if {"sonicmoe", "deepgemm"} & {*options} and not find_spec("kernels"):
        return "needs kernels"
    return "needs torchao" if {"8bit", "bf16"} & {*options} and not find_spec("torchao") else ""


def bare(bench: Bench) -> Rows:
    """Stock transformers in the loop that a user would write, on the same model and text."""
    batch, steps = (2, 3) if bench.tiny else (4, 4)

    def work() -> dict[str, Any]:
        model = bench.folder / "qwen3"
        sizes = {"seq_len": bench.seq_len, "batch": batch, "steps": steps}
        seen = bench.job("bare", {"model": model, "file": bench.text, **sizes}, 150)
        tokens = batch * bench.seq_len / statistics.median(seen["step_seconds"][1:])
        flops = bench.flops
        shape = geometry("qwen3", bench.tiny)
        return {
            "tokens_per_second": tokens,
            "mfu_computed": tokens * flops_per_token(shape, bench.seq_len) / flops if flops else None,
            "peak_gb": seen["peak"] and seen["peak"] / 1e9,
            "start_seconds": seen["load_seconds"],
        }

    return [attempt(bench, f"{MODELS['qwen3']}, transformers' own", work)]


def checks(bench: Bench) -> Rows:
    """Losses and router gradients against fp32, and resuming after a kill; the runs go side by side."""
    folder = bench.folder / "checks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    steps = 10
    size = ["--seq-len", 64 if bench.tiny else 512, "--global-batch-size", 4, "--micro-batch-size", 2]

    def run(name: str, settings: dict[str, Any], *options: object) -> Path:
        out = folder / name
        bench.cpt(bench.folder / "checked", out, settings, *size, "--max-steps", steps, *options, timeout=180)
        return out

    def compared(name: str, *options: object) -> Path:
        settings = {"gradients": str(folder / f"{name}.safetensors"), "steps": steps}
        run(name, settings, "--grad-clip", 0, "--save-every", 1000, *options)
        return folder / name

    kept = ["--deterministic", "--save-every", 3, "--keep-checkpoints", 1]
    variants: dict[str, tuple[str, ...]] = {"bf16": ()}
    variants |= {f"bf16 {switch}": (switch,) for switch in switches(bench)}
    if bench.gpu and find_spec("liger_kernel"):
        variants["bf16 --liger"] = ("--liger",)
    jobs: dict[str, Callable[[], Path]] = {
        "whole": partial(run, "whole", {}, *kept),
        "killed": partial(run, "killed", {"kill": 5}, *kept),
        "fp32": partial(compared, "fp32", "--precision", "fp32"),
    }
    for name, options in variants.items():
        jobs[name] = partial(compared, name.replace(" ", ""), "--precision", "bf16", *options)
    bench.threads = "2" if bench.gpu else "1"  # of each: waiting threads would slow the others down
    with ThreadPoolExecutor(6 if bench.gpu else 2) as pool:
        running = {name: pool.submit(job) for name, job in jobs.items()}

        def resumed() -> dict[str, Any]:
            running["killed"].result()
            before = len(read_metrics(folder / "killed"))
            if before >= steps:
                raise FailedError("the run was not killed")
            run("killed", {}, *kept)
            return {"killed_after": before, **same(running["whole"].result(), folder / "killed")}

        def against(name: str) -> dict[str, Any]:
            return difference(running["fp32"].result(), running[name].result())

        rows = [attempt(bench, "killed and resumed, --deterministic", resumed)]
        return rows + [attempt(bench, f"{name} against fp32", partial(against, name)) for name in variants]


def difference(exact: Path, other: Path) -> dict[str, Any]:
    """Largest relative difference of ten losses, and of the routers' gradients of the first step."""
    from safetensors.torch import load_file

    one, two = ([row["loss"] for row in read_metrics(out)] for out in (exact, other))
    first, second = (load_file(out.with_suffix(".safetensors")) for out in (exact, other))
    if len(one) != len(two) or first.keys() != second.keys():
        raise FailedError(f"{len(one)} and {len(two)} losses, routers {sorted(first)} and {sorted(second)}")
    losses = max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))
    gradients = max(float((second[name] - grad).norm() / grad.norm()) for name, grad in first.items())
    return {
        "loss_difference": losses,
        "gradient_difference": gradients,
        "routers": len(first),
        "holds": losses <= LOSS_BOUND and gradients <= GRADIENT_BOUND,
        "bounds": f"{LOSS_BOUND} and {GRADIENT_BOUND}",
    }


def same(one: Path, two: Path) -> dict[str, Any]:
    """Whether two runs ended with the same bytes and went through the same losses."""

    def digests(out: Path) -> dict[str, str]:
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(out.glob("*.safetensors"))}

    weights = digests(one) == digests(two) != {}
    losses = [[row["loss"] for row in read_metrics(out)] for out in (one, two)]
    equal = losses[0] == losses[1]
    return {"weights_equal": weights, "losses_equal": equal, "holds": weights and equal}


def profile(bench: Bench) -> Rows:
    """One step of each model under torch.profiler: where its time goes."""
    arms = {"qwen3": (1, (CHECKPOINTING,)), "mistral": (2, ())}
    return [attempt(bench, MODELS[name], partial(profiled, bench, name, *arms[name])) for name in arms]


def profiled(bench: Bench, family: str, micro: int, options: tuple[str, ...]) -> dict[str, Any]:
    out = bench.folder / "run"
    batch = ["--seq-len", bench.seq_len, "--global-batch-size", 2, "--micro-batch-size", micro]
    length = ["--max-steps", 1000, "--save-every", 1000, "--no-resume"]
    try:
        seen = bench.cpt(bench.folder / family, out, {"steps": 3, "profile": 3}, *batch, *length, *options)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    found: dict[str, Any] = seen["profile"]
    show_profile(f"{MODELS[family]}: one step of 2 sequences", found)
    return {**found, "step_seconds": seen["step_seconds"][1]}


def routing(bench: Bench) -> Rows:
    """analyze-routing against a bare forward of the same tokens."""
    num_tokens, seq_len, batch = (4096, 64, 8) if bench.tiny else (200_000 // 2048 * 2048, 2048, 8)

    def work() -> dict[str, Any]:
        model, out = bench.folder / "qwen3", bench.folder / "routing"
        began = time.perf_counter()
        sizes = ["--max-tokens", num_tokens, "--seq-len", seq_len, "--batch-size", batch, "--no-unit-use"]
        report = bench.moetool("analyze-routing", model, "--data", f"text={bench.text}", "--out", out, *sizes)
        seconds = time.perf_counter() - began
        windows = {"num_tokens": num_tokens, "seq_len": seq_len, "batch": batch}
        plain = bench.job("routes", {"model": model, "file": bench.text, **windows})
        domain = report["domains"]["text"]
        worst = 0.0
        for layer, counts in zip(domain["layers"], plain["counts"], strict=True):
            total, load = sum(counts), sum(layer["load"])
            shares = zip(layer["load"], counts, strict=True)
            worst = max(worst, sum(abs(mine / load - other / total) for mine, other in shares) / 2)
        return {
            "tokens": domain["num_tokens"],
            "command_seconds": seconds,
            "bare_load_seconds": plain["load_seconds"],
            "bare_forward_seconds": plain["forward_seconds"],
            "routes_difference": worst,
            "holds": worst <= ROUTES_BOUND and domain["num_tokens"] == plain["num_tokens"],
            "bounds": f"{ROUTES_BOUND}",
        }

    return [attempt(bench, "analyze-routing", work)]


def quickstart(bench: Bench) -> Rows:
    """The whole journey in small: the command has no option for its size, so its constants are changed."""
    sizes = {"CORPUS": 200_000, "DENSE_STEPS": 8, "CPT_STEPS": 4, "LIMIT": 4}

    def work() -> dict[str, Any]:
        folder, began = bench.folder / "quickstart", time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        settings = json.dumps({"quickstart": sizes})
        command = ["quickstart", folder, "--json", "--quiet"]
        report = bench.folder / "quickstart.json"
        stdout = bench.run("-m", "tests.benchmarks.gpu_watch", report, settings, *command, timeout=180)
        losses = json.loads(stdout)["losses"]
        copies = max(abs(losses["moe-copy"][name] - losses["dense"][name]) for name in ("prose", "code"))
        # The dense loss and the copies' are both computed in the precision of the device.
        return {"seconds": time.perf_counter() - began, "copies_difference": copies, "holds": copies < 0.01}

    return [attempt(bench, "quickstart in small", work)]


def once(bench: Bench) -> Rows:
    """Whatever has code of its own for a GPU, once on the small model, side by side: that it runs, and what it leaves.

    Where cpt's options differ only in speed or memory, their losses should be near each other.
    """
    folder, model = bench.folder / "once", bench.folder / "checked"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    text, length = f"text={bench.text}", 64 if bench.tiny else 512
    some = ["--data", text, "--max-tokens", 16 * length, "--seq-len", length]

    def trained(name: str, options: tuple[str, ...]) -> dict[str, Any]:
        size = ["--seq-len", length, "--global-batch-size", 4, "--micro-batch-size", 2, "--max-steps", 3]
        seen = bench.cpt(model, folder / name, {}, *size, "--save-every", 2, *options, timeout=180)
        return {"loss": seen["losses"][-1], "start_seconds": seen["start_seconds"]}

    def ran(name: str, *command: object) -> dict[str, Any]:
        first, source, *more = command
        bench.moetool(first, source, folder / name, *more)
        return {}

    def dense_and_back() -> dict[str, Any]:
        ran("dense", "densify", model, "--keep-experts", 2, *some)
        fitted = ["--router", "balanced", "--calibrate", text, "--max-tokens", 16 * length, "--seq-len", length]
        return ran("upcycled", "upcycle", folder / "dense", "--num-experts", 4, *fitted)

    pruned = ["--keep-experts", 4, "--merge", "ream", *some]
    commands: dict[str, Callable[[], dict[str, Any]]] = {
        "prune --merge ream": partial(ran, "pruned", "prune", model, *pruned),
        "prune --stream": partial(ran, "streamed", "prune", model, *pruned, "--stream"),
        "grow --utility gradient": partial(
            ran, "grown", "grow", model, "--num-experts", 12, "--start", "twins", "--utility", "gradient", *some
        ),
        "densify, upcycle --router balanced": dense_and_back,
        "sample": partial(ran, "sampled.jsonl", "sample", model, "--max-tokens", 4 * length),
        "eval --text": lambda: bench.moetool("eval", model, "--text", text, "--limit", 1, "--routing") and {},
    }
    arms: list[tuple[str, ...]] = [
        (),
        ("--moments", "bf16"),
        ("--moments", "8bit"),
        ("--moments", "offload"),
        ("--moments", "8bit", "--no-master-weights"),
        ("--no-master-weights",),
        ("--liger",),
        ("--experts-implementation", "batched_mm"),
        ("--experts-implementation", "sonicmoe"),
        ("--experts-implementation", "deepgemm"),
        ("--balance", "sinkhorn", "--balance", "erc"),
        ("--balance", "adaptive-aux", "--balance", "global-aux", "--balance", "seq-aux"),
        ("--router-gradient", "default"),
        ("--router-gradient", "dense", CHECKPOINTING),
        ("--no-cross-document", CHECKPOINTING, "--deterministic"),
        ("--teacher", str(model), "--teacher-on", "all"),
        ("--precision", "fp32"),
    ]
    bench.threads = "2" if bench.gpu else "1"
    with ThreadPoolExecutor(6 if bench.gpu else 2) as pool:

        def row(name: str, work: Callable[[], dict[str, Any]], missing: str = "") -> Any:
            if missing:
                return pool.submit(lambda: {"name": name, "status": f"skipped: {missing}", "wall_seconds": 0.0})
            return pool.submit(attempt, bench, name, work)

        running = []
        for number, options in enumerate(arms):
            name = " ".join(["cpt", *(option.replace(str(model), "MODEL") for option in options)])
            running.append(row(name, partial(trained, f"run{number}", options), unavailable(bench, options)))
        running += [row(name, work) for name, work in commands.items()]
        return [each.result() for each in running]


def options(bench: Bench) -> Rows:
    """What cpt's options for speed and memory give, of those that it has."""
    arms: list[tuple[str, ...]] = [(switch,) for switch in switches(bench)]
    arms += [("--liger",), *(("--experts-implementation", name) for name in ("sonicmoe", "deepgemm"))]
    arms += [("--moments", moments) for moments in ("8bit", "bf16", "offload")]
    arms.append(("--moments", "8bit", "--no-master-weights"))
    rows = [arm(bench, "qwen3", 1, (CHECKPOINTING, *each)) for each in arms]
    return rows + [arm(bench, "mistral", 2, (switch,)) for switch in switches(bench)]


PARTS: dict[str, Callable[[Bench], Rows]] = {
    "models": models,
    "throughput": throughput,
    "bare": bare,
    "checks": checks,
    "profile": profile,
    "routing": routing,
    "quickstart": quickstart,
    "once": once,
    "options": options,
}


# What is shown.


def show_profile(title: str, found: dict[str, Any]) -> None:
    from rich.table import Table

    on_gpu = found["gpu_seconds"] is not None
    sums = f"CPU {found['cpu_seconds']:.2f} s" + (f", GPU {found['gpu_seconds']:.2f} s" if on_gpu else "")
    table = Table(title=f"{title}: {sums}, {found['kernels']} kernels", title_justify="left")
    table.add_column("operation")
    for name in ("ms on the GPU" if on_gpu else "ms", "share", "calls"):
        table.add_column(name, justify="right")
    total = found["gpu_seconds"] or found["cpu_seconds"]
    for row in found["operations"]:
        share = f"{row['seconds'] / total:.1%}" if total else ""
        table.add_row(row["name"], f"{1000 * row['seconds']:.2f}", share, str(row["calls"]))
    console().print(table)


def console() -> Any:
    from rich.console import Console

    return Console(width=170)


COLUMNS = {
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "mfu_computed": "computed",
    "peak_gb": "peak GB",
    "estimate_gb": "estimate",
    "start_seconds": "start s",
    "save_seconds": "save s",
    "written_seconds": "on disk",
    "holds": "holds",
}


def show(document: dict[str, Any]) -> None:
    """One table of everything."""
    from rich.table import Table

    card = f"{document['device']}, torch {document['torch']}, transformers {document['transformers']}"
    table = Table(title=f"{card}, {document['date']}, {document['seconds']:.0f} s", title_justify="left")
    table.add_column("part")
    table.add_column("run", overflow="fold")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    table.add_column("s", justify="right")
    table.add_column("", overflow="fold")
    for part, entry in document["parts"].items():
        for row in entry["rows"]:
            cells = [cell(key, row.get(key)) for key in COLUMNS]
            table.add_row(part, row["name"], *cells, f"{row['wall_seconds']:.0f}", remark(row))
        if not entry["rows"]:
            table.add_row(part, "", *[""] * len(COLUMNS), "", entry["status"])
    console().print(table)


def cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.1%}" if key.startswith("mfu") else number(value) if abs(value) >= 100 else f"{value:.1f}"


def remark(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return str(row.get("error") or row["status"]).splitlines()[-1][:80]
    told = ["loss_difference", "gradient_difference", "routes_difference", "copies_difference", "killed_after"]
    told += ["weights_equal", "losses_equal", "gb", "step_seconds", "cpu_seconds", "gpu_seconds", "kernels"]
    told += ["command_seconds", "bare_load_seconds", "bare_forward_seconds", "estimate_over_peak", "steps"]
    return ", ".join(f"{key.replace('_', ' ')} {number(row[key])}" for key in told if row.get(key) is not None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), metavar="FILE.json")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,...", help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS")
    parser.add_argument("--folder", type=Path, default=None, metavar="DIR")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--only: no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if "models" not in chosen and arguments.folder is None:
        chosen = ["models", *chosen]
    began = time.perf_counter()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="moetool-gpu-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        bench = Bench(folder.absolute(), arguments.tiny, arguments.budget)
        document: dict[str, Any] = {
            "device": bench.name,
            "torch": version("torch"),
            "transformers": version("transformers"),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "cores": os.cpu_count(),
            "tiny": arguments.tiny,
            "seconds": 0.0,
            "parts": {},
        }
        for part, work in PARTS.items():
            if part in chosen:
                document["parts"][part] = run_part(bench, part, work)
                document["seconds"] = time.perf_counter() - began
                arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    show(document)
    rows = [row for entry in document["parts"].values() for row in entry["rows"]]
    bad = any(row["status"] == "failed" or row.get("holds") is False for row in rows)
    return int(bad or any(entry["status"].startswith("failed") for entry in document["parts"].values()))


def run_part(bench: Bench, part: str, work: Callable[[Bench], Rows]) -> dict[str, Any]:
    """All rows of a part, and what stopped it."""
    print(f"{part} ({bench.left():.0f} s left)", flush=True)
    began = time.perf_counter()
    rows, status, bench.threads = [], "ok", None
    try:
        if bench.left() < 3:
            raise OutOfTimeError
        rows = work(bench)
    except OutOfTimeError:
        status = "skipped: out of time"
    except Exception as error:
        status = f"failed: {type(error).__name__}: {error}"[-1500:]
        print(f"  {status}", flush=True)
    return {"status": status, "seconds": time.perf_counter() - began, "rows": rows}


if __name__ == "__main__":
    sys.exit(main())
