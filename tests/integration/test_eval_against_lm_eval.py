"""The numbers are those of the `lm_eval` command, to the last digit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import evaluation, tiny

# One task of each kind of request. lm-eval runs the kinds apart, so even its batches are ours.
TASKS = ["choices", "rolling", "generation"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    evaluation.save_choices(folder)
    evaluation.save_rolling(folder)
    evaluation.save_generation(folder)
    return folder


def lm_eval(model: Path, folder: Path, out: Path, *arguments: object) -> Any:
    """Run the real command; its results file."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}"]
    command += ["--device", "cpu", "--include_path", str(folder), "--output_path", str(out / "r.json")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(next(out.glob("r_*.json")).read_text())


def test_scores_equal_the_lm_eval_command(mixtral: Path, folder: Path, tmp_path: Path) -> None:
    arguments = ["--num_fewshot", 2, "--batch_size", 3, "--limit", 7]
    theirs = lm_eval(mixtral, folder, tmp_path, "--tasks", ",".join(TASKS), "--log_samples", *arguments)
    out = tmp_path / "out"
    ours = [str(a).replace("num_fewshot", "num-fewshot").replace("batch_size", "batch-size") for a in arguments]
    code, stdout, stderr = tiny.in_process(
        "eval", mixtral, "--tasks", ",".join(TASKS), "--include-path", folder, "--log-samples", "--device", "cpu",
        "--out", out, "--json", *ours,
    )  # fmt: skip
    assert code == 0, stderr
    results = json.loads((out / "results.json").read_text())
    assert results["results"] == theirs["results"]
    for configs in (results["configs"], theirs["configs"]):
        for config in configs.values():
            del config["metadata"]  # lm_eval notes its model_args there
    for section in ("configs", "versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks", "task_hashes"):
        assert results[section] == theirs[section], section
    assert theirs.keys() - results.keys() <= {"start_time", "end_time", "total_evaluation_time_seconds"}
    assert results["config"].keys() == theirs["config"].keys()
    # The same documents, prompts and answers, in files that lm-eval's helpers find.
    for task in TASKS:
        (mine,) = out.glob(f"samples_{task}_*.jsonl")
        (other,) = tmp_path.glob(f"samples_{task}_*.jsonl")
        assert [json.loads(x) for x in mine.read_text().splitlines()] == [
            json.loads(x) for x in other.read_text().splitlines()
        ]
    # And moetool's document repeats them.
    document = json.loads(stdout)["results"]["mixtral"]
    assert document["choices"]["acc,none"]["value"] == theirs["results"]["choices"]["acc,none"]
    assert document["choices"]["acc,none"]["stderr"] == theirs["results"]["choices"]["acc_stderr,none"]
    assert document["rolling"]["bits_per_byte,none"]["value"] == theirs["results"]["rolling"]["bits_per_byte,none"]


def test_lm_eval_reads_the_results(mixtral: Path, folder: Path, tmp_path: Path) -> None:
    from lm_eval.utils import get_file_task_name, get_sample_results_filenames, make_table

    code, _, stderr = tiny.in_process(
        "eval",
        mixtral,
        "--tasks",
        "choices",
        "--include-path",
        folder,
        "--limit",
        4,
        "--log-samples",
        "--out",
        tmp_path,
    )
    assert code == 0, stderr
    table = make_table(json.loads((tmp_path / "results.json").read_text()))
    assert "choices" in table
    assert "acc_norm" in table
    (samples,) = get_sample_results_filenames([str(file) for file in tmp_path.iterdir()])
    assert get_file_task_name(Path(samples).name) == "choices"
