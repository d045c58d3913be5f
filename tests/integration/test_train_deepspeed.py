"""`moetool cpt` with DeepSpeed's ZeRO on two CPU processes, where DeepSpeed is installed: see tests/sharded.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moetool.errors import ConfigError
from moetool.train.config import TrainConfig
from moetool.train.zero import check, check_options
from tests import tiny
from tests.integration.test_train_sharded import OFTEN, OPTIONS, ROOT, assert_alike, rows, unfinish

installed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def shipped(stage: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `accelerate launch` makes of a configuration that the docs ship."""
    name = "deepspeed-zero3.yaml" if stage == 3 else "deepspeed.yaml"
    options = ["--config_file", str(ROOT / "docs" / "accelerate" / name), "--zero_stage", str(stage)]
    found: dict[str, str] = {}
    monkeypatch.setattr(launch, "deepspeed_launcher", lambda args: found.update(prepare_deepspeed_cmd_env(args)[1]))
    launch.launch_command(launch.launch_command_parser().parse_args([*options, "-m", "moetool", "cpt"]))
    assert found["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
    return {key: value for key, value in found.items() if key.startswith("ACCELERATE_")}


def zero(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    processes = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "tests.sharded",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"} | environment
    return subprocess.run(
        [*processes, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        check=False,
    )


@installed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_saves_and_resumes_as_one_process(
    tmp_path: Path, jsonl: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = shipped(stage, monkeypatch)
    dtype = torch.bfloat16 if stage == 3 else torch.float32
    model = tiny.save_mixtral(tmp_path / "model", dtype=dtype)
    one, two = tmp_path / "one", tmp_path / "two"
    # A norm that is clipped in some steps, and warm-up: what DeepSpeed must be told of each step.
    arguments = ["--train", f"new={jsonl}", *OPTIONS, *OFTEN, "--grad-clip", 0.5]
    assert tiny.cli("cpt", model, one, *arguments).returncode == 0
    done = zero(environment, "cpt", model, two, *arguments)
    assert done.returncode == 0, done.stderr
    held = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"rank"')]
    total = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(model).parameters())
    for process in held:
        assert total / 2 <= process["moments"] <= 0.51 * total + 100
        assert len(process["shards"]) == (process["parameters"] if stage == 3 else 0)
    assert any(row.get("grad_norm", 0) > 0.5 for row in rows(one))
    assert_alike(one, two)

    saved, info = AutoModelForCausalLM.from_pretrained(two, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert saved.dtype == dtype
    for name in ("model.safetensors", "checkpoints/step-000006/training_state/optimizer.safetensors"):
        ours, theirs = (load_file(out / name) for out in (one, two))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-4, rtol=1e-2) for key in ours)

    # Step folders hold whole tensors: each goes on from what the other saved, and from its own.
    for source, name in ((one, "there"), (two, "again")):
        there = unfinish(source, tmp_path / name, 3)
        done = zero(environment, "cpt", model, there, *arguments)
        assert done.returncode == 0, done.stderr
        assert "from step 3" in done.stdout
        assert_alike(one, there)
    back = unfinish(two, tmp_path / "back", 3)
    assert tiny.cli("cpt", model, back, *arguments).returncode == 0
    assert_alike(one, back)


# Not global-aux: what it has seen of a step depends on the number of processes, however they share the work.
BALANCE = [option for name in ("sinkhorn", "z-loss", "aux") for option in ("--balance", name)]


@installed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "more", "rel"),
    [
        (2, ["--precision", "bf16"], 1e-4),  # fp32 is 2e-3 away
        (3, ["--precision", "bf16"], 1e-4),
        (3, ["--gradient-checkpointing", *BALANCE], 1e-5),
        (2, ["--compile", "--freeze-router"], 1e-5),
        (3, ["--freeze-router"], 1e-5),
    ],
)
def test_zero_computes_what_one_process_does(
    tmp_path: Path, mixtral: Path, jsonl: Path, stage: int, more: list[str], rel: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["--train", f"new={jsonl}", *OPTIONS, *more, "--val-fraction", 0]
    assert tiny.cli("cpt", mixtral, one, *arguments).returncode == 0
    done = zero(shipped(stage, monkeypatch), "cpt", mixtral, two, *arguments)
    assert done.returncode == 0, done.stderr
    assert_alike(one, two, rel)
    if "--freeze-router" in more:
        before, after = (load_file(folder / "model.safetensors") for folder in (mixtral, two))
        same = {name for name in before if torch.equal(before[name], after[name])}
        assert same == {name for name in before if name.endswith("gate.weight")}
    for ours, theirs in zip(rows(one), rows(two), strict=True):
        assert ours["balance"] == pytest.approx(theirs["balance"], rel=100 * rel)


@installed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_saves_no_ruin(
    tmp_path: Path, mixtral: Path, jsonl: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["--train", f"new={jsonl}", *OPTIONS, "--save-every", 1, "--lr", 1e30, "--warmup-steps", 2]
    done = zero(shipped(stage, monkeypatch), "cpt", mixtral, out, *arguments)
    assert done.returncode != 0
    assert "stopped before the update" in done.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / "moetool") not in done.stderr
    for folder in (out / "checkpoints").glob("step-*"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(folder / "model.safetensors").values())


@installed
@pytest.mark.slow
def test_zero_moves_a_selection_bias_unless_it_is_shared_out(
    tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, one, two, three = (tmp_path / name for name in ("model", "one", "two", "three"))
    tiny.save_glm4_moe(model)
    arguments = ["--train", f"new={jsonl}", *OPTIONS, "--balance", "loss-free=0.01"]
    assert tiny.cli("cpt", model, one, *arguments).returncode == 0
    done = zero(shipped(2, monkeypatch), "cpt", model, two, *arguments)
    assert done.returncode == 0, done.stderr
    assert_alike(one, two)
    ours, theirs = (load_file(out / "model.safetensors") for out in (one, two))
    biases = [name for name in ours if name.endswith("e_score_correction_bias")]
    assert biases
    for name in biases:
        assert ours[name].any()
        assert torch.equal(ours[name], theirs[name])
    done = zero(shipped(3, monkeypatch), "cpt", model, three, *arguments)
    assert done.returncode != 0
    assert "--balance loss-free: ZeRO-3 shards the selection bias" in done.stderr


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"zero_optimization": {"stage": 0}}, "ZeRO stage 0; set zero_stage to 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer, which"),
        ({"bf16": {"enabled": True}}, "configured for bf16, which moetool cpt decides"),
        ({"optimizer": {"type": "AdamW"}}, "configured for optimizer, which moetool cpt decides"),
    ],
)
def test_configurations_that_cpt_cannot_follow_are_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check({"zero_optimization": {"stage": 2}, **settings})
    check({"zero_optimization": {"stage": 2}, "bf16": {"enabled": False}, "gradient_clipping": "auto"})


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"balance": {"loss-free": 0.001}}, "--balance loss-free: ZeRO-3 shards the selection bias"),
        ({"compile": True, "balance": {}}, "--compile: ZeRO-3 gathers each layer's weights in hooks"),
    ],
)
def test_what_zero_3_does_not_go_with(option: dict[str, Any], reason: str) -> None:
    config = TrainConfig(Path("model"), Path("out"), {}, **option)
    with pytest.raises(ConfigError, match=reason):
        check_options(config, 3)
    for stage in (0, 1, 2):
        check_options(config, stage)


@pytest.mark.parametrize("name", ["deepspeed", "deepspeed-zero3"])
def test_accelerate_reads_the_configurations(name: str) -> None:
    config = load_config_from_file(str(ROOT / "docs" / "accelerate" / f"{name}.yaml"))  # raises at an unknown key
    assert config.distributed_type == "DEEPSPEED"
