"""Two launchers on this machine stand for two machines: they meet at an address and train as one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny


def launch(folder: Path, ranks: dict[int, Path], out: object, *more: object) -> list[subprocess.CompletedProcess[str]]:
    """One launcher a machine, each in a folder of its own that holds the same model and text."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, place in ranks.items():
        environment = os.environ | {
            "ACCELERATE_USE_CPU": "true", "MOETOOL_CACHE": str(folder / f"cache-{rank}"), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }  # fmt: skip
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", rank),
            *("--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port, "-m", "moetool"),
            *("cpt", "moe", out, "--train", "a=text.jsonl", "--seq-len", 32, "--global-batch-size", 4),
            *("--micro-batch-size", 2, "--precision", "fp32", *more),
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([str(c) for c in command], cwd=place, env=environment, **pipes))  # type: ignore[call-overload]
    done = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


@pytest.mark.slow
def test_two_machines_train_as_one_and_go_on_where_out_is_shared(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for place in (first, second):
        place.mkdir()
        tiny.save_mixtral(place / "moe")
        tiny.save_jsonl(place / "text.jsonl")
    out, places, steps = tmp_path / "run", {0: first, 1: second}, ("--max-steps", 4, "--save-every", 2)
    apart = launch(tmp_path, places, "run", *steps)
    assert [d.returncode for d in apart] == [1, 1]
    assert "OUT must be on a file system that all processes share" in apart[0].stderr
    done = launch(tmp_path, places, out, *steps)
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    alone = tiny.in_process(
        *("cpt", first / "moe", tmp_path / "alone", "--train", f"a={first / 'text.jsonl'}", "--seq-len", 32),
        *("--global-batch-size", 4, "--micro-batch-size", 2, "--max-steps", 4, "--json"),
    )
    assert alone[0] == 0, alone[2]
    together = json.loads((out / "summary.json").read_text())
    assert together["loss"] == pytest.approx(json.loads(alone[1])["loss"], abs=1e-5)
    again = launch(tmp_path, places, out, "--max-steps", 4)
    assert [d.returncode for d in again] == [0, 0], again[0].stderr + again[1].stderr
    assert "already finished" in again[0].stdout
