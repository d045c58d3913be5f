"""Upcycling in several processes: the same bytes, the same errors, and nothing left behind by a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetool.checkpoint.writer import CheckpointWriter
from moetool.surgery import kinds
from tests import tiny


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose result has 25 MB."""
    folder = tmp_path_factory.mktemp("dense")
    return tiny.save_llama(folder / "dense", hidden_size=128, intermediate_size=512, num_hidden_layers=4)


@pytest.fixture
def _many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes for the smallest model, too."""
    monkeypatch.setattr("moetool.surgery.workers.BYTES_PER_WORKER", 1)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "moetool.yaml"}


def children(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except FileNotFoundError:
        return []


@pytest.mark.usefixtures("_many")
@pytest.mark.parametrize("method", ["drop", "noise", "scratch"])
def test_the_same_bytes_and_proof_with_any_number_of_workers(dense: Path, method: str, tmp_path: Path) -> None:
    found = []
    for workers in (1, 2, 5):
        out = tmp_path / f"moe-{workers}"
        options = ("--method", method, "--max-shard-size", "3MB", "--workers", workers, "--json")
        code, text, err = tiny.in_process("upcycle", dense, out, "--verify", "full", *options)
        assert code == 0, err
        found.append((files(out), json.loads(text)["proof"]))
        shutil.rmtree(out)
    assert found[0] == found[1] == found[2]
    assert len([name for name in found[0][0] if name.endswith(".safetensors")]) > 5


@pytest.mark.usefixtures("_many")
def test_what_a_failed_run_completed_is_hashed_and_kept(dense: Path, tmp_path: Path) -> None:
    common = ("--max-shard-size", "3MB", "--verify", "none", "--workers", 3)
    assert tiny.in_process("upcycle", dense, tmp_path / "whole", *common)[0] == 0
    out, real, closed = tmp_path / "moe", CheckpointWriter.close, 0

    def close(self: CheckpointWriter, *arguments: object) -> None:
        nonlocal closed
        closed += 1
        if closed > 3:
            raise OSError(5, "Input/output error", str(out))
        real(self, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "close", close)
        code, _, err = tiny.in_process("upcycle", dense, out, *common)
    assert (code, err.count("\n")) == (1, 1)
    assert "input/output error" in err
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert len(kept) == 3
    assert not list(out.glob("*.unfinished"))
    assert tiny.in_process("upcycle", dense, out, *common)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert files(out) == files(tmp_path / "whole")
    shard = sorted(out.glob("*.safetensors"))[2]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    code, _, err = tiny.in_process("verify", out, "--workers", 3)
    assert (code, err.count("\n")) == (1, 1)
    assert shard.name in err


@pytest.mark.usefixtures("_many")
@pytest.mark.parametrize("workers", [1, 4])
def test_an_error_in_a_worker_is_the_same_line(
    dense: Path, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = shutil.copytree(dense, tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][7, 3] = torch.nan
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    code, _, err = tiny.in_process("upcycle", bad, tmp_path / "moe", "--workers", workers)
    assert code == 1
    assert err == (
        f"moetool: {bad}/model.safetensors: tensor model.layers.2.mlp.up_proj.weight holds NaN or infinity; nothing"
        " was written; fix the source or fetch it again\n"
    )

    def make(*arguments: object) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(kinds.Kind, "make", make)
    code, _, err = tiny.in_process("upcycle", dense, tmp_path / "moe", "--workers", workers)
    assert (code, err) == (
        1,
        "moetool: out of memory; use fewer --workers, with a text a smaller --batch-size or --seq-len\n",
    )
    assert not list((tmp_path / "moe").glob("*.unfinished"))

    def bug(*arguments: object) -> torch.Tensor:
        raise KeyError("a bug")

    monkeypatch.setattr(kinds.Kind, "make", bug)
    code, _, err = tiny.in_process("upcycle", dense, tmp_path / "moe", "--workers", workers)
    assert code == 70
    assert "in bug" in err
    assert "KeyError: 'a bug'" in err


def alive(process: str) -> bool:
    """Whether a process runs: one that nobody has waited for yet is a zombie, and has given everything back."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def running(*arguments: object) -> tuple[subprocess.Popen[str], list[str]]:
    """A `moetool` whose workers are writing, and these."""
    command = [sys.executable, "-m", "moetool", *map(str, arguments)]
    out = Path(str(arguments[2]))
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 120
    while not list(out.glob("model*.unfinished")) or not (workers := children(process.pid)):
        assert process.poll() is None
        assert time.monotonic() < until
    return process, workers


@pytest.mark.parametrize(
    ("signum", "code", "line"),
    [(signal.SIGKILL, -9, ""), (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_leaves_no_worker(dense: Path, signum: int, code: int, line: str, tmp_path: Path) -> None:
    out, common = tmp_path / "moe", ("--num-experts", 32, "--max-shard-size", "9MB", "--verify", "none", "--workers", 2)
    process, workers = running("upcycle", dense, out, *common)
    try:
        if signum == signal.SIGINT:  # as the terminal sends it
            os.killpg(process.pid, signum)
        else:
            process.send_signal(signum)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert len(workers) == 2
    assert process.returncode == code
    assert err == (f"moetool: {line}\n" if line else "")
    if signum != signal.SIGKILL:  # those of one that is killed end a moment later
        assert not any(map(alive, workers))
        assert not list(out.glob("*.unfinished"))
    assert not (out / "config.json").exists()
    code, _, err = tiny.in_process("upcycle", dense, out, *common)  # at once: it waits for them
    assert code == 0, err
    assert not any(map(alive, workers))
    assert tiny.in_process("upcycle", dense, tmp_path / "whole", *common)[0] == 0
    assert files(out) == files(tmp_path / "whole")
