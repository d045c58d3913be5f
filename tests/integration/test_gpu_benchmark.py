"""The program that measures a GPU, in small on whatever is here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from moetool.cost.operations import flops_per_token as counted
from moetool.cost.parameters import sizes_of
from tests.benchmarks import gpu
from tests.benchmarks.gpu_models import GEOMETRY, flops_per_token


def run(tmp_path: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--tiny", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=gpu.ROOT, env=os.environ, check=False)
    return done, json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_part_runs_and_every_check_holds(tmp_path: Path) -> None:
    done, document = run(tmp_path, "--budget", "1500")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(document["parts"]) == list(gpu.PARTS)
    rows = {row["name"]: row for entry in document["parts"].values() for row in entry["rows"]}
    skipped = {row["status"] for row in rows.values() if row["status"] != "ok"}
    assert skipped <= {"skipped: needs a GPU", "skipped: needs torchao"}, skipped
    assert all(
        row["status"] == "ok"
        for part in gpu.PARTS
        if part not in ("once", "options")
        for row in document["parts"][part]["rows"]
    )
    assert rows["killed and resumed, --deterministic"]["weights_equal"]
    assert rows["analyze-routing"]["routes_difference"] < gpu.ROUTES_BOUND
    saved = rows["0.6B x 8, micro-batch 1, save"]
    assert 0 < saved["save_seconds"] < saved["written_seconds"]
    losses = [
        row["loss"] for row in document["parts"]["once"]["rows"] if row["name"].startswith("cpt") and "loss" in row
    ]
    assert len(losses) > 5
    assert rows["0.6B x 8"]["operations"]
    assert all(row["tokens_per_second"] > 0 for row in document["parts"]["throughput"]["rows"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_fails_or_comes_too_late_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "folder"  # without models
    done, document = run(tmp_path, "--only", "bare,routing", "--folder", str(folder))
    assert done.returncode == 1
    assert [entry["rows"][0]["status"] for entry in document["parts"].values()] == ["failed", "failed"]
    assert "exit code" in document["parts"]["bare"]["rows"][0]["error"]
    done, document = run(tmp_path, "--budget", "1")
    assert done.returncode == 0
    assert {entry["status"] for entry in document["parts"].values()} == {"skipped: out of time"}


def test_the_stopwatch_sees_steps_saves_and_gradients(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    """The parts of the loop that it replaces are still those that the loop calls."""
    report, gradients = tmp_path / "report.json", tmp_path / "gradients.safetensors"
    command = [sys.executable, "-m", "tests.benchmarks.gpu_watch", report, json.dumps({"gradients": str(gradients)})]
    command += ["cpt", mixtral, tmp_path / "run", "--train", f"a={jsonl}", "--max-steps", "3", "--save-every", "2"]
    command += ["--keep-weights", "1", "--seq-len", "16", "--global-batch-size", "2", "--val-fraction", "0", "--quiet"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=gpu.ROOT, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(report.read_text())
    assert (len(seen["step_seconds"]), len(seen["losses"]), len(seen["save_seconds"])) == (3, 3, 5)
    assert gradients.exists()


@pytest.mark.parametrize("family", GEOMETRY)
def test_flops_are_those_that_cpt_counts(family: str) -> None:
    shape = GEOMETRY[family] | {"num_experts_per_tok": 2, "max_position_embeddings": 4096}
    if family == "qwen3":
        more = {"num_experts": 8, "moe_intermediate_size": shape["intermediate_size"], "decoder_sparse_step": 1}
        config: Any = Qwen3MoeConfig(**(shape | more))
    else:
        config = MixtralConfig(**(shape | {"num_local_experts": 8}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert counted(sizes_of(model), 4096) == flops_per_token(shape, 4096) + 6 * norms
