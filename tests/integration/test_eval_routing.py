"""Routes counted during evaluation: what is text counts once, padding never, however it is batched."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moetool.routing.capture import RouterCapture
from moetool.routing.report import domain_entry
from moetool.routing.stats import RoutingStats
from tests import evaluation, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    evaluation.save_choices(folder)
    evaluation.save_rolling(folder)
    evaluation.save_generation(folder, max_gen_toks=20)
    return folder


def routing(model: Path, *arguments: object) -> Any:
    code, stdout, stderr = tiny.in_process("eval", model, "--routing", *arguments, "--device", "cpu", "--json")
    assert code == 0, stderr
    return json.loads(stdout)["routing"][model.name]


def close(one: dict, other: dict) -> None:
    """Equal counts; probabilities within rounding."""
    assert one["num_tokens"] == other["num_tokens"]
    for mine, its in zip(one["layers"], other["layers"], strict=True):
        assert mine["load"] == its["load"]
        assert mine["mri"] == its["mri"]
        assert mine["mean_probability"] == pytest.approx(its["mean_probability"], rel=1e-4)


def test_counts_do_not_depend_on_the_batch_size(mixtral: Path, folder: Path) -> None:
    arguments = ["--tasks", "choices,rolling,generation", "--include-path", folder]
    alone = routing(mixtral, *arguments, "--batch-size", 1)
    assert set(alone) == {"choices", "rolling", "generation"}
    for batch_size in (3, 8):
        together = routing(mixtral, *arguments, "--batch-size", batch_size)
        for task in alone:
            close(together[task], alone[task])


def test_counts_equal_a_forward_over_the_text_alone(mixtral: Path, tmp_path: Path) -> None:
    # Short enough for one window each; the tokenizer's end-of-text token, 0, is lm-eval's padding too.
    documents = ["The quick fox.", "A router<|endoftext|>", "x<|endoftext|><|endoftext|>", "lazy dog and fox"]
    source = tmp_path / "t.jsonl"
    source.write_text("\n".join(json.dumps({"text": d}) for d in documents))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(mixtral), AutoTokenizer.from_pretrained(mixtral)
    capture, stats = RouterCapture(model), None
    for document in documents:
        tokens = [tokenizer.eos_token_id, *tokenizer.encode(document)][:-1]  # the last predicts nothing
        with torch.no_grad(), capture.collect() as routes:
            model(torch.tensor([tokens]))
        stats = stats or RoutingStats.like(routes)
        stats.update(routes)
    assert stats is not None
    close(routing(mixtral, "--text", f"t={source}", "--batch-size", 4)["t"], domain_entry(stats))


def test_dense_models_have_none_and_the_score_stays(llama: Path, mixtral: Path, folder: Path) -> None:
    arguments = ["eval", llama, mixtral, "--tasks", "choices", "--include-path", folder, "--limit", 4, "--json"]
    _, stdout, _ = tiny.in_process(*arguments)
    code, routed, stderr = tiny.in_process(*arguments, "--routing")
    assert code == 0
    assert "llama has no router" in stderr
    document = json.loads(routed)
    assert document["results"] == json.loads(stdout)["results"]
    assert document["routing"]["llama"] == {}
    layers = document["routing"]["mixtral"]["choices"]["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1]
    assert sum(layers[0]["load"]) == pytest.approx(1)
    assert 0.5 <= layers[0]["mri"] <= 1


@pytest.mark.parametrize("family", ["qwen3", "granite", "ernie4_5"])
def test_upcycled_families_are_counted(family: str, folder: Path, tmp_path: Path) -> None:
    dense = tiny.save_dense(family, tmp_path / "dense")
    tiny.save_tokenizer(dense)
    code, _, stderr = tiny.in_process("upcycle", dense, tmp_path / "moe", "--num-experts", 4, "--top-k", 2)
    assert code == 0, stderr
    counted = routing(tmp_path / "moe", "--tasks", "choices", "--include-path", folder, "--limit", 5)["choices"]
    assert counted["num_tokens"] > 0
    for row in counted["layers"]:
        assert sum(row["load"]) == pytest.approx(1)
        assert 0.5 <= row["mri"] <= 1


def test_only_layers_with_a_router_are_counted(folder: Path, tmp_path: Path) -> None:
    model = tiny.save_glm4_moe(tmp_path / "glm")  # its first layer is dense
    arguments = ["--tasks", "choices,generation", "--include-path", folder]
    alone, together = routing(model, *arguments), routing(model, *arguments, "--batch-size", 4)
    assert [row["layer"] for row in alone["choices"]["layers"]] == [1, 2]
    for task in alone:
        close(together[task], alone[task])
