"""Several processes share the documents and give the same scores."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import evaluation, tiny

pytestmark = pytest.mark.slow


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, "-m", "moetool", "eval", *map(str, arguments)],
        capture_output=True, text=True, env=environment, check=False, timeout=240,
    )  # fmt: skip


def equal(one: Any, other: Any) -> None:
    """Equal but for the order of summation."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            equal(one[key], other[key])
    elif isinstance(one, list):
        for mine, its in zip(one, other, strict=True):
            equal(mine, its)
    else:
        assert one == (pytest.approx(other, rel=1e-7) if isinstance(one, float) else other)


def test_two_processes_give_the_scores_and_routes_of_one(mixtral: Path, llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    evaluation.save_choices(folder, number=11)  # odd: lm-eval fills up the shorter share
    evaluation.save_rolling(folder, number=7)
    evaluation.save_generation(folder, number=5)
    arguments = [
        mixtral, "--tasks", "choices,rolling,generation", "--include-path", folder, "--routing", "--json",
        "--baseline", llama, "--log-samples", "--device", "cpu",
    ]  # fmt: skip
    done = launch(*arguments, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    code, alone, stderr = tiny.in_process("eval", *arguments, "--out", tmp_path / "one")
    assert code == 0, stderr
    two, one = json.loads(done.stdout), json.loads(alone)
    for section in ("results", "routing"):
        equal(two[section], one[section])
    (samples,) = (tmp_path / "two" / "mixtral").glob("samples_rolling_*.jsonl")
    assert [json.loads(line)["doc_id"] for line in samples.read_text().splitlines()] == list(range(7))
    again = launch(*arguments, "--out", tmp_path / "two")
    assert json.loads(again.stdout)["results"] == two["results"]


def test_accelerate_launch_gives_the_same(mixtral: Path, tmp_path: Path) -> None:
    arguments = ["eval", mixtral, "--text", f"t={tiny.save_jsonl(tmp_path / 't.jsonl', repeat=2)}", "--json"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "-m", "moetool"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    for device in (["--device", "cpu"], ["--device-map", "auto"]):
        code, stdout, stderr = tiny.in_process(*arguments, *device)
        assert (code, stderr) == (0, "")
        equal(json.loads(stdout)["results"], json.loads(done.stdout)["results"])


@pytest.mark.parametrize("shared", [[], ["--fsdp", 2]], ids=["whole", "shared"])
def test_a_failure_in_one_process_ends_all(llama: Path, tmp_path: Path, shared: list[object]) -> None:
    evaluation.save_generation(tmp_path, "broken", number=4)
    judge = "import os\ndef judge(doc, results):\n    assert os.environ['RANK'] == '0', 'not here'\n"
    (tmp_path / "judge.py").write_text(judge + "    return {'exact_match': 1}\n")
    with (tmp_path / "broken.yaml").open("a") as file:
        file.write("process_results: !function judge.judge\n")
    done = launch(llama, "--tasks", "broken", "--include-path", tmp_path, *shared)
    assert done.returncode != 0
    assert "moetool: broken on llama failed: AssertionError: not here" in done.stderr


def test_more_processes_than_documents(llama: Path, tmp_path: Path) -> None:
    evaluation.save_choices(tmp_path, number=1)
    done = launch(llama, "--tasks", "choices", "--include-path", tmp_path)
    assert done.returncode != 0
    assert "1 documents for 2 processes; launch fewer" in done.stderr
