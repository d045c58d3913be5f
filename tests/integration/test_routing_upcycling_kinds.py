"""The experts of every kind of upcycling against each other and their dense sources, by plain loops."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moetool import registry
from moetool.arch.spec import scales
from moetool.lineage import read_lineage
from moetool.recipe import PROJECTIONS, UpcycleRecipe
from moetool.routing.analysis import analyze
from moetool.routing.origin import find_dense, read_origin
from moetool.routing.settings import Settings
from moetool.routing.similarity import similarity
from moetool.units import permutation, redrawn_units
from tests import tiny
from tests.integration.test_upcycle_families import WITHOUT

F, H = 64, 32
TOKENS = np.random.default_rng(0).integers(1, 300, 83)
DENSE_NAME = "model.layers.{}.mlp.{}_proj.weight"


class Text:
    """A token stream in memory."""

    num_tokens = len(TOKENS)

    def read(self, start: int, length: int) -> np.ndarray:
        return TOKENS[start : start + length]


@dataclass(frozen=True)
class Kind:
    """An upcycling: of which family to which, and how."""

    dense: str
    target: str
    options: tuple[object, ...] = ()
    donors: int = 1

    def __str__(self) -> str:
        return "-".join([self.dense, self.target, *(str(o).lstrip("-") for o in self.options), str(self.donors)])


ALL = [Kind(registry.load("target", name).dense[0], name) for name in registry.names("target")]
FINE = ("--granularity", 4, "--num-experts", 8, "--top-k", 4)
KINDS = [
    *ALL,
    Kind("llama", "mixtral", FINE),
    Kind("llama", "mixtral", (*FINE, "--drop-index", "per-matrix")),
    Kind("llama", "granitemoe", FINE),
    Kind("llama", "granitemoe", (*FINE, "--drop-index", "per-matrix")),
    Kind("qwen2", "qwen2_moe", (*FINE, "--shared-experts", 0)),
    Kind("qwen2", "qwen2_moe", ("--granularity", 4, "--num-experts", 6, "--top-k", 3, "--shared-experts", 1)),
    Kind("qwen2", "qwen2_moe", ("--num-experts", 4, "--shared-experts", 2)),
    Kind("cohere2", "cohere2_moe", ("--granularity", 2, "--num-experts", 8, "--top-k", 2, "--shared-experts", 2)),
    Kind("qwen3", "glm4_moe", ("--granularity", 2, "--num-experts", 4, "--shared-experts", 1, "--moe-layers", "1-")),
    Kind("qwen3", "qwen3_moe", ("--moe-layers", "every:2", "--num-experts", 4)),
    Kind("ernie4_5", "ernie4_5_moe", ("--moe-layers", "1-1", "--num-experts", 4, "--method", "copy")),
    Kind("llama", "mixtral", ("--num-experts", 4, "--method", "noise", "--noise-ratio", "0.3")),
    Kind("llama", "mixtral", (*FINE, "--method", "noise", "--noise-std", "0.1", "--drop-index", "per-matrix")),
    Kind("llama", "mixtral", ("--num-experts", 4, "--method", "scratch")),
    Kind("llama", "granitemoe", ("--num-experts", 6, "--method", "scratch", "--granularity", 2, "--moe-layers", "all")),
    Kind("llama", "mixtral", ("--num-experts", 6, "--drop-ratio", "0.3"), donors=3),
    Kind("llama", "mixtral", (*FINE, "--method", "copy"), donors=2),
    Kind("llama", "mixtral", ("--granularity", 4, "--num-experts", 4, "--top-k", 4, "--drop-ratio", "0.3")),
]


def make(kind: Kind, folder: Path) -> Path:
    """Upcycle, and move every weight by some noise, as training would."""
    changes = WITHOUT.get((kind.dense, kind.target), {})
    dense = [tiny.save_dense(kind.dense, folder / f"dense{i}", seed=i, **changes) for i in range(kind.donors)]
    flags: list[object] = [part for other in dense[1:] for part in ("--donor", other)]
    options = kind.options if "--num-experts" in kind.options else ("--num-experts", 4, *kind.options)
    out = folder / "moe"
    if "scratch" not in options:
        flags += ["--router-std", "1"]
    command = ("upcycle", dense[0], out, "--target", kind.target, "--quiet", *flags, *options)
    code, _, errors = tiny.in_process(*command)
    assert code == 0, errors
    tiny.save_tokenizer(out)
    return out


def load_dense(folder: Path) -> dict[str, torch.Tensor]:
    """The weights, FFNs under the names of most families."""
    names = {"feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj"}
    weights: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    for theirs, ours in names.items():
        weights = {name.replace(theirs, ours): weight for name, weight in weights.items()}
    return weights


def trained(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    noise, path = torch.Generator().manual_seed(1), out / "model.safetensors"
    weights = {name: w + 0.05 * torch.randn(w.shape, generator=noise) for name, w in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    return out


def measure(folder: Path) -> dict[str, Any]:
    """The report's `upcycling`."""
    settings = Settings(seq_len=16, batch_size=2, device="cpu", vocabulary_layers=())
    report = analyze(("m", folder), {"a": Text()}, settings)
    json.dumps(report, allow_nan=False)
    found: dict[str, Any] = report["upcycling"]
    return found


def recipe_of(folder: Path) -> UpcycleRecipe:
    lineage = read_lineage(folder)
    assert lineage
    return UpcycleRecipe.from_json(lineage["lineage"][0]["recipe"])


def experts_of(folder: Path, recipe: UpcycleRecipe, layer: int) -> list[dict[str, torch.Tensor]]:
    """Each expert's matrices as transformers holds them: units as rows, in the order of the file."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    experts = next(m for name, m in model.named_modules() if name.endswith("experts") and f"layers.{layer}." in name)
    found = []
    for both, down in zip(experts.gate_up_proj.detach().double(), experts.down_proj.detach().double(), strict=True):
        gate, up = both.chunk(2)
        found.append({"gate": gate, "up": up, "down": down.T})
    assert len(found) == recipe.num_experts
    return found


def plain(recipe: UpcycleRecipe, factor: float, folder: Path, layer: int) -> dict[str, list[list[float]]]:
    """For each expert the similarities `all`, `kept`, `redrawn` with its dense part and with each other expert."""
    size = F // recipe.granularity
    E, group = recipe.num_experts, recipe.group_size
    skip = recipe.shared_experts if (recipe.shared_experts or 0) < recipe.granularity else 0
    experts = experts_of(folder, recipe, layer)
    units: list[list[tuple[str, int, torch.Tensor, bool]]] = []  # (projection, dense unit, weights, changed)
    part, owner = [], []
    scratch = recipe.method == "scratch"
    for e, matrices in enumerate(experts):
        part.append(0 if scratch else e % group)
        owner.append(e // (E // recipe.num_donors))
        first = ((skip or 0) + part[-1]) * size
        order = permutation(recipe, layer, e, size)
        changed = {p: set(redrawn_units(recipe, layer, e, p, size).tolist()) for p in PROJECTIONS}
        units.append(
            [
                (p, first + (place if order is None else int(order[place])), matrices[p][place], place in changed[p])
                for p in PROJECTIONS
                for place in range(size)
            ]
        )
    sources = [load_dense(folder.parent / f"dense{i}") for i in range(recipe.num_donors)]

    def dense(e: int) -> list[tuple[str, int, torch.Tensor, bool]]:
        found = []
        for p, unit, _, _ in units[e]:
            w = sources[owner[e]][DENSE_NAME.format(layer, p)].double()
            found.append((p, unit, w[:, unit] * factor if p == "down" else w[unit], False))
        return found

    def cosines(one: Any, other: Any) -> list[float]:
        sums = {name: [0.0, 0.0, 0.0] for name in ("all", "kept", "redrawn")}
        place = {(p, unit): (w, changed) for p, unit, w, changed in other}
        for p, unit, w, changed in one:
            v, also = place[p, unit]
            for name in ("all", "redrawn" if changed or also else "kept"):
                for i, value in enumerate((w @ v, w @ w, v @ v)):
                    sums[name][i] += float(value)
        return [dot / math.sqrt(aa * bb) if aa else math.nan for dot, aa, bb in sums.values()]

    return {
        "with_dense": [[] if scratch else cosines(units[e], dense(e)) for e in range(E)],
        "between_experts": [
            list(
                np.nanmean([cosines(units[e], units[o]) for o in range(E) if o != e and part[o] == part[e]], axis=0)
                if part.count(part[e]) > 1
                else [math.nan] * 3
            )
            for e in range(E)
        ],
    }


def plain_use(recipe: UpcycleRecipe, folder: Path, layer: int) -> list[float | None]:
    """Each expert's use of changed units, from what its module is given, a window at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    module = next(m for name, m in model.named_modules() if name.endswith("experts") and f"layers.{layer}." in name)
    seen: list[tuple[torch.Tensor, list[int]]] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.extend(zip(inputs[0], inputs[1].tolist(), strict=True)))
    with torch.no_grad():
        for start in range(0, len(TOKENS), 16):
            model(torch.tensor(TOKENS[None, start : start + 16]))
    assert len(seen) == len(TOKENS)
    size, uses = F // recipe.granularity, []
    for e, w in enumerate(experts_of(folder, recipe, layer)):
        total = torch.zeros(size, dtype=torch.float64)
        for x, chosen in seen:
            if e in chosen:
                total += (module.act_fn(w["gate"] @ x.double()) * (w["up"] @ x.double())).abs() * w["down"].norm(dim=1)
        changed = sorted({u for p in PROJECTIONS for u in redrawn_units(recipe, layer, e, p, size).tolist()})
        known = bool(total.sum() > 0) and 0 < len(changed) < size
        uses.append(float(total[changed].sum() / total.sum()) / (len(changed) / size) if known else None)
    return uses


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_similarity_and_use_of_every_upcycling(kind: Kind, tmp_path: Path) -> None:
    start = make(kind, tmp_path)
    folder = trained(start, tmp_path / "trained")
    found, recipe = measure(folder), recipe_of(folder)
    spec = registry.load("target", kind.target)
    layers = [1] if "--moe-layers" in kind.options and "all" not in kind.options else [0, 1]
    assert [row["layer"] for row in found["layers"]] == layers
    factor = 1.0 if spec.scaling_key else scales(recipe, spec)[0]
    expected = plain(recipe, factor, folder, 1)
    row, scratch = found["layers"][-1], recipe.method == "scratch"
    assert (row["with_dense"] is None) == scratch
    assert [note for note in found["notes"] if "drawn" not in note] == []
    for side in ("between_experts", *([] if scratch else ["with_dense"])):
        for expert, values in zip(row[side]["experts"], expected[side], strict=True):
            shown = [None if math.isnan(value) else pytest.approx(value, abs=2e-6) for value in values]
            parts = ("all",) if scratch else ("all", "kept", "redrawn")
            assert [expert[part] for part in parts] == shown[: len(parts)]
            assert not scratch or expert["kept"] is expert["redrawn"] is None
    assert (found["unit_use"] is None) == (found["num_redrawn"] == 0)
    if found["unit_use"]:
        assert [used["layer"] for used in found["unit_use"]["a"]] == layers
        for expert, use in zip(found["unit_use"]["a"][-1]["experts"], plain_use(recipe, folder, 1), strict=True):
            assert (expert and expert["use"]) == (use if use is None else pytest.approx(use, rel=1e-3))
    if scratch:
        return
    # Right after upcycling what was kept is the dense model's, to the last bit or nearly so.
    origin = read_origin(start)
    assert origin
    for before in (row["with_dense"] for row in similarity(start, origin, find_dense(origin))):
        assert before["kept"] == pytest.approx(1, abs=1e-6)
        if recipe.method == "noise":
            assert 0.5 < before["redrawn"] < 0.99
        elif found["num_redrawn"]:
            assert abs(before["redrawn"]) < 0.2


WORDS: dict[str, tuple[tuple[object, ...], int, list[str]]] = {
    "noise": (
        ("--method", "noise", "--noise-ratio", "0.25"),
        1,
        ["with noise added to 16 of 64 units", "Use of the units given noise", "Units given noise begin below 1"],
    ),
    "parts": (FINE, 1, ["one of 4 parts of its feed-forward network, with 8 of 16 units redrawn", "same part"]),
    "donors": (("--num-experts", 4), 2, ["the feed-forward network of one of them", "dense0 and ", "dense1:"]),
    "scratch": (("--method", "scratch"), 1, ["drew every tensor", "no dense FFN to compare"]),
}


@pytest.mark.parametrize("name", WORDS)
def test_the_page_says_how_the_experts_began(name: str, jsonl: Path, tmp_path: Path) -> None:
    options, donors, sentences = WORDS[name]
    folder, out = make(Kind("llama", "mixtral", options, donors), tmp_path), tmp_path / "out"
    command = ("analyze-routing", folder, "--data", f"a={jsonl}", "--out", out, "--max-tokens", 64, "--quiet")
    code, _, errors = tiny.in_process(*command)
    assert code == 0, errors
    page = (out / "report.html").read_text()
    for sentence in sentences:
        assert sentence in page
    if name in ("noise", "scratch"):
        assert "redrawn" not in page.lower()
    plots = {path.name for path in (out / "plots").iterdir()} - {"mri.png", "entropy.png", "load-a.png"}
    scratch = name == "scratch"
    assert plots == {"expert-similarity.png", *(() if scratch else ("dense-similarity.png", "unit-use.png"))}
    # A report of something else leaves none of them behind.
    counts = tmp_path / "counts.json"
    counts.write_text('{"en": {"0": [6, 1, 0, 1]}}')
    assert tiny.in_process("analyze-routing", "--counts", counts, "--top-k", 1, "--out", out, "--quiet")[0] == 0
    assert {path.name for path in (out / "plots").iterdir()} == {"mri.png", "entropy.png", "load-en.png"}


def test_checks_of_the_upcycling(jsonl: Path, mixtral: Path, tmp_path: Path) -> None:
    folder = make(Kind("llama", "mixtral", ("--method", "copy")), tmp_path)

    def run(model: Path, check: str, *more: object) -> tuple[int, str]:
        flags = ("--data", f"a={jsonl}", "--out", tmp_path / "o", "--max-tokens", 64, "--quiet", "--fail-if", check)
        code, _, errors = tiny.in_process("analyze-routing", model, *flags, *more)
        assert errors.count("\n") == (code != 0), errors
        return code, errors

    code, errors = run(folder, "expert_similarity>0.99")
    assert code == 3
    assert "--fail-if: expert_similarity>0.99 in layer 0 (1), layer 1 (1)" in errors
    assert run(folder, "dense_similarity<0.99")[0] == 0
    code, errors = run(folder, "unit_use<0.5")  # nothing was redrawn
    assert (code, "needs a model upcycled by moetool" in errors) == (1, True)
    assert run(mixtral, "kept_similarity<0.5")[0] == 1
    assert run(folder, "unit-use<0.5", "--no-unit-use")[0] == 2
    code, errors = run(folder, "saturation<1")
    assert (code, "needs --compare" in errors) == (2, True)
    code, errors = run(folder, "expert_similarty>1")
    assert (code, "did you mean 'expert_similarity'?" in errors) == (2, True)
