"""`moetool cpt` in two CPU processes with whole weights (DDP)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from moetool.errors import ConfigError
from moetool.train import accelerator
from tests import tiny

ROOT = Path(__file__).parents[2]
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
OPTIONS = ["--seq-len", 16, "--global-batch-size", 4, "--micro-batch-size", 1, "--lr", 1e-3, "--max-steps", 6]
OFTEN = ["--save-every", 3, "--eval-every", 3, "--val-fraction", 0.3]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_alike(out: Path, other: Path, rel: float = 1e-5) -> None:
    assert len(rows(out)) == len(rows(other))
    for ours, theirs in zip(rows(out), rows(other), strict=True):
        assert ours["step"] == theirs["step"]
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=rel)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=100 * rel)
        else:
            assert ours["val"] == pytest.approx(theirs["val"], rel=rel)


def unfinish(source: Path, out: Path, step: int) -> Path:
    """A copy of a run that was stopped at a step."""
    shutil.copytree(source, out)
    for name in ("config.json", "summary.json"):
        (out / name).unlink()
    (out / "moetool.partial.json").write_text('{"command": "cpt"}')
    for folder in (out / "checkpoints").iterdir():
        if folder.name > f"step-{step:06d}":
            shutil.rmtree(folder)
    return out


def test_accelerate_reads_the_configuration() -> None:
    config = load_config_from_file(str(ROOT / "docs" / "accelerate" / "ddp.yaml"))  # raises at an unknown key
    assert config.distributed_type == "MULTI_GPU"


def test_a_missing_process_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(**_: object) -> None:
        raise torch.distributed.DistStoreError("Timed out after 601 seconds waiting for clients. 1/2 clients joined.")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerator, "Accelerator", waiting)
    with pytest.raises(ConfigError, match=r"not all of the 2 processes found each other \(Timed out .* 1/2 clients"):
        accelerator.make_accelerator()


@pytest.mark.parametrize("plugin", ["FSDP", "DeepSpeed"])
def test_other_engines_are_refused(
    tmp_path: Path, llama: Path, jsonl: Path, plugin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin.upper()}", "true")
    told = tiny.refusal("cpt", llama, tmp_path / "out", "--train", f"new={jsonl}", *OPTIONS)
    assert f"accelerate is configured for {plugin}" in told
    assert "--fsdp N" in told


@pytest.mark.slow
def test_another_number_of_processes_keeps_the_data_order(tmp_path: Path, mixtral: Path, jsonl: Path) -> None:
    one = tmp_path / "one"
    arguments = ["--train", f"new={jsonl}", *OPTIONS, *OFTEN]
    assert tiny.cli("cpt", mixtral, one, *arguments).returncode == 0
    two = unfinish(one, tmp_path / "two", 3)
    launch = [*TWO_PROCESSES, "-m", "moetool", "cpt"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launch, *map(str, [mixtral, two, *arguments])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "from step 3" in done.stdout
    assert_alike(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_processes_stop_together_with_a_checkpoint(
    tmp_path: Path, llama: Path, jsonl: Path, signum: signal.Signals
) -> None:
    out = tmp_path / "out"
    launch = [*TWO_PROCESSES, "-m", "moetool", "cpt"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    size = ["--seq-len", 16, "--global-batch-size", 4, "--micro-batch-size", 1, "--max-steps", 20_000]
    command = [*launch, *map(str, [llama, out, "--train", f"new={jsonl}", *size])]
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count('"loss"') > 3:
                break
            time.sleep(0.01)
        # As a scheduler stops the launcher alone, and as Ctrl-C reaches everything in a terminal.
        os.kill(process.pid, signum) if signum == signal.SIGTERM else os.killpg(process.pid, signum)
        stderr = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    done = len([row for row in rows(out) if "loss" in row])
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{done:06d}"], stderr
