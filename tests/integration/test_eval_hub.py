"""Suites and tasks of lm-eval itself, with data sets from a hub of our own in the schema of the real ones."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from safetensors.torch import load_file, save_file

from moetool import registry
from tests import evaluation_hub, hub, tiny

ARC_EASY = Path(lm_eval.tasks.__path__[0]) / "arc" / "arc_easy.yaml"  # by path: the index of all tasks takes seconds

Served = tuple[dict[str, str], list[tuple[str, int]]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("hub")
    evaluation_hub.save_suites(root)
    evaluation_hub.save_metrics(root)
    with hub.served(root, tmp_path_factory.mktemp("home")) as answer:
        yield answer


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a long window that ends its answer at once: all its logits are equal, and the end has id 0."""
    model = tiny.save_llama(tmp_path_factory.mktemp("models") / "silent", max_position_embeddings=4096)
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 0}, model / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return model


def run(served: Served, *arguments: object) -> tuple[int, Any, str]:
    done = tiny.cli("eval", *arguments, "--device", "cpu", "--json", env=served[0])
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def check_suite(name: str, document: Any, model: str, absent: tuple[str, ...] = ()) -> None:
    """Every benchmark's metric is among the scores under its key, and their mean is the average."""
    there = [b for b in registry.load("suite", name).benchmarks if b.task and b.task not in absent]
    scores = [document["results"][model][b.task][b.metric]["value"] / b.best for b in there]
    average = document["averages"][name][model]
    assert average["num_tasks"] == len(there)
    assert average["value"] == pytest.approx(sum(scores) / len(scores))
    assert all(0 <= score <= 1 for score in scores)


@pytest.mark.slow
def test_cpt_english_equals_lm_eval(served: Served, llama: Path, mixtral: Path, tmp_path: Path) -> None:
    code, document, stderr = run(served, mixtral, "--suite", "cpt-english", "--baseline", llama, "--out", tmp_path)
    assert (code, stderr) == (0, "")
    check_suite("cpt-english", document, "mixtral")
    assert "difference" in document["averages"]["cpt-english"]["mixtral"]
    tasks = ",".join(b.task for b in registry.load("suite", "cpt-english").benchmarks if b.task)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={mixtral}"]
    command += ["--device", "cpu", "--tasks", tasks, "--num_fewshot", "0", "--output_path", str(tmp_path / "r.json")]
    environment = os.environ | served[0] | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(next(tmp_path.glob("r_*.json")).read_text())
    ours = json.loads((tmp_path / "mixtral" / "results.json").read_text())
    for section in ("results", "n-shot", "n-samples", "versions"):
        assert ours[section] == theirs[section], section


@pytest.mark.slow
def test_cpt_german(served: Served, llama: Path) -> None:
    code, document, stderr = run(served, llama, "--suite", "cpt-german")
    assert (code, stderr) == (0, "")
    check_suite("cpt-german", document, "llama")


@pytest.mark.slow
def test_cpt_code_runs_what_the_model_writes_only_when_told(served: Served, silent: Path) -> None:
    code, _, stderr = run(served, silent, "--suite", "cpt-code")
    assert code == 1
    assert "humaneval would run code that the model writes" in stderr
    code, document, stderr = run(served, silent, "--suite", "cpt-code", "--limit", 4, "--allow-code-execution")
    assert code == 0, stderr
    assert "HumanEval pass@10 to pass@200 is left out" in stderr
    check_suite("cpt-code", document, "silent")
    assert document["results"]["silent"]["humaneval"]["pass@1,create_test"]["value"] == 0.5  # every other prompt


@pytest.mark.slow
def test_drop_upcycling_english(served: Served, silent: Path, tmp_path: Path) -> None:
    code, document, stderr = run(
        served, silent, "--suite", "drop-upcycling-english", "--limit", 2, "--batch-size", 4, "--out", tmp_path
    )
    assert (code, stderr) == (0, "")
    check_suite("drop-upcycling-english", document, "silent")
    assert document["results"]["silent"]["squadv2"]["exact,none"]["value"] == 100  # nothing is the right answer
    assert document["results"]["silent"]["bbh_cot_fewshot"]["exact_match,get-answer"]["num_documents"] == 54
    shots = json.loads((tmp_path / "results.json").read_text())["n-shot"]
    assert (shots["openbookqa"], shots["squadv2"], shots["bbh_cot_fewshot_snarks"]) == (4, 0, 3)


@pytest.mark.slow
def test_drop_upcycling_japanese(served: Served, silent: Path) -> None:
    code, document, stderr = run(served, silent, "--suite", "drop-upcycling-japanese", "--limit", 2)
    assert "warning: JEMHopQA is left out: lm-eval has no such task" in stderr
    if importlib.util.find_spec("fugashi") and importlib.util.find_spec("emoji"):
        check_suite("drop-upcycling-japanese", document, "silent")
        return
    # A task that needs more packages is one line; the others finish.
    assert code == 1
    assert "moetool: ja_leaderboard_xlsum failed: ModuleNotFoundError: " in stderr.splitlines()[-1]
    check_suite("drop-upcycling-japanese", document, "silent", absent=("ja_leaderboard_xlsum",))


@pytest.mark.slow
def test_offline_uses_what_an_earlier_run_brought(served: Served, silent: Path, tmp_path: Path) -> None:
    environment, asked = served
    here = ({**environment, "HF_HOME": str(tmp_path / "home")}, asked)
    squad = ARC_EASY.parents[1] / "squadv2" / "squadv2.yaml"  # its metric is of the hub, too
    arguments = [silent, "--tasks", f"{ARC_EASY},{squad}", "--limit", 3]
    code, _, stderr = run(here, *arguments, "--offline")
    assert code == 1
    assert "2 data sets are missing" in stderr
    assert "arc_easy.yaml (allenai/ai2_arc)" in stderr
    code, online, stderr = run(here, *arguments)
    assert code == 0, stderr
    before = len(asked)
    nowhere = ({**here[0], "HF_ENDPOINT": "http://127.0.0.1:9"}, asked)  # no network: nothing listens there
    for place, flags in ((here, ["--offline"]), (nowhere, [])):
        code, offline, stderr = run(place, *arguments, *flags)
        assert code == 0, stderr
        assert offline == online
    assert len(asked) == before
    code, _, stderr = run(({**nowhere[0], "HF_HOME": str(tmp_path / "empty")}, asked), *arguments)
    assert code == 1
    assert "2 data sets are missing" in stderr


@pytest.mark.slow
def test_a_data_set_made_by_a_script_is_one_line_and_the_others_finish(llama: Path, tmp_path: Path) -> None:
    root = tmp_path / "hub"
    evaluation_hub.save_suites(root)
    (root / "baber" / "piqa" / "piqa.py").write_text("raise SystemExit\n")
    piqa = ARC_EASY.parents[1] / "piqa" / "piqa.yaml"
    with hub.served(root, tmp_path / "home") as answer:
        code, document, stderr = run(answer, llama, "--tasks", f"{ARC_EASY},{piqa}", "--limit", 3)
    assert code == 1
    assert set(document["results"]["llama"]) == {"arc_easy"}
    (line,) = stderr.splitlines()
    assert "scripts are no longer supported" in line
