"""--moments and --no-master-weights: what they keep, that runs learn, and that resumed runs go on bit for bit."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from moetool.train import state
from moetool.train.config import TrainConfig
from moetool.train.optimizer import adamw, parts, set_rate
from tests import tiny

COMPILE = torch.compile
WAYS = [
    ["--precision", "bf16"],
    ["--moments", "bf16"],
    ["--moments", "8bit"],
    ["--moments", "8bit", "--precision", "bf16"],
    ["--moments", "8bit", "--precision", "bf16", "--no-master-weights"],
    ["--precision", "bf16", "--no-master-weights"],
    ["--moments", "offload", "--precision", "bf16"],
]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao, where `make` puts it. Its update is not compiled here, which takes a minute."""
    monkeypatch.syspath_prepend(str(Path(sys.prefix) / "optional"))
    pytest.importorskip("torchao", reason="make puts torchao into .venv/optional")
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)


@pytest.fixture
def offloading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU is taken for a GPU: memory of the device and of the host are the same one."""
    monkeypatch.setattr("moetool.train.optimizer._check_offload", lambda config, device: None)


def cpt(model: Path, out: Path, text: Path, *more: object) -> tuple[int, str, str]:
    sizes = ["--seq-len", 16, "--global-batch-size", 4, "--micro-batch-size", 2, "--lr", 1e-3, "--save-every", 3]
    return tiny.in_process("cpt", model, out, "--train", f"new={text}", "--max-steps", 6, *sizes, "--quiet", *more)


def rows(out: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in ("step", "loss", "grad_norm")} for row in lines if "loss" in row]


def files(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}:{name}": tensor for name, tensor in load_file(path).items()}
    return found


@pytest.mark.usefixtures("offloading")
@pytest.mark.parametrize("options", WAYS, ids=" ".join)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, jsonl: Path, options: list[str]) -> None:
    model = tiny.save_mixtral(tmp_path / "model")
    out = tmp_path / "out"
    code, _, stderr = cpt(model, out, jsonl, *options)
    assert code == 0, stderr
    whole, losses = files(out), rows(out)
    assert losses[-1]["loss"] < losses[0]["loss"]  # type: ignore[operator]
    moments = load_file(out / "checkpoints/step-000006/training_state/optimizer.safetensors")
    kept = {tensor.dtype for name, tensor in moments.items() if "experts" in name and "exp_avg" in name}
    eight, half = "8bit" in options, "--moments" in options and options[1] == "bf16"
    assert (torch.uint8 in kept) == eight
    assert (kept == {torch.bfloat16}) == half
    # As after a kill between the two saves: the end is gone, and the mark of an unfinished run is back.
    shutil.rmtree(out / "checkpoints/step-000006")
    for name in ("config.json", "summary.json"):
        (out / name).unlink()
    state.claim(out)
    code, _, stderr = cpt(model, out, jsonl, *options)
    assert code == 0, stderr
    assert rows(out) == losses
    again = files(out)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.usefixtures("offloading")
@pytest.mark.parametrize("save_dtype", ["bfloat16", "float32"])
def test_offloading_changes_no_bit(tmp_path: Path, jsonl: Path, save_dtype: str) -> None:
    """Clipped gradients, two micro-batches a step, saved weights and moments: all as without it."""
    model = tiny.save_mixtral(tmp_path / "model")
    options = ["--precision", "bf16", "--grad-clip", 0.1, "--save-dtype", save_dtype]
    for name, more in {"here": [], "host": ["--moments", "offload"]}.items():
        code, _, stderr = cpt(model, tmp_path / name, jsonl, *options, *more)
        assert code == 0, stderr
    assert rows(tmp_path / "host") == rows(tmp_path / "here")
    here, host = files(tmp_path / "here"), files(tmp_path / "host")
    assert host.keys() == here.keys()
    assert all(torch.equal(host[name], here[name]) for name in here)
    step = tmp_path / "host/checkpoints/step-000006"
    code, _, stderr = cpt(step, tmp_path / "next", jsonl, *options, "--keep-optimizer")
    assert code == 0, stderr


def test_what_cannot_be_is_one_line(tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.save_mixtral(tmp_path / "model")
    code, _, stderr = cpt(model, tmp_path / "out", jsonl, "--no-master-weights", "--precision", "fp32")
    assert code == 1
    assert "--no-master-weights has no effect in fp32" in stderr
    code, _, stderr = cpt(model, tmp_path / "out", jsonl, "--moments", "offload")
    assert code == 1
    assert "--moments offload: this run is on cpu, not on a GPU with its own memory; leave it out" in stderr
    code, _, stderr = cpt(model, tmp_path / "out", jsonl, "--moments", "bf16")
    assert code == 0, stderr
    step = tmp_path / "out/checkpoints/step-000006"
    code, _, stderr = cpt(step, tmp_path / "next", jsonl, "--keep-optimizer")
    assert code == 1
    assert "another form of moments (--moments)" in stderr
    monkeypatch.setattr("moetool.train.optimizer.find_spec", lambda name: None)
    code, _, stderr = cpt(model, tmp_path / "other", jsonl, "--moments", "8bit")
    assert code == 1
    assert "torchao is not installed; run pip install torchao" in stderr


def test_a_sharded_moment_is_one_tensor(tmp_path: Path) -> None:
    """Not its parts, which are one process's: it is gathered as a whole."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)))
        ((name, tensor),) = parts(sharded)
        assert name == ""
        assert tensor is sharded
    finally:
        dist.destroy_process_group()


def test_an_update_that_cannot_be_compiled_is_one_line(
    tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: object, inputs: object) -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend=broken))
    code, _, stderr = cpt(tiny.save_mixtral(tmp_path / "model"), tmp_path / "out", jsonl, "--moments", "8bit")
    assert code == 1
    assert "use --no-compile, and leave out --moments and --no-master-weights, whose update is compiled" in stderr


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
def test_the_first_update_by_hand(moments: Any) -> None:
    """With bias corrections, Adam's first update is lr * g / (|g| + eps): lr * sign(g), whatever the gradient."""
    config = TrainConfig(model=Path("m"), out=Path("o"), train={}, moments=moments, weight_decay=0.0)
    weight = nn.Parameter(torch.zeros(64, 128))
    optimizer = adamw([weight], config)
    set_rate(optimizer, 0.25)
    weight.grad = torch.where(torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) < 0.5, -3.0, 3.0)
    sign = weight.grad.sign()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), -0.25 * sign, rtol=1e-5, atol=0)
    state = optimizer.state[weight]
    size = sum(t.numel() * t.element_size() for part in ("exp_avg", "exp_avg_sq") for _, t in parts(state[part]))
    numbers = 2 * 64 * 128
    assert (
        size == {"fp32": 4 * numbers, "bf16": 2 * numbers, "8bit": numbers + numbers // 256 * 4 + 2 * 4 * 256}[moments]
    )


def test_stochastic_rounding_is_right_on_average() -> None:
    """Updates of a tenth of bf16's spacing vanish when rounded to nearest; at random, a hundred move it by ten."""
    config = TrainConfig(model=Path("m"), out=Path("o"), train={}, master_weights=False, weight_decay=0.0)
    weight = nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    optimizer = adamw([weight], config)
    spacing = 2.0**-7  # of bf16 above 1
    set_rate(optimizer, spacing / 10)
    for step in range(100):
        torch.manual_seed(step)
        weight.grad = torch.full((64, 128), -1.0)
        optimizer.step()
    assert abs(float(weight.detach().float().mean()) - (1 + 10 * spacing)) < 0.1 * spacing
