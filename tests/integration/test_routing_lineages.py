"""`analyze-routing --compare` of models whose experts were copied, left out or put in another order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetool.checkpoint.model import load_model
from moetool.data.make_tokens import tokenized
from moetool.data.text import TextSource
from moetool.routing.capture import RouterCapture
from tests import tiny
from tests.integration.test_grow import grow, upcycled

TOKENS = 96
SIZE = ("--seq-len", 16, "--max-tokens", TOKENS)


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    """A Mixtral of 8 experts, with a lineage."""
    moe = upcycled("mixtral", tmp_path, "--num-experts", 8)
    tiny.save_tokenizer(moe)
    return moe


def prune(model: Path, out: Path, jsonl: Path, keep: int) -> Path:
    tiny.result("prune", model, out, "--keep-experts", keep, "--score", "frequency", "--data", f"a={jsonl}", *SIZE)
    return out


def origins(folder: Path, command: str = "") -> list[list[int]]:
    """Of each layer, the expert before of each expert after the last command."""
    entry = json.loads((folder / "moetool.json").read_text())["lineage"][-1]
    assert command in ("", entry["command"])
    return entry["recipe"]["experts"]["from"]  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds, and other tests look at them."""
    monkeypatch.setattr("moetool.routing.plots.draw_plots", lambda report: {})


def compare(one: Path, other: Path, out: Path, jsonl: Path) -> dict[str, Any]:
    code, printed, err = tiny.in_process(
        "analyze-routing", one, "--compare", other, "--data", f"a={jsonl}", "--out", out, *SIZE, "--json"
    )
    assert code == 0, err
    return json.loads(printed)["comparison"]  # type: ignore[no-any-return]


def choices(folder: Path, jsonl: Path) -> list[list[list[int]]]:
    """Of each layer, the experts of each token."""
    ids = torch.from_numpy(tokenized(TextSource(str(jsonl)), folder).read(0, TOKENS).astype("int64"))
    model = load_model(folder).eval()
    capture = RouterCapture(model)
    with torch.no_grad(), capture.collect() as routes:
        model(ids.reshape(-1, 16))
    return [route.indices_TK.tolist() for route in routes]


def check_counts(
    found: dict[str, Any], one: Path, other: Path, maps: tuple[Sequence[Sequence[int]], ...], jsonl: Path
) -> None:
    """Saturation, what chance gives, and the divergence of the loads, token by token and route by route."""
    chosen_by = [choices(folder, jsonl) for folder in (one, other)]
    for layer, row in enumerate(found["domains"]["a"]["layers"]):
        before, now = (
            [[side[layer][e] for e in chosen] for chosen in layers[layer]]
            for layers, side in zip(chosen_by, maps, strict=True)
        )
        K, A = len(before[0]), 1 + max(e for side in maps for e in side[layer])
        kept = sum(e in those for chosen, those in zip(before, now, strict=True) for e in chosen)
        assert row["saturation"] == pytest.approx(kept / (TOKENS * K))
        chance = sum(
            sum(chosen.count(a) for chosen in before) / (TOKENS * K) * sum(a in those for those in now) / TOKENS
            for a in range(A)
        )
        assert row["saturation_by_chance"] == pytest.approx(chance)
        loads = [
            torch.tensor([sum(chosen.count(a) for chosen in side) for a in range(A)], dtype=torch.float64)
            for side in (before, now)
        ]
        f, g = (load / load.sum() for load in loads)

        def bits(p: Tensor) -> float:
            return float(-(p[p > 0] * p[p > 0].log2()).sum())

        assert row["load_divergence"] == pytest.approx(bits((f + g) / 2) - (bits(f) + bits(g)) / 2, abs=1e-9)


def own(number: int) -> list[list[int]]:
    return [list(range(number))] * 2


def test_a_pruned_model_against_the_whole_one(eight: Path, jsonl: Path, tmp_path: Path) -> None:
    six = prune(eight, tmp_path / "six", jsonl, 6)
    kept = origins(six, "prune")
    found = compare(eight, six, tmp_path / "report", jsonl)
    assert (found["num_experts"], found["top_k"]) == (6, 2)
    check_counts(found, eight, six, (own(8), kept), jsonl)
    assert found["experts"]["since"] == [[], ["prune"]]
    for row, those in zip(found["experts"]["layers"], kept, strict=True):
        gone = sorted(set(range(8)) - set(those))
        assert (len(gone), row["pruned_in_second"], row["pruned_in_first"], row["copies"]) == (2, gone, [], [])
        assert row["counterparts"] == [[expert] for expert in those]
    assert all(row == {"layer": row["layer"], "router": 0, "experts": [0] * 6} for row in found["drift"])
    first = json.loads((tmp_path / "report" / "report.json").read_text())["upcycling"]
    dense = [[row["all"] for row in one["layers"][0]["with_dense"]["experts"]] for one in (first, found["upcycling"])]
    assert dense[1] == pytest.approx([dense[0][expert] for expert in kept[0]], abs=1e-6)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "nothing was done to the first and prune to the second" in page
    assert f"<td>0</td><td>{', '.join(map(str, sorted(set(range(8)) - set(kept[0]))))}</td><td>–</td>" in page
    back = compare(six, eight, tmp_path / "report-2", jsonl)
    check_counts(back, six, eight, (kept, own(8)), jsonl)
    row = back["experts"]["layers"][0]
    assert (row["pruned_in_first"], row["pruned_in_second"]) == (sorted(set(range(8)) - set(kept[0])), [])
    assert [value is None for value in back["drift"][0]["experts"]] == [e not in kept[0] for e in range(8)]


def test_a_grown_model_against_the_one_before(jsonl: Path, tmp_path: Path) -> None:
    four = upcycled("mixtral", tmp_path)
    tiny.save_tokenizer(four)
    copies = [[0, 1, 2, 3] * 2] * 2
    for start, exact in (("double-k", True), ("twins", False)):
        out = tmp_path / start
        grow(four, out, "--num-experts", 8, "--start", start)
        found = compare(four, out, tmp_path / f"{start}-report", jsonl)
        check_counts(found, four, out, (own(4), copies), jsonl)
        rows = found["domains"]["a"]["layers"]
        assert [row["saturation"] == 1 for row in rows] == [exact] * 2
        assert all(row["load_divergence"] == pytest.approx(0, abs=1e-9) for row in rows) == exact
        if exact:  # a token still goes where it went, and counts once
            for row in found["vocabulary_specialization"]["layers"]:
                assert row["input"]["by_occurrence"] == row["input"]["before"]["by_occurrence"]
        layer = found["experts"]["layers"][1]
        assert layer["counterparts"] == [[0], [1], [2], [3]] * 2
        assert layer["copies"] == [{"of": [e], "experts": [e, e + 4]} for e in range(4)]
        assert "copies of 0: 0, 4; copies of 1: 1, 5" in (tmp_path / f"{start}-report" / "report.html").read_text()
    code, out_text, _ = tiny.in_process(
        "analyze-routing",
        tmp_path / "double-k",
        "--compare",
        four,
        "--data",
        f"a={jsonl}",
        "--out",
        tmp_path / "b",
        *SIZE,
    )
    assert code == 0
    said = " ".join(out_text.split())
    assert "The first model has 8 experts per layer, top-4, the second 4 experts per layer, top-2." in said
    assert "100% of the expert choices are the same" in said


def test_pruned_then_grown(eight: Path, jsonl: Path, tmp_path: Path) -> None:
    six = prune(eight, tmp_path / "six", jsonl, 6)
    grow(
        six,
        tmp_path / "nine",
        "--num-experts",
        9,
        "--start",
        "twins",
        "--utility",
        "gate",
        "--data",
        f"a={jsonl}",
        *SIZE,
    )
    kept, copied = origins(six), origins(tmp_path / "nine", "grow")
    through = [[before[e] for e in after] for before, after in zip(kept, copied, strict=True)]
    found = compare(eight, tmp_path / "nine", tmp_path / "report-4", jsonl)
    check_counts(found, eight, tmp_path / "nine", (own(8), through), jsonl)
    assert found["experts"]["since"] == [[], ["prune", "grow"]]
    best = max(range(6), key=copied[0].count)
    assert {"of": [kept[0][best]], "experts": [e for e in range(9) if copied[0][e] == best]} in (
        found["experts"]["layers"][0]["copies"]
    )
    # Two that were pruned and grown apart.
    other = prune(eight, tmp_path / "five", jsonl, 5)
    found = compare(tmp_path / "nine", other, tmp_path / "report-5", jsonl)
    check_counts(found, tmp_path / "nine", other, (through, origins(other)), jsonl)
    assert found["experts"]["since"] == [["prune", "grow"], ["prune"]]
    # As many experts as before, but not the same ones.
    grow(six, tmp_path / "again", "--num-experts", 8, "--start", "twins")
    through = [[before[e % 6] for e in range(8)] for before in kept]
    found = compare(eight, tmp_path / "again", tmp_path / "report-6", jsonl)
    check_counts(found, eight, tmp_path / "again", (own(8), through), jsonl)
    assert len(found["experts"]["layers"][0]["pruned_in_second"]) == 2


def test_training_between_does_not_matter(eight: Path, jsonl: Path, tmp_path: Path) -> None:
    size = ("--seq-len", 16, "--global-batch-size", 2, "--max-steps", 2, "--val-fraction", 0, "--lr", "1e-2")
    assert tiny.in_process("cpt", eight, tmp_path / "run", "--train", f"a={jsonl}", *size)[0] == 0
    six = prune(tmp_path / "run", tmp_path / "six", jsonl, 6)
    found = compare(eight, six, tmp_path / "report-7", jsonl)
    assert found["experts"]["since"] == [[], ["cpt", "prune"]]
    check_counts(found, eight, six, (own(8), origins(six)), jsonl)
    assert all(0 < value < 1 for row in found["drift"] for value in (row["router"], *row["experts"]))
    # Nobody left out or copied experts: they correspond by their numbers.
    assert compare(eight, tmp_path / "run", tmp_path / "report-8", jsonl)["experts"] is None


def test_a_permutation_that_the_lineage_records(eight: Path, jsonl: Path, tmp_path: Path) -> None:
    order = [3, 0, 7, 1, 2, 6, 5, 4]
    tensors = load_file(eight / "model.safetensors")
    moved = dict(tensors)
    for layer in range(2):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        moved[f"{prefix}.gate.weight"] = tensors[f"{prefix}.gate.weight"][order].clone()
        for after, before in enumerate(order):
            for part in ("w1", "w2", "w3"):
                moved[f"{prefix}.experts.{after}.{part}.weight"] = tensors[f"{prefix}.experts.{before}.{part}.weight"]
    other = tmp_path / "permuted"
    load_model(eight).save_pretrained(other)
    tiny.save_tokenizer(other)
    save_file(moved, other / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((eight / "moetool.json").read_text())
    entry = {"command": "convert", "recipe": {"experts": {"layers": [0, 1], "from": [order, order]}}}
    (other / "moetool.json").write_text(json.dumps(document | {"lineage": [*document["lineage"], entry]}))
    found = compare(eight, other, tmp_path / "report-9", jsonl)
    for row in found["domains"]["a"]["layers"]:
        assert row["saturation"] == 1
        assert row["load_divergence"] == pytest.approx(0, abs=1e-9)
    assert all(value == 0 for row in found["drift"] for value in (row["router"], *row["experts"]))
    (other / "moetool.json").unlink()  # by their numbers
    apart = compare(eight, other, tmp_path / "report-10", jsonl)
    assert apart["experts"] is None
    assert any(row["saturation"] < 0.9 for row in apart["domains"]["a"]["layers"])


def test_a_model_without_a_lineage_and_what_was_made_of_it(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    grow(mixtral, tmp_path / "eight", "--num-experts", 8)
    grow(mixtral, tmp_path / "six", "--num-experts", 6, "--start", "twins")
    for one, other in (
        (mixtral, tmp_path / "eight"),
        (tmp_path / "eight", mixtral),
        (tmp_path / "six", tmp_path / "eight"),
    ):
        maps = [
            [[e % 4 for e in range(8 if p.name == "eight" else 6 if p.name == "six" else 4)]] * 2 for p in (one, other)
        ]
        found = compare(one, other, tmp_path / "report-11", jsonl)
        check_counts(found, one, other, (maps[0], maps[1]), jsonl)
    size = ("--seq-len", 16, "--global-batch-size", 2, "--max-steps", 1, "--val-fraction", 0)
    assert tiny.in_process("cpt", mixtral, tmp_path / "run", "--train", f"a={jsonl}", *size)[0] == 0
    three = prune(tmp_path / "run", tmp_path / "three", jsonl, 3)
    assert compare(mixtral, three, tmp_path / "report-12", jsonl)["experts"]["since"] == [[], ["cpt", "prune"]]
    # Another model with the same names of files.
    other = tiny.save_mixtral(tmp_path / "other", seed=1)
    for folder in (tmp_path / "eight", three):
        assert "their experts cannot be lined up" in refused(other, folder, tmp_path / "x", jsonl)
    assert "does not record a model that both were made from" in refused(
        tmp_path / "eight", three, tmp_path / "x", jsonl
    )


def refused(one: Path, other: Path, out: Path, jsonl: Path) -> str:
    return tiny.refusal("analyze-routing", one, "--compare", other, "--data", f"a={jsonl}", "--out", out, *SIZE)


def test_refusals(eight: Path, jsonl: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    six = prune(eight, tmp_path / "six", jsonl, 6)
    (tmp_path / "b").mkdir()
    other = upcycled("mixtral", tmp_path / "b", "--num-experts", 8, "--seed", 1)
    tiny.save_tokenizer(other)
    message = refused(other, six, out, jsonl)
    assert "the models differ in the number of experts (8 and 6), and moetool.json does not record a model" in message
    path = six / "moetool.json"
    document = json.loads(path.read_text())
    recorded = document["lineage"][-1]["recipe"]["experts"]
    for change, message in (
        ({"from": [[0, 1, 2, 3, 4, 8]] * 2}, "says 8 experts, but one comes from expert 8"),
        ({"from": [[0, 1, 2, 3, 4]] * 2}, "says 5 experts, but config.json says 6"),
        ({"layers": [0, 2]}, "the layers of an entry are others than those with experts"),
        ({"from": "none"}, "the experts of an entry cannot be read"),
    ):
        document["lineage"][-1]["recipe"]["experts"] = recorded | change
        path.write_text(json.dumps(document))
        assert message in refused(eight, six, out, jsonl)
    path.unlink()
    assert "their experts cannot be lined up" in refused(eight, six, out, jsonl)
