"""`moetool eval` as users run it."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moetool.evaluate.harness import Harness
from tests import evaluation, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    evaluation.save_choices(folder)
    evaluation.save_choices(folder, "choices2", number=10, seed=5)
    evaluation.save_rolling(folder)
    evaluation.save_generation(folder)
    return folder


def run(*arguments: object) -> Any:
    code, stdout, stderr = tiny.in_process("eval", *arguments, "--device", "cpu", "--json")
    assert code == 0, stderr
    return json.loads(stdout)


def fail(*arguments: object) -> tuple[int, str]:
    device = [] if "--device" in arguments or "--device-map" in arguments else ["--device", "cpu"]
    code, _, stderr = tiny.in_process("eval", *arguments, *device)
    assert code != 0
    (line,) = [line for line in stderr.splitlines() if not line.startswith("warning:")]
    assert "Traceback" not in line
    return code, line


def bits_per_byte(model_folder: Path, documents: list[str]) -> float:
    """Rolling log-likelihood, computed without lm-eval: every token is predicted once; a window is 128 tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    window, nats, size = 128, 0.0, 0
    for document in documents:
        tokens = [tokenizer.eos_token_id, *tokenizer.encode(document)]
        size += len(document.encode())
        for start in range(0, len(tokens) - 1, window):
            end = min(start + window, len(tokens) - 1)
            context = tokens[max(0, end - window) : end]
            with torch.no_grad():
                logits = model(torch.tensor([context])).logits[0].log_softmax(-1)
            targets = torch.tensor(tokens[start + 1 : end + 1])
            nats -= float(logits[-len(targets) :].gather(1, targets[:, None]).sum())
    return nats / size / math.log(2)


def test_text_in_bits_per_byte_equals_an_independent_computation(llama: Path, tmp_path: Path) -> None:
    documents = [*evaluation.texts(4), "[1, 2]", "12", "\u65e5\u672c\u8a9e {{text}} \\ % $"]
    source = tiny.save_jsonl(tmp_path / "t.jsonl")
    source.write_text("\n".join(json.dumps({"body": d}) for d in documents), encoding="utf-8")
    result = run(llama, "--text", f"prose={source}", "--text-field", "body")["results"]["llama"]["prose"]
    assert list(result) == ["bits_per_byte,none"]
    score = result["bits_per_byte,none"]
    assert score["value"] == pytest.approx(bits_per_byte(llama, documents), rel=1e-6)
    assert score["num_documents"] == len(documents)
    assert score["higher_is_better"] is False
    assert score["stderr"] > 0
    limited = run(llama, "--text", f"prose={source}", "--text-field", "body", "--limit", 2)
    limited_score = limited["results"]["llama"]["prose"]["bits_per_byte,none"]
    assert limited_score["value"] == pytest.approx(bits_per_byte(llama, documents[:2]), rel=1e-6)


def test_plain_text_by_line_and_nothing_left_in_the_data_set_cache(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "t.txt").write_text("first line\nsecond line\n", encoding="utf-8")
    result = run(llama, "--text", f"t={tmp_path}/t.txt", "--document", "line")
    assert result["results"]["llama"]["t"]["bits_per_byte,none"]["num_documents"] == 2
    assert not (tmp_path / "cache").exists()


def test_models_side_by_side_with_a_baseline(llama: Path, mixtral: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluation.save_group(folder, "both", ["choices", "choices2"])
    result = run(
        mixtral, "--tasks", "both", "--text", f"t={tiny.save_jsonl(tmp_path / 't.jsonl')}",
        "--include-path", folder, "--baseline", llama, "--out", out,
    )  # fmt: skip
    assert list(result["models"]) == ["llama", "mixtral"]
    assert result["baseline"] == "llama"
    ours, theirs = result["results"]["mixtral"], result["results"]["llama"]
    assert set(ours) == {"both", "choices", "choices2", "t"}
    for task, metrics in ours.items():
        for key, score in metrics.items():
            difference = score["difference"]
            assert difference["value"] == pytest.approx(score["value"] - theirs[task][key]["value"])
            assert difference["outside_noise"] == (abs(difference["value"]) > 2 * difference["stderr"])
    assert "difference" not in theirs["t"]["bits_per_byte,none"]
    # The group is weighted by size: 30 and 10 documents.
    group = (3 * ours["choices"]["acc,none"]["value"] + ours["choices2"]["acc,none"]["value"]) / 4
    assert ours["both"]["acc,none"]["value"] == pytest.approx(group)
    # A folder each with lm-eval's own layout, and the comparison.
    assert json.loads((out / "results.json").read_text())["moetool"]["results"] == result["results"]
    mine = json.loads((out / "mixtral" / "results.json").read_text())
    assert mine["results"]["choices"]["acc,none"] == ours["choices"]["acc,none"]["value"]
    assert mine["group_subtasks"] == {"both": ["choices", "choices2"]}
    assert (out / "moetool.yaml").read_text().startswith("# moetool eval\n")


def test_a_suite_is_averaged_over_its_tasks(llama: Path, mixtral: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(["hellaswag_de", "arc_de", "truthfulqa_de_mc2"]):  # in the place of the real ones
        evaluation.save_choices(tmp_path, name, number=6, seed=seed)
    result = run(mixtral, "--suite", "cpt-german", "--include-path", tmp_path, "--baseline", llama)
    scores, average = result["results"]["mixtral"], result["averages"]["cpt-german"]["mixtral"]
    parts = [scores["hellaswag_de"]["acc_norm,none"], scores["arc_de"]["acc_norm,none"]]
    parts.append(scores["truthfulqa_de_mc2"]["acc,none"])
    assert average["num_tasks"] == 3
    assert average["value"] == pytest.approx(sum(p["value"] for p in parts) / 3)
    assert average["stderr"] == pytest.approx(sum(p["stderr"] ** 2 for p in parts) ** 0.5 / 3)
    assert average["difference"]["value"] == pytest.approx(sum(p["difference"]["value"] for p in parts) / 3)
    assert "difference" not in result["averages"]["cpt-german"]["llama"]


@pytest.mark.slow
def test_every_suite_names_tasks_that_lm_eval_has() -> None:
    from lm_eval.tasks import TaskManager

    from moetool import registry

    known = set(TaskManager().all_tasks)
    for name in registry.names("suite"):
        tasks = [benchmark.task for benchmark in registry.load("suite", name).benchmarks]
        assert {task for task in tasks if task} <= known
        assert any(tasks)


@pytest.mark.slow
def test_a_pattern_matches_local_tasks_and_lm_evals_own(tmp_path: Path) -> None:
    from moetool.evaluate.lookup import find

    evaluation.save_choices(tmp_path, "arc_mine")
    _, names = find({"arc_*": 3}, tmp_path)
    assert {"arc_mine", "arc_easy"} <= set(names)
    assert set(names.values()) == {3}
    evaluation.save_group(tmp_path, "mixed", ["arc_mine", "arc_easy"])
    assert "arc_easy" in find({"mixed": None}, tmp_path)[0].task_index
    assert "arc_easy" in find({str(tmp_path / "mixed.yaml"): None}, tmp_path)[0].task_index
    assert "arc_easy" not in find({str(tmp_path / "arc_mine.yaml"): None}, None)[0].task_index


def test_paired_difference_equals_one_made_from_the_samples(
    llama: Path, mixtral: Path, folder: Path, tmp_path: Path
) -> None:
    result = run(
        llama, mixtral, "--tasks", "choices", "--include-path", folder, "--baseline", llama, "--log-samples",
        "--out", tmp_path,
    )  # fmt: skip
    accuracy = []
    for name in ("llama", "mixtral"):
        (samples,) = (tmp_path / name).glob("samples_choices_*.jsonl")
        accuracy.append(torch.tensor([json.loads(line)["acc"] for line in samples.read_text().splitlines()]))
    paired = (accuracy[1] - accuracy[0]).double()
    difference = result["results"]["mixtral"]["choices"]["acc,none"]["difference"]
    assert difference["value"] == pytest.approx(float(paired.mean()))
    assert difference["stderr"] == pytest.approx(float(paired.std()) / len(paired) ** 0.5)


def test_table_and_names_of_models_with_the_same_last_part(llama: Path, folder: Path, tmp_path: Path) -> None:
    for run_name in ("a", "b"):
        shutil.copytree(llama, tmp_path / run_name / "final")
    models = [tmp_path / name / "final" for name in ("a", "b")]
    code, stdout, stderr = tiny.in_process(
        "eval", *models, "--tasks", "choices", "--include-path", folder, "--limit", 3
    )
    assert (code, stderr) == (0, "")
    assert "a/final" in stdout
    assert "b/final" in stdout
    assert "acc ↑" in stdout
    assert "±" in stdout


def test_json_is_one_document_in_a_real_process(llama: Path, folder: Path) -> None:
    done = tiny.cli(
        "eval", llama, "--tasks", "choices,rolling", "--include-path", folder, "--batch-size", "auto", "--limit", 2,
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no chatter of lm-eval, transformers or datasets
    assert set(json.loads(done.stdout)["results"]["llama"]) == {"choices", "rolling"}


def test_without_out_nothing_is_written(
    llama: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(llama, "--tasks", "choices", "--include-path", folder, "--limit", 2)
    assert list(tmp_path.iterdir()) == []


def test_config_file_repeats_a_run(llama: Path, folder: Path, tmp_path: Path) -> None:
    first = run(llama, "--tasks", "choices", "--include-path", folder, "--limit", 5, "--out", tmp_path / "a")
    again = run("--config", tmp_path / "a" / "moetool.yaml", "--out", tmp_path / "b")
    assert again["results"] == first["results"]


# Mistakes: one line, before any weight is loaded.


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("moetool.evaluate.evaluation.load_model", refuse)


@pytest.mark.usefixtures("no_weights")
def test_mistakes_are_told_before_weights_are_loaded(llama: Path, folder: Path, tmp_path: Path) -> None:
    evaluation.save_choices(tmp_path / "tasks")
    (tmp_path / "tasks" / "mine.yaml").write_text("task: mine\n  x: [")
    code, line = fail(llama, "--tasks", "choises", "--include-path", tmp_path / "tasks")
    assert code == 1
    assert "unknown task 'choises', did you mean 'choices'" in line
    assert "mine.yaml (" in line
    assert "cannot be read as a task" in fail(llama, "--tasks", tmp_path / "tasks" / "mine.yaml")[1]
    assert "no task file" in fail(llama, "--tasks", tmp_path / "none.yaml")[1]
    assert "no folder" in fail(llama, tmp_path / "absent", "--tasks", "choices", "--include-path", folder)[1]
    assert "tokenizer" in fail(shutil_without(llama, tmp_path, "tokenizer*"), "--tasks", "choices")[1]
    assert "is not a folder" in fail(llama, "--tasks", "choices", "--include-path", tmp_path / "absent")[1]
    assert fail(llama)[0] == 2
    assert fail(llama, "--tasks", "choices", "--log-samples")[0] == 2
    assert fail(llama, "--tasks", "choices", "--device-map", "auto", "--device", "cpu")[0] == 2
    assert fail(llama, "--tasks", "choices", "--batch-size", "many")[0] == 2
    assert fail(llama, "--tasks", "choices", "--limit", "1.5")[0] == 2
    assert "did you mean 'cpt-english'" in fail(llama, "--suite", "cpt-englsh")[1]
    assert "no device 'quux' here" in fail(llama, "--text", f"t={llama}/config.json", "--device", "quux")[1]
    assert "holds no documents" in fail(llama, "--text", f"t={empty(tmp_path)}")[1]


def shutil_without(model: Path, tmp_path: Path, pattern: str) -> Path:
    copy = shutil.copytree(model, tmp_path / "copy", ignore=shutil.ignore_patterns(pattern))
    return Path(copy)


def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty.txt").write_text("\n")
    return tmp_path / "empty.txt"


def test_a_task_that_cannot_build_its_requests(llama: Path, tmp_path: Path) -> None:
    evaluation.save_choices(tmp_path, number=3)
    code, line = fail(llama, "--tasks", "choices", "--include-path", tmp_path, "--num-fewshot", 9)
    assert code == 1
    assert line.startswith("moetool: choices failed: ValueError: Sample larger than population")


@pytest.mark.usefixtures("no_weights")
def test_absent_data_sets_are_all_named(llama: Path, folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        evaluation.save_choices(tmp_path, name)
    evaluation.save_task(tmp_path, "hub", [], dataset_path="nobody/nothing", dataset_kwargs={}, doc_to_text="x")
    evaluation.save_group(tmp_path, "all", ["one", "two", "hub"])
    (tmp_path / "one.jsonl").unlink()
    for flags in ([], ["--offline"]):
        _, line = fail(llama, "--tasks", "all", "--include-path", tmp_path, *flags)
        assert "2 data sets are missing" in line
        assert "hub (nobody/nothing)" in line
        assert f"one ({tmp_path}/one.jsonl)" in line
        assert "two" not in line.split(" ", 7)[-1].split(";")[0]


@pytest.mark.usefixtures("no_weights")
def test_code_tasks_need_permission(llama: Path, tmp_path: Path) -> None:
    evaluation.save_generation(tmp_path, "code")
    with (tmp_path / "code.yaml").open("a") as file:
        file.write("unsafe_code: true\n")
    evaluation.save_group(tmp_path, "group", ["code"])
    for name in ("code", "group"):
        assert "--allow-code-execution" in fail(llama, "--tasks", name, "--include-path", tmp_path)[1]


def test_a_failing_task_is_reported_and_the_others_finish(llama: Path, folder: Path, tmp_path: Path) -> None:
    tasks = Path(shutil.copytree(folder, tmp_path / "tasks"))
    (tasks / "broken.py").write_text("def judge(doc, results):\n    raise KeyError('no such key')\n")
    for name, line in {
        "late": "process_results: !function broken.judge",
        "early": "doc_to_text: '{{nothing}}'",
    }.items():
        text = (tasks / "generation.yaml").read_text().replace("task: generation", f"task: {name}")
        (tasks / f"{name}.yaml").write_text(
            text.replace("doc_to_text: '{{prompt}}'", line) if name == "early" else text + line
        )
    out = tmp_path / "out"
    code, stdout, stderr = tiny.in_process(
        "eval", llama, "--tasks", "late,choices,early", "--include-path", tasks, "--limit", 2, "--out", out,
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 1
    (line,) = stderr.splitlines()
    assert "late on llama failed: KeyError: 'no such key'; also failed: early" in line
    document = json.loads(stdout)
    assert set(document["results"]["llama"]) == {"choices"}
    assert [f["task"] for f in document["failed"]] == ["late", "early"]
    assert "choices" in json.loads((out / "results.json").read_text())["results"]


# Continuing.


class Counted:
    """How many pairs were really run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tasks: list[str] = []
        real = Harness.run

        def counted(lm: Harness, name: str, *arguments: object) -> object:
            self.tasks.append(name)
            return real(lm, name, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Harness, "run", counted)

    def take(self) -> list[str]:
        taken, self.tasks = self.tasks, []
        return taken


def test_an_interrupted_run_goes_on_with_what_is_left(
    llama: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = Counted(monkeypatch)
    arguments = [llama, "--tasks", "choices,rolling", "--include-path", folder, "--limit", 3, "--out", tmp_path]
    whole = run(*arguments[:-1], tmp_path / "other")
    assert ran.take() == ["choices", "rolling"]

    real = Harness.run

    def interrupted(lm: Harness, name: str, *rest: object) -> object:
        if name == "rolling":
            raise KeyboardInterrupt
        return real(lm, name, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Harness, "run", interrupted)
        assert tiny.in_process("eval", *arguments, "--device", "cpu")[0] == 130
    assert ran.take() == ["choices"]
    again = run(*arguments)
    assert ran.take() == ["rolling"]
    assert again["results"] == whole["results"]
    assert run(*arguments)["results"] == whole["results"]
    assert ran.take() == []


def test_no_answer_for_another_question(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Counted(monkeypatch)
    tasks = tmp_path / "tasks"
    evaluation.save_choices(tasks)
    arguments = [llama, "--tasks", "choices", "--include-path", tasks, "--out", tmp_path / "out"]
    for more in ([], ["--limit", 3], ["--num-fewshot", 1], ["--dtype", "bfloat16"], ["--log-samples"]):
        run(*arguments, *more)
        assert ran.take() == ["choices"], more
    run(*arguments, "--batch-size", 4)  # how it is batched does not matter
    assert ran.take() == []
    text = (tasks / "choices.jsonl").read_text()
    (tasks / "choices.jsonl").write_text(text.replace('"answer": 0', '"answer": 1'))
    run(*arguments)
    assert ran.take() == ["choices"]


@pytest.mark.parametrize("lineage", [False, True])
def test_a_changed_checkpoint_is_evaluated_anew(
    llama: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lineage: bool
) -> None:
    from moetool.checkpoint.reader import sha256_file

    ran = Counted(monkeypatch)
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    shard = model / "model.safetensors"

    def note() -> None:
        if lineage:
            hashes = {shard.name: sha256_file(shard)}
            (model / "moetool.json").write_text(json.dumps({"format": 1, "lineage": [], "shards": hashes}))

    note()
    arguments = [model, "--tasks", "choices", "--include-path", folder, "--out", tmp_path / "out"]
    before = run(*arguments)["results"]["model"]["choices"]
    assert ran.take() == ["choices"]
    if lineage:  # copied elsewhere with its lineage: the same checkpoint
        copy = Path(shutil.copytree(model, tmp_path / "copy" / "model", copy_function=shutil.copy))
        os.utime(copy / "moetool.json")
        assert run(copy, *arguments[1:])["results"]["model"]["choices"] == before
        assert ran.take() == []

    def rewrite(factor: float) -> None:
        size = shard.stat().st_size
        save_file({k: v * factor for k, v in load_file(shard).items()}, shard, metadata={"format": "pt"})
        assert shard.stat().st_size == size

    rewrite(1.5)  # the same size and header, with moetool.json as it was
    run(*arguments)
    assert ran.take() == ["choices"]
    rewrite(1.5)
    note()  # and with its new hash
    run(*arguments)
    assert ran.take() == ["choices"]
    tokenizer = model / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text().replace("}", ' ,"note": 1}', 1))
    run(*arguments)
    assert ran.take() == ["choices"]
