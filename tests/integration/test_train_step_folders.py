"""Step folders written and read by several processes: the same tensors in any mesh, and no fault goes unnoticed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moetool.checkpoint.model import load_model
from moetool.train import state
from tests import forked, step_folders, tiny

ROOT = Path(__file__).parents[2]


def launch(num_processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command += ["-m", "tests.step_folders", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT, check=False)


def tensors(out: Path) -> dict[tuple[str, str], Tensor]:
    """All tensors of a run's first step folder, by kind of file and name; each is in one file."""
    found: dict[tuple[str, str], Tensor] = {}
    for kind in ("model", "training_state/master", "training_state/optimizer"):
        for path in state.step_folder(out, 1).glob(f"{kind}*.safetensors"):
            for name, tensor in load_file(path).items():
                assert (kind, name) not in found
                found[kind, name] = tensor
    return found


def assert_same(out: Path, other: Path) -> None:
    ours, theirs = tensors(out), tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.slow
def test_what_a_process_holds_is_known(tmp_path: Path) -> None:
    done = launch(4, "held")
    assert done.returncode == 0, done.stderr


def test_what_one_process_writes_two_read_and_write(tmp_path: Path) -> None:
    model, one, two = tiny.save_mixtral(tmp_path / "model", dtype=torch.bfloat16), tmp_path / "one", tmp_path / "two"
    step_folders.write_and_read("1", model, one)
    assert {path.name for path in state.step_folder(one, 1).rglob("*.safetensors")} == {
        "model.safetensors",
        "master.safetensors",
        "optimizer.safetensors",
    }
    forked.together(2, tmp_path, "tests.step_folders:main", "2", model, two, one)
    assert "optimizer-00002-of-00002.safetensors" in {path.name for path in state.step_folder(two, 1).rglob("*")}
    assert_same(one, two)
    assert_same(one, one / "by-2")
    load_model(state.step_folder(two, 1))  # any step folder is a stock checkpoint
    step_folders.write_and_read("1", model, one, two)
    assert_same(one, two / "by-1")


@pytest.mark.slow
def test_what_any_mesh_writes_any_other_reads(tmp_path: Path) -> None:
    model = tiny.save_mixtral(tmp_path / "model", dtype=torch.bfloat16)
    outs = {mesh: tmp_path / mesh for mesh in ("1", "2", "4", "2x2")}
    step_folders.write_and_read("1", model, outs["1"])
    for mesh, others in (("2", "1"), ("4", "12"), ("2x2", "124"), ("2", "4"), ("4", "")):
        num_processes = {"2": 2}.get(mesh, 4)
        read = [outs[other] for other in others] or [outs["2x2"]]
        done = launch(num_processes, mesh, model, outs[mesh], *read)
        assert done.returncode == 0, done.stderr
        for written in (outs[mesh], *(out / f"by-{mesh}" for out in read)):
            assert_same(outs["1"], written)
    done = launch(2, "2", model, outs["2"], outs["2x2"])
    assert done.returncode == 0, done.stderr
    step_folders.write_and_read("1", model, outs["1"], outs["4"], outs["2x2"])
    for written in (outs["2x2"] / "by-2", outs["2x2"] / "by-1", outs["4"] / "by-1"):
        assert_same(outs["1"], written)


def test_troubles_of_one_process_reach_all(tmp_path: Path, mixtral: Path) -> None:
    out = tmp_path / "out"
    done = launch(2, "troubles", mixtral, out)  # asserts most by itself, then one process is killed
    assert "exitcode: -9" in done.stderr.replace("exitcode  :", "exitcode:"), done.stderr
    assert "AssertionError" not in done.stderr, done.stderr
    assert state.saved_steps(out) == [1, 2]  # step 4 was being written
    assert state.find(out).step == 1  # step 2 was damaged


@pytest.mark.slow
def test_a_signal_ends_a_process_that_waits_for_another_one(tmp_path: Path, mixtral: Path) -> None:
    done = launch(2, "alone", mixtral, tmp_path / "out")
    assert "left before the other" in done.stdout, done.stderr
