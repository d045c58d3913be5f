"""`moetool eval` where things go wrong: kills, ruined models, code that models write."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests import evaluation, tiny
from tests.forked import start, wait_until

JUDGE = """
import os
import time


def run(doc, results):
    time.sleep(float(os.environ.get("SLOW", "0")))
    space = {}
    exec(doc["code"].replace("ANSWER", repr(results[0])), space)
    return {"exact_match": space["passed"]}
"""


def save_code(folder: Path, **settings: Any) -> None:
    """A task whose own metric runs code."""
    evaluation.save_task(
        folder, "code", [{"prompt": "fox", "code": f"passed = len(ANSWER) > {n}"} for n in (-1, 1000)],
        output_type="generate_until", doc_to_text="{{prompt}}", doc_to_target="", **settings,
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        metric_list=[evaluation.metric("exact_match")],
    )  # fmt: skip
    (folder / "judge.py").write_text(JUDGE)
    with (folder / "code.yaml").open("a") as file:
        file.write("process_results: !function judge.run\n")


def test_code_that_a_model_writes_runs_with_permission_only(llama: Path, tmp_path: Path) -> None:
    save_code(tmp_path, unsafe_code=True)
    arguments = ["eval", llama, "--tasks", "code", "--include-path", tmp_path, "--device", "cpu", "--json"]
    code, stdout, stderr = tiny.in_process(*arguments)
    assert (code, stdout) == (1, "")
    assert "code would run code that the model writes" in stderr
    code, stdout, stderr = tiny.in_process(*arguments, "--allow-code-execution")
    assert code == 0, stderr
    assert json.loads(stdout)["results"]["llama"]["code"]["exact_match,none"]["value"] == 0.5
    assert "HF_ALLOW_CODE_EVAL" not in os.environ  # the permission ends with the run


def test_after_a_kill_the_tasks_left_are_run(llama: Path, tmp_path: Path) -> None:
    evaluation.save_choices(tmp_path)
    save_code(tmp_path)
    out = tmp_path / "out"
    arguments = ["eval", llama, "--tasks", "choices,code", "--include-path", tmp_path, "--limit", 2, "--out", out]
    running = start(tmp_path / "first", *arguments, SLOW="600")
    assert wait_until(lambda: len(list(out.glob(".cache/*.json"))) == 1, running, 120)
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    assert not (out / "results.json").exists()
    code, stdout, stderr = tiny.in_process(*arguments, "--json")
    assert code == 0, stderr
    document = json.loads(stdout)
    assert document["num_kept"] == 1
    assert set(document["results"]["llama"]) == {"choices", "code"}


def plain_json(path: Path) -> Any:
    """Read a file as JSON that knows no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_ruined_model_has_no_score(llama: Path, mixtral: Path, tmp_path: Path) -> None:
    ruined = tiny.save_mixtral(tmp_path / "ruined")
    tensors = load_file(ruined / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * float("nan")},
              ruined / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    text, out = tiny.save_jsonl(tmp_path / "t.jsonl", repeat=1), tmp_path / "out"
    for again in (False, True):  # the same from a kept result
        code, stdout, stderr = tiny.in_process(
            "eval", ruined, mixtral, "--text", f"t={text}", "--baseline", llama, "--routing", "--out", out,
            "--device", "cpu", "--json",
        )  # fmt: skip
        assert code == 1
        assert "t on ruined failed: bits_per_byte is nan; check the weights for NaN" in stderr.splitlines()[-1]
        document = json.loads(stdout)
        assert document["results"]["ruined"] == {}
        assert "difference" in document["results"]["mixtral"]["t"]["bits_per_byte,none"]
        assert plain_json(out / "results.json")["moetool"]["failed"] == document["failed"]
        assert document["num_kept"] == (3 if again else 0)


def test_a_tokenizer_that_drops_all_text_gives_no_score(tmp_path: Path) -> None:
    model = tiny.save_llama(tmp_path / "model")
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[\\s\\S]"}, "content": ""}
    file.write_text(json.dumps(tokenizer))
    code, _, stderr = tiny.in_process(
        "eval", model, "--text", f"t={tiny.save_jsonl(tmp_path / 't.jsonl', repeat=1)}", "--device", "cpu"
    )
    assert code == 1
    assert "t on model failed: the tokenizer makes no tokens from any document" in stderr


def test_a_failed_tasks_line_says_something(llama: Path, tmp_path: Path) -> None:
    evaluation.save_generation(tmp_path, "loud", number=2)
    (tmp_path / "judge.py").write_text("def run(doc, results):\n    raise ValueError('\\n####\\nNot allowed.')\n")
    with (tmp_path / "loud.yaml").open("a") as file:
        file.write("process_results: !function judge.run\n")
    code, _, stderr = tiny.in_process("eval", llama, "--tasks", tmp_path / "loud.yaml", "--device", "cpu")
    assert code == 1
    assert stderr == "moetool: loud on llama failed: ValueError: Not allowed.\n"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_local_group_with_few_shots_equals_its_tasks(llama: Path, tmp_path: Path, batch_size: int) -> None:
    for seed, name in enumerate("ab"):
        evaluation.save_choices(tmp_path, name, number=8 + seed, seed=seed)
    group = {
        "group": "mean",
        "task": ["a", "b"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}],
    }
    (tmp_path / "mean.yaml").write_text(yaml.safe_dump(group))
    arguments = ["--num-fewshot", 2, "--limit", 5, "--batch-size", batch_size, "--device", "cpu", "--json"]
    found = []
    for names in ("mean", "a,b"):
        code, stdout, stderr = tiny.in_process(
            "eval", llama, "--tasks", names, "--include-path", tmp_path, *arguments, "--out", tmp_path / names
        )
        assert code == 0, stderr
        found.append(json.loads(stdout)["results"]["llama"])
    together = found[0].pop("mean")
    assert found[0] == found[1]
    assert together["acc,none"]["value"] == pytest.approx((found[1]["a"]["acc,none"]["value"] + found[1]["b"]["acc,none"]["value"]) / 2)  # fmt: skip  # noqa: E501
    assert together["acc,none"]["num_documents"] == 10
    assert json.loads((tmp_path / "mean" / "results.json").read_text())["n-shot"]["a"] == 2
