"""The experts of an upcycled model against each other and the dense model, and the use of redrawn units."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moetool.checkpoint.hub import find_model
from moetool.checkpoint.model import load_model
from moetool.errors import CheckpointError
from moetool.recipe import PROJECTIONS
from moetool.routing import similarity as similarity_module
from moetool.routing import unit_use as unit_use_module
from moetool.routing.analysis import analyze
from moetool.routing.html import line_chart
from moetool.routing.origin import find_dense, read_origin
from moetool.routing.settings import Settings
from moetool.routing.similarity import similarity
from moetool.units import permutation, redrawn_units
from tests import tiny

E, F, H, LAYERS = 4, 64, 32, 2
W = {"gate": "w1", "up": "w3", "down": "w2"}
TOKENS = np.random.default_rng(0).integers(0, 300, 103)
SMALL: dict[str, Any] = {"seq_len": 16, "batch_size": 2, "device": "cpu"}


class Text:
    """A token stream in memory."""

    num_tokens = len(TOKENS)

    def read(self, start: int, length: int) -> np.ndarray:
        return TOKENS[start : start + length]


def upcycle(dense: Path, out: Path, *more: object) -> Path:
    code, _, errors = tiny.in_process("upcycle", dense, out, "--num-experts", E, "--quiet", *more)
    assert code == 0, errors
    return out


@pytest.fixture(scope="module", params=["shared", "per-matrix"])
def upcycled(request: pytest.FixtureRequest, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Upcycled by either rule; never modify it."""
    return upcycle(llama, tmp_path_factory.mktemp("up") / "moe", "--drop-index", request.param, "--drop-ratio", "0.4")


@pytest.fixture(scope="module")
def trained(upcycled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with noise in every weight; never modify it."""
    folder = tmp_path_factory.mktemp("trained") / "moe"
    shutil.copytree(upcycled, folder)
    noise = torch.Generator().manual_seed(1)
    path = folder / "model.safetensors"
    weights = {name: w + 0.1 * torch.randn(w.shape, generator=noise) for name, w in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    return folder


def measure(folder: Path, **changes: Any) -> dict[str, Any]:
    """The report's `upcycling`."""
    report = analyze(("m", folder), {"a": Text()}, Settings(**(SMALL | {"vocabulary_layers": ()} | changes)))
    json.dumps(report, allow_nan=False)
    return report["upcycling"]  # type: ignore[no-any-return]


def vectors(folder: Path, dense: Path, layer: int) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, Any]]]:
    """Each expert's matrices with units as rows in the dense order (the dense FFN last), and its redrawn units."""
    origin = read_origin(folder)
    assert origin
    weights, source = load_file(folder / "model.safetensors"), load_file(dense / "model.safetensors")
    experts, redrawn = [], []
    for e in range(E):
        order = permutation(origin.recipe, layer, e, F)
        back = {unit: place for place, unit in enumerate(range(F) if order is None else order.tolist())}
        matrices, sets = {}, {}
        for p in PROJECTIONS:
            w = weights[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{W[p]}.weight"].double()
            rows = w.T if p == "down" else w
            matrices[p] = torch.stack([rows[back[unit]] for unit in range(F)])
            places = set(redrawn_units(origin.recipe, layer, e, p, F).tolist())
            sets[p] = {unit for unit in range(F) if back[unit] in places}
        experts.append(matrices)
        redrawn.append(sets)
    ffn = {p: source[f"model.layers.{layer}.mlp.{p}_proj.weight"].double() for p in PROJECTIONS}
    experts.append({p: w.T if p == "down" else w for p, w in ffn.items()})
    redrawn.append({p: set() for p in PROJECTIONS})
    return experts, redrawn


def plain_cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], wanted: Callable[[str, int], bool]) -> float:
    """Over the units that are wanted, one after the other."""
    dot = aa = bb = 0.0
    for p in PROJECTIONS:
        for unit in range(F):
            if wanted(p, unit):
                dot += float(a[p][unit] @ b[p][unit])
                aa += float(a[p][unit] @ a[p][unit])
                bb += float(b[p][unit] @ b[p][unit])
    return dot / math.sqrt(aa * bb)


def test_right_after_upcycling(upcycled: Path) -> None:
    found = measure(upcycled)
    assert (found["num_units"], found["num_redrawn"], found["notes"]) == (F, 25, [])
    for row in found["layers"]:
        for side in ("between_experts", "with_dense"):
            assert row[side]["kept"] == pytest.approx(1, abs=1e-6)
            assert abs(row[side]["redrawn"]) < 0.1
            assert all(expert["kept"] == pytest.approx(1, abs=1e-6) for expert in row[side]["experts"])
            assert row[side]["min"] <= row[side]["all"] <= row[side]["max"] < 0.9
        # 39 of 64 units are the dense ones, of much the same norm as those that replace the rest.
        assert row["with_dense"]["all"] == pytest.approx(39 / 64, abs=0.1)
    assert found["mean"]["with_dense"]["kept"] == pytest.approx(1)
    assert found["recipe"]["drop_ratio"] == "0.4"


@pytest.mark.parametrize("block", [1, 1 << 10, 1 << 22])
def test_similarity_equals_plain_loops(trained: Path, llama: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity_module, "_BLOCK", block)
    origin = read_origin(trained)
    assert origin
    row = similarity(trained, origin, find_dense(origin))[1]
    experts, redrawn = vectors(trained, llama, 1)

    def plain(a: int, b: int) -> dict[str, float]:
        def kept(p: str, unit: int) -> bool:
            return unit not in redrawn[a][p] and unit not in redrawn[b][p]

        return {
            "all": plain_cosine(experts[a], experts[b], lambda p, unit: True),
            "kept": plain_cosine(experts[a], experts[b], kept),
            "redrawn": plain_cosine(experts[a], experts[b], lambda p, unit: not kept(p, unit)),
        }

    with_dense = [plain(e, E) for e in range(E)]
    pairs = {(a, b): plain(min(a, b), max(a, b)) for a in range(E) for b in range(E) if a != b}
    assert 0.8 < with_dense[0]["kept"] < 0.99
    for part in ("all", "kept", "redrawn"):
        assert [e[part] for e in row["with_dense"]["experts"]] == pytest.approx([e[part] for e in with_dense], abs=1e-6)
        assert row["between_experts"][part] == pytest.approx(np.mean([pair[part] for pair in pairs.values()]), abs=1e-6)
        of_2 = np.mean([pairs[2, b][part] for b in range(E) if b != 2])
        assert row["between_experts"]["experts"][2][part] == pytest.approx(of_2, abs=1e-6)
    assert row["between_experts"]["min"] == pytest.approx(min(pair["all"] for pair in pairs.values()))
    assert row["with_dense"]["max"] == pytest.approx(max(e["all"] for e in with_dense))


@pytest.mark.parametrize("sample", [8192, 37])
def test_unit_use_equals_plain_loops(trained: Path, monkeypatch: pytest.MonkeyPatch, sample: int) -> None:
    monkeypatch.setattr(unit_use_module, "_TOKENS", 5)
    monkeypatch.setattr(unit_use_module, "SAMPLE", sample)
    found = measure(trained)["unit_use"]["a"]
    origin = read_origin(trained)
    assert origin
    # What every expert has seen, a window at a time and so without padding.
    model = load_model(trained)
    seen: dict[int, list[tuple[torch.Tensor, list[int]]]] = {layer: [] for layer in range(LAYERS)}
    for layer in range(LAYERS):
        model.model.layers[layer].mlp.experts.register_forward_pre_hook(
            lambda module, inputs, layer=layer: seen[layer].extend(zip(inputs[0], inputs[1].tolist(), strict=True))
        )
    for start in range(0, len(TOKENS), 16):
        with torch.no_grad():
            model(torch.tensor(TOKENS[None, start : start + 16]))
    weights = load_file(trained / "model.safetensors")
    for layer in range(LAYERS):
        assert len(seen[layer]) == len(TOKENS) > 37
        del seen[layer][sample:]
        uses, idles = [], []
        for e in range(E):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{e}"
            gate, up, down = (weights[f"{name}.{W[p]}.weight"] for p in PROJECTIONS)
            contribution = [0.0] * F
            mine = [x for x, experts in seen[layer] if e in experts]
            for x in mine:
                for unit in range(F):
                    h = torch.nn.functional.silu(gate[unit] @ x) * (up[unit] @ x)
                    contribution[unit] += float(h.abs()) / len(mine) * float(down[:, unit].norm())
            redrawn = {u for p in PROJECTIONS for u in redrawn_units(origin.recipe, layer, e, p, F).tolist()}
            share = sum(contribution[u] for u in redrawn) / sum(contribution)
            uses.append(share / (len(redrawn) / F))
            typical = torch.tensor([contribution[u] for u in range(F) if u not in redrawn]).median()
            idles.append(sum(contribution[u] < 0.01 * typical for u in redrawn) / len(redrawn))
            assert found[layer]["experts"][e]["use"] == pytest.approx(uses[e], rel=1e-4)
            assert found[layer]["experts"][e]["idle"] == pytest.approx(idles[e])
        assert found[layer]["use"] == pytest.approx(np.mean(uses), rel=1e-4)
        assert found[layer]["idle"] == pytest.approx(np.mean(idles))


def test_idle_units_and_experts_without_tokens(upcycled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moe"
    shutil.copytree(upcycled, folder)
    origin = read_origin(folder)
    assert origin
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.block_sparse_moe.gate.weight"].zero_()  # ties: the first two experts take all
    for e in range(E):
        weights[f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight"][:, origin.redrawn(0, e)] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    row = measure(folder)["unit_use"]["a"][0]
    assert (row["use"], row["idle"]) == (0, 1)
    assert sum(expert is None for expert in row["experts"]) == 2


@pytest.mark.parametrize("recipe", [("--method", "copy"), ("--drop-ratio", "0")])
def test_nothing_redrawn(llama: Path, tmp_path: Path, recipe: tuple[str, ...]) -> None:
    found = measure(upcycle(llama, tmp_path / "moe", *recipe))
    assert (found["num_redrawn"], found["unit_use"], found["notes"]) == (0, None, [])
    for row in found["layers"]:
        for side in ("between_experts", "with_dense"):
            assert (row[side]["all"], row[side]["kept"]) == pytest.approx((1, 1))
            assert row[side]["redrawn"] is None


def test_everything_redrawn(llama: Path, tmp_path: Path) -> None:
    found = measure(upcycle(llama, tmp_path / "moe", "--drop-ratio", "1"))
    assert found["mean"]["with_dense"]["kept"] is None
    assert abs(found["mean"]["with_dense"]["redrawn"]) < 0.1
    assert found["mean"]["use"] is None


def test_without_a_lineage_or_on_request_nothing(mixtral: Path, upcycled: Path) -> None:
    assert read_origin(mixtral) is None
    assert measure(mixtral) is None
    assert measure(upcycled, unit_use=False)["unit_use"] is None


def test_the_dense_model_is_gone_or_another(llama: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(llama, dense)
    folder = upcycle(dense, tmp_path / "moe")
    shutil.rmtree(dense)
    found = measure(folder)
    assert found["layers"][0]["with_dense"] is None
    assert found["layers"][0]["between_experts"]["kept"] == pytest.approx(1)
    assert "no such folder" in found["notes"][0]
    tiny.save_llama(dense, intermediate_size=32)
    assert "differs in its FFN matrices" in measure(folder)["notes"][0]
    (dense / "model.safetensors").unlink()
    assert "holds neither model.safetensors" in measure(folder)["notes"][0]


def test_names_that_lead_nowhere(llama: Path) -> None:
    assert find_model(str(llama)) == llama
    for name in (
        "~nobody-has-this-name/x",
        "a\0b",
        "x" * 5000,
        "owner/is-not-in-the-cache",
        str(llama / "config.json"),
    ):
        assert find_model(name) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.pop("recipe"),
        lambda entry: entry.update(recipe=[1]),
        lambda entry: entry["recipe"].update(num_experts="8"),
        lambda entry: entry["recipe"].update(num_experts=5),
        lambda entry: entry["recipe"].update(drop_ratio="nan"),
        lambda entry: entry["recipe"].update(drop_ratio="7"),
        lambda entry: entry["recipe"].update(noise_ratio="-1"),
        lambda entry: entry["recipe"].update(granularity=0),
        lambda entry: entry["recipe"].update(granularity=3),
        lambda entry: entry["recipe"].update(shared_experts=-1),
        lambda entry: entry["recipe"].update(num_donors=0),
        lambda entry: entry["recipe"].update(num_donors=2),
        lambda entry: entry["recipe"].update(method="drops"),
        lambda entry: entry.update(donors=[{"name": "a", "sha256": {}}]),
        lambda entry: entry.update(donors=7),
        lambda entry: entry["recipe"].update(seed=1),
        lambda entry: entry.update(source="here"),
        lambda entry: entry["source"].update(name=7),
        lambda entry: entry["source"].update(sha256=[]),
        lambda entry: entry.pop("redrawn_units"),
        lambda entry: entry["redrawn_units"].update(digests=[["0"], 3]),
        lambda entry: entry["redrawn_units"].update(layers=[0, 2]),
        lambda entry: entry["redrawn_units"].pop("layers"),
        lambda entry: entry["redrawn_units"]["digests"][1].__setitem__(2, {"a": 1}),
    ],
)
def test_hostile_lineage(upcycled: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    folder = tmp_path / "moe"
    shutil.copytree(upcycled, folder)
    document = json.loads((folder / "moetool.json").read_text())
    change(document["lineage"][0])
    (folder / "moetool.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as caught:
        read_origin(folder)
    assert "\n" not in str(caught.value)
    assert "moetool.json" in str(caught.value)


def test_the_command_before_and_after_training(llama: Path, jsonl: Path, tmp_path: Path) -> None:
    moe, out, report = upcycle(llama, tmp_path / "moe"), tmp_path / "cpt", tmp_path / "report"
    flags = ("--max-steps", 3, "--seq-len", 16, "--global-batch-size", 4, "--micro-batch-size", 4, "--lr", 1e-2)
    assert tiny.in_process("cpt", moe, out, "--train", f"new={jsonl}", *flags)[0] == 0
    data = ("--data", f"a={jsonl}", "--max-tokens", 200, "--seq-len", 16)
    code, printed, errors = tiny.in_process("analyze-routing", moe, *data, "--compare", out, "--out", report)
    assert code == 0, errors
    printed = " ".join(printed.split())
    assert "Use of the redrawn units" in printed
    assert "with the dense model, 1.00 → " in printed
    written = json.loads((report / "report.json").read_text())
    before, after = written["upcycling"], written["comparison"]["upcycling"]
    assert before["mean"]["with_dense"]["kept"] == pytest.approx(1)
    assert 0.5 < after["mean"]["with_dense"]["kept"] < 0.9999
    assert before["mean"]["use"] != after["mean"]["use"]
    page = (report / "report.html").read_text()
    assert "Experts and the dense model" in page
    assert "kept units, first model" in page
    # Alone, the trained checkpoint says the same: the lineage went with it.
    code, _, errors = tiny.in_process("analyze-routing", out, *data, "--out", report, "--no-unit-use", "--quiet")
    assert code == 0, errors
    alone = json.loads((report / "report.json").read_text())
    assert alone["upcycling"]["layers"] == after["layers"]
    assert alone["upcycling"]["unit_use"] is None
    # A damaged lineage is one line; another model's is no comparison.
    (moe / "moetool.json").write_text('{"lineage": [{"command": "upcycle", "recipe": 3}]}')
    code, _, errors = tiny.in_process("analyze-routing", moe, *data, "--out", report)
    assert (code, errors.count("\n")) == (1, 1)


def test_a_chart_reaches_its_reference_line() -> None:
    chart = line_chart([0, 1], {"use": [0.2, 0.7]}, 0, None, 1.0)
    assert chart["y"](1.0) < chart["y"](0.9) < chart["y"](0.7)
