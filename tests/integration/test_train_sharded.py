"""`moetool cpt` with sharded weights (FSDP2), on two CPU processes: see tests/sharded.py for what that shows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import tiny

ROOT = Path(__file__).parents[2]
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
OPTIONS = ["--seq-len", 16, "--global-batch-size", 4, "--micro-batch-size", 1, "--lr", 1e-3, "--max-steps", 6]
OFTEN = ["--save-every", 3, "--eval-every", 3, "--val-fraction", 0.3]


def fsdp_environment() -> dict[str, str]:
    """What `accelerate launch` makes of the configuration that the docs ship."""
    config = yaml.safe_load((ROOT / "docs" / "accelerate" / "fsdp2.yaml").read_text())
    plain = {str(True): "true", str(False): "false"}
    settings = {key.upper(): plain.get(str(value), str(value)) for key, value in config["fsdp_config"].items()}
    return {"ACCELERATE_USE_FSDP": "true", **settings}


def sharded(*arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        "-m",
        "tests.sharded",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | fsdp_environment()
    command = [*launch, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT, check=False)


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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_weights_train_save_and_resume_as_whole_ones(tmp_path: Path, jsonl: Path, dtype: torch.dtype) -> None:
    model = tiny.save_mixtral(tmp_path / "model", dtype=dtype)
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["--train", f"new={jsonl}", *OPTIONS, *OFTEN]
    assert tiny.cli("cpt", model, one, *arguments).returncode == 0
    done = sharded("cpt", model, two, *arguments)
    assert done.returncode == 0, done.stderr
    held = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"rank"')]
    assert sorted(process["rank"] for process in held) == ["0", "1"]
    for process in held:
        assert len(process["shards"]) == process["parameters"]
        assert process["shards"]["model.layers.1.mlp.experts.down_proj"] == [[4, 32, 64], [2, 32, 64]]
    assert_alike(one, two)

    saved, info = AutoModelForCausalLM.from_pretrained(two, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert saved.dtype == dtype
    ours, theirs = (load_file(out / "model.safetensors") for out in (one, two))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4, rtol=1e-2) for name in ours)

    # Step folders hold whole tensors: one process goes on from what two sharded ones saved, and the reverse.
    there = unfinish(one, tmp_path / "there", 3)
    done = sharded("cpt", model, there, *arguments)
    assert done.returncode == 0, done.stderr
    assert "from step 3" in done.stdout
    assert_alike(one, there)
    back = unfinish(two, tmp_path / "back", 3)
    assert tiny.cli("cpt", model, back, *arguments).returncode == 0
    assert_alike(one, back)


@pytest.mark.slow
def test_sharded_weights_are_gathered_in_bf16(tmp_path: Path, mixtral: Path, jsonl: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["--train", f"new={jsonl}", *OPTIONS, "--precision", "bf16", "--val-fraction", 0.3]
    assert tiny.cli("cpt", mixtral, one, *arguments).returncode == 0
    done = sharded("cpt", mixtral, two, *arguments)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(rows(one), rows(two), strict=True):
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=2e-2)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_reads_the_configurations(name: str) -> None:
    config = load_config_from_file(str(ROOT / "docs" / "accelerate" / f"{name}.yaml"))  # raises at an unknown key
    assert config.distributed_type == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[name]
    plugin = {field.name for field in fields(FullyShardedDataParallelPlugin)}
    for key in getattr(config, "fsdp_config", None) or {}:
        assert key.removeprefix("fsdp_") in plugin | {"version", "offload_params"}, key


def test_deepspeed_that_would_not_train_is_refused(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    arguments = ["cpt", llama, tmp_path / "out", "--train", f"new={jsonl}", *OPTIONS]
    done = tiny.cli(*arguments, env={"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_DEEPSPEED": "true"})
    assert done.returncode == 1
    assert "accelerate is configured for DeepSpeed" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_fsdp_that_would_not_shard_is_refused(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    arguments = ["cpt", llama, tmp_path / "out", "--train", f"new={jsonl}", *OPTIONS]
    done = tiny.cli(*arguments, env={"ACCELERATE_USE_CPU": "true", **fsdp_environment()})
    assert done.returncode == 1
    assert "accelerate is configured for FSDP but would train with NO" in done.stderr
    assert len(done.stderr.splitlines()) == 1


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
