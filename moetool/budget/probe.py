"""A short real run on this machine, from which the time of a long one is predicted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moetool.amounts import size
from moetool.budget.commands import launcher, mesh_options, recipe_options
from moetool.budget.meshes import Choice, choices
from moetool.budget.report import Plan, document
from moetool.data.installed import prose
from moetool.errors import ConfigError
from moetool.progress import Progress

STEPS, WARM = 20, 5  # the first ones allocate memory, and compile on a GPU
TEXT = 2_000_000  # characters


@dataclass(frozen=True)
class Probe:
    """The measurements of a short run.

    Attributes:
        steps: that it had.
        device: `cuda` or `cpu`.
        processes: that ran.
        first_seconds: of the first WARM steps together.
        step_seconds: of each step after them, on average.
        tokens_per_second: after them, of all processes.
    """

    steps: int
    device: str
    processes: int
    first_seconds: float
    step_seconds: float
    tokens_per_second: float

    def seconds(self, steps: int) -> float:
        """The time that so many steps of the same run take, without validation and saving."""
        return self.first_seconds + (steps - WARM) * self.step_seconds

    def to_json(self, steps: int) -> dict[str, Any]:
        """Plain values, with the time of the planned steps."""
        return asdict(self) | {"predicted_seconds": self.seconds(steps)}


def measure(plan: Plan, progress: Progress) -> Probe:
    """Upcycle the model into a temporary folder, and train it for STEPS steps of the plan, on the installed prose.

    On as many GPUs as are planned the recommended mesh runs; where there are fewer, or none, one process.

    Args:
        plan: settled.
        progress: called with the commands that are done.

    Raises:
        ConfigError: the model cannot be upcycled, the disk is too small, or a command fails.
    """
    if plan.models.unfit:
        raise ConfigError("--probe has no effect with a model that cannot be upcycled; leave it out")
    found = document(plan)
    found_choices = choices(plan.models.moe, plan.cluster, plan.seq_len, plan.batch)
    best = found_choices[0] if found_choices else None
    gpus = _num_gpus()
    together = best is not None and 1 < plan.cluster.num_gpus <= gpus
    with TemporaryDirectory(prefix="moetool-probe-") as name:
        folder = Path(name)
        need, free = found["disk"]["step_folder"] + plan.models.num_bytes, shutil.disk_usage(folder).free
        if need > free:
            raise ConfigError(
                f"--probe writes about {size(need)} to {folder.parent}, which has {size(free)} free; set TMPDIR to a"
                " larger disk"
            )
        text = folder / "text.jsonl"
        text.write_text("".join(json.dumps({"text": one}) + "\n" for one in prose(TEXT)), encoding="utf-8")
        progress("probe", 0, 2)
        moe = [plan.options.dense, str(folder / "moe"), *recipe_options(plan.options.recipe(), "drop")]
        _run([sys.executable, "-m", "moetool", "upcycle", *moe, "--verify", "none", "--quiet"])
        progress("probe", 1, 2)
        start = [sys.executable, "-m", "moetool"]
        if together:
            start = [sys.executable, "-m", "accelerate.commands.launch", *launcher(plan.cluster)[2:]]
        _run([*start, "cpt", str(folder / "moe"), str(folder / "run"), *_options(plan, best, text, together)])
        progress("probe", 2, 2)
        return _read(
            folder / "run" / "metrics.jsonl", plan.batch * plan.seq_len, "cuda" if gpus else "cpu",
            plan.cluster.num_gpus if together else 1,
        )  # fmt: skip


def _options(plan: Plan, best: Choice | None, text: Path, together: bool) -> list[str]:
    micro = best.training.micro_batch_size if best else 1
    return [
        "--train", f"text={text}", "--max-steps", str(STEPS), "--val-fraction", "0", "--lr", "1e-5",
        "--seq-len", str(plan.seq_len), "--global-batch-size", str(plan.batch), "--micro-batch-size", str(micro),
        "--gradient-checkpointing", "--save-every", str(STEPS), "--keep-checkpoints", "1", "--quiet",
        *(mesh_options(best.mesh) if together and best else []),
    ]  # fmt: skip


def _num_gpus() -> int:
    """GPUs of this machine; asked in a process of its own, because torch takes seconds to load."""
    code = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        word = next(word for word in command if word in ("upcycle", "cpt"))
        raise ConfigError(f"--probe: moetool {word} failed: {said[-1].strip() if said else 'without a message'}")


def _read(metrics: Path, step_tokens: int, device: str, processes: int) -> Probe:
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    seconds = [step_tokens / row["tokens_per_second"] for row in rows if "loss" in row]
    after = seconds[WARM:]
    each = sum(after) / len(after)
    return Probe(len(seconds), device, processes, sum(seconds[:WARM]), each, step_tokens / each)
