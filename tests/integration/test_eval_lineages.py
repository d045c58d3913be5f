"""`eval --baseline` between a dense model, the Mixture of Experts made of it, and what prune and grow made of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import evaluation, tiny
from tests.integration.test_grow import grow, upcycled
from tests.integration.test_routing_lineages import prune


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dense, moe (8 experts, top-2), six of those, twelve (six grown) and exact (8 doubled, top-4)."""
    folder = tmp_path_factory.mktemp("models")
    moe = upcycled("mixtral", folder, "--num-experts", 8)
    for one in (moe, folder / "dense"):
        tiny.save_tokenizer(one)
    text = tiny.save_jsonl(folder / "text.jsonl")
    prune(moe, folder / "six", text, 6)
    grow(folder / "six", folder / "twelve", "--num-experts", 12, "--start", "twins")
    grow(moe, folder / "exact", "--num-experts", 16)
    evaluation.save_choices(folder / "tasks")
    return folder


def evaluate(models: Path, baseline: str, *names: str) -> Any:
    code, printed, err = tiny.in_process(
        "eval", *(models / name for name in names), "--baseline", models / baseline, "--tasks", "choices",
        "--include-path", models / "tasks", "--text", f"t={models / 'text.jsonl'}", "--routing",
        "--out", models / f"eval-{baseline}", "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0, err
    return json.loads(printed)


@pytest.mark.parametrize("baseline", ["moe", "dense"])
def test_models_with_other_experts_against_one_baseline(baseline: str, models: Path) -> None:
    others = [name for name in ("dense", "moe", "six", "twelve", "exact") if name != baseline]
    found = evaluate(models, baseline, *others)
    assert found["baseline"] == baseline
    base = found["results"][baseline]
    for name in others:
        for task, metrics in found["results"][name].items():
            for key, score in metrics.items():
                difference = score["difference"]
                assert difference["value"] == pytest.approx(score["value"] - base[task][key]["value"], abs=1e-12)
    pruned = found["results"]["six"]["t"]["bits_per_byte,none"]["difference"]
    assert abs(pruned["value"]) > 1e-4
    assert pruned["outside_noise"] == (abs(pruned["value"]) > 2 * pruned["stderr"])
    loads = {name: len(tasks["t"]["layers"][0]["load"]) for name, tasks in found["routing"].items() if tasks}
    assert loads == {"moe": 8, "six": 6, "twelve": 12, "exact": 16}


def test_an_exact_growth_is_no_difference(models: Path) -> None:
    """Its logits differ in their last bits, and so do all documents' scores in one direction or the other."""
    found = evaluate(models, "moe", "exact")
    for task, key in (("choices", "acc,none"), ("t", "bits_per_byte,none")):
        difference = found["results"]["exact"][task][key]["difference"]
        assert difference["value"] == pytest.approx(0, abs=1e-6)
        assert not difference["outside_noise"], difference
