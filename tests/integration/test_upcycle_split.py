"""Parts of the dense FFN by what its units do on text: exact, proven, and as measured by hooks on the dense model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moetool import registry
from moetool.calibration.sums import UnitSums
from moetool.checkpoint.reader import CheckpointReader
from moetool.measured import Measured
from moetool.recipe import PROJECTIONS, UpcycleRecipe
from moetool.routing.origin import find_dense, read_origin
from moetool.routing.similarity import similarity
from moetool.surgery import fill
from moetool.units import permutation, redrawn_units, unit_order
from moetool.upcycle.usage import difference
from tests import tiny
from tests.integration.test_upcycle_forms import MULTIMODAL

F, LAYERS, WINDOW, TOKENS = 64, 2, 16, 600
SPLITS = ("random", "activation")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_jsonl(tmp_path_factory.mktemp("other") / "other.jsonl", ["to be or not to be, that is it;"])


def calibrate(split: str, *texts: Path) -> list[object]:
    """The options of a split."""
    reading: list[tuple[object, ...]] = [("--calibrate", f"t{number}={path}") for number, path in enumerate(texts)]
    options: list[object] = ["--split", split]
    reading.append(("--seq-len", WINDOW, "--max-tokens", TOKENS))
    return options + ([*sum(reading, ())] if split == "activation" else [])


def entry(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "moetool.json").read_text())["lineage"][-1]
    return found


def order(out: Path, layer: int) -> Tensor:
    """Dense units, shard by shard, as the lineage says."""
    found = entry(out)
    recipe, measured = UpcycleRecipe.from_json(found["recipe"]), Measured.from_json(found.get("measured", {}), {})
    units = unit_order(recipe, measured, layer, F)
    assert units is not None
    assert sorted(units.tolist()) == list(range(F))
    return units


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    found: Tensor = model.eval()(torch.randint(1, 300, (2, 24), generator=torch.Generator().manual_seed(0))).logits
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@torch.no_grad()
def units_by_hooks(folder: Path, path: Path) -> list[Tensor]:
    """|h| (tokens, F) of each layer on a text, by transformers alone, a window at a time; held-out windows left out."""
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    tokens = [token for line in lines for token in [*tokenizer(line)["input_ids"], tokenizer.eos_token_id]]
    found: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, inputs, number=number: found[number].append(inputs[0][0].abs())
        )
    held = 0
    tokens = tokens[:TOKENS]
    for index, start in enumerate(range(0, len(tokens), WINDOW)):
        some = tokens[start : start + WINDOW]
        if index % 4 == 3 and held < 1024:
            held += len(some)
            continue
        model(torch.tensor([some]))
    return [torch.cat(rows).double() for rows in found]


def contributions(folder: Path, path: Path) -> list[Tensor]:
    """Mean |h| x |column of down| of each layer."""
    source = weights(folder)
    norms = [source[f"model.layers.{layer}.mlp.down_proj.weight"].double().norm(dim=0) for layer in range(LAYERS)]
    return [rows.mean(0) * norm for rows, norm in zip(units_by_hooks(folder, path), norms, strict=True)]


COMBINATIONS = [
    ("llama", "mixtral", "--granularity 4 --num-experts 8 --top-k 4"),
    ("llama", "granitemoe", "--granularity 2 --num-experts 4"),
    ("qwen2", "qwen2_moe", "--granularity 4 --shared-experts 1 --num-experts 6 --top-k 3"),
    ("qwen3", "glm4_moe", "--granularity 8 --shared-experts 2 --num-experts 12 --top-k 6"),
    ("llama", "glm4_moe", "--granularity 4 --shared-experts 4 --num-experts 8 --top-k 4 --moe-layers 1-"),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", "--granularity 4 --num-experts 6 --top-k 3"),
    ("ernie4_5", "ernie4_5_moe", "--granularity 2 --shared-experts 2 --num-experts 4 --moe-layers every:2"),
    ("phi3", "", "--granularity 2 --num-experts 4"),
    ("olmo2", "flex_olmo", "--granularity 2 --num-experts 4"),
    ("lfm2", "lfm2_moe", "--granularity 2 --num-experts 4"),
    ("granitemoehybrid", "granitemoehybrid", "--granularity 4 --shared-experts 1 --num-experts 6 --top-k 3"),
    ("cohere2", "cohere2_moe", "--granularity 2 --shared-experts 1 --num-experts 4"),
]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("family", "target", "options"), COMBINATIONS, ids=[f"{c[0]}-{c[1]}{c[2].replace('--', '')}" for c in COMBINATIONS]
)
def test_any_split_starts_as_the_dense_model(
    family: str, target: str, options: str, split: str, text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(fill, "BLOCK_ELEMENTS", 500)
    dense = tiny.save_dense(family, tmp_path / "dense")
    tiny.save_tokenizer(dense)
    chosen = ("--target", target) if target else ()
    found = tiny.result(
        "upcycle", dense, tmp_path / "moe", *chosen, *options.split(), "--method", "copy", *calibrate(split, text)
    )
    assert found["recipe"]["split"] == split
    a, b = logits(tmp_path / "moe"), logits(dense)
    assert float((a - b).abs().max()) < 1e-5 * max(1.0, float(b.abs().max()))
    layers = found["moe_layers"]
    assert all(order(tmp_path / "moe", layer).tolist() != list(range(F)) for layer in layers)


def test_without_a_split_nothing_of_it_is_recorded(llama: Path, tmp_path: Path) -> None:
    tiny.result("upcycle", llama, tmp_path / "moe", "--granularity", 2, "--num-experts", 4)
    found = entry(tmp_path / "moe")
    assert not {"measured", "split_units"} & set(found)
    assert not {"split", "drop_units"} & set(found["recipe"])


@pytest.mark.parametrize("target", ["mixtral", "glm4_moe"])
@pytest.mark.parametrize("split", SPLITS)
def test_donors_have_one_split(split: str, target: str, llama: Path, text: Path, other: Path, tmp_path: Path) -> None:
    """Of the same model twice, the start is that model; of two, each expert and the mean have the same units."""
    donor = tiny.save_llama(tmp_path / "donor", seed=1)
    shared = int(target == "glm4_moe")
    options: tuple[object, ...] = ("--target", target, "--granularity", 4, "--shared-experts", shared)
    options += ("--method", "copy")
    options += ("--num-experts", 24 - 6 * shared * 2, "--top-k", 4 - shared, *calibrate(split, text, other))
    code, _, err = tiny.in_process("upcycle", llama, tmp_path / "twice", "--donor", llama, *options)
    assert code == 0, err
    assert float((logits(tmp_path / "twice") - logits(llama)).abs().max()) < 1e-5
    found = tiny.result("upcycle", llama, tmp_path / "moe", "--donor", donor, *options)
    recipe = UpcycleRecipe.from_json(found["recipe"])
    assert found["proof"]["copied"] > 0
    made, dense = weights(tmp_path / "moe"), [weights(llama), weights(donor)]
    spec = registry.load("target", target)
    for layer in range(LAYERS):
        units = order(tmp_path / "moe", layer).view(4, F // 4)
        names = {p: f"model.layers.{layer}.mlp.{p}_proj.weight" for p in PROJECTIONS}
        for expert in range(recipe.num_experts):
            mine = units[shared + expert % (4 - shared)]
            source = dense[recipe.donor(expert)]
            gate = made[spec.experts["gate"].format(layer=layer, expert=expert)]
            assert torch.equal(gate, source[names["gate"]][mine])
        if shared:
            mean = torch.stack([source[names["up"]] for source in dense]).mean(0)[units[0]]
            assert torch.equal(made[spec.shared.tensors["up"].format(layer=layer)], mean)


def test_shared_experts_get_what_contributes_most(llama: Path, text: Path, tmp_path: Path) -> None:
    donor = tiny.save_llama(tmp_path / "donor", seed=1)
    options = ("--target", "glm4_moe", "--granularity", 8, "--shared-experts", 2, "--num-experts", 12, "--top-k", 6)
    out, both = tmp_path / "moe", tmp_path / "both"
    for folder, more in ((out, ()), (both, ("--donor", donor))):
        code, _, err = tiny.in_process("upcycle", llama, folder, *options, *more, *calibrate("activation", text))
        assert code == 0, err
    own, others = contributions(llama, text), contributions(donor, text)
    for layer in range(LAYERS):
        assert order(out, layer)[:16].tolist() == sorted(own[layer].topk(16).indices.tolist())
        total = own[layer] + others[layer]
        assert order(both, layer)[:16].tolist() == sorted(total.topk(16).indices.tolist())
        sums = own[layer][order(out, layer)[16:].view(6, 8)].sum(1)
        assert float(sums.max() / sums.min()) < 1.15
    assert entry(out)["recipe"]["calibrate"]["texts"].keys() == {"t0"}


@pytest.fixture(scope="module", params=["random", "activation"])
def split_model(request: Any, llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drop-upcycled, per-matrix where the split is random; never modify it."""
    out = tmp_path_factory.mktemp("split") / "moe"
    options: tuple[object, ...] = ("--granularity", 2, "--num-experts", 6, "--drop-ratio", "0.4")
    if request.param == "random":
        options += ("--drop-index", "per-matrix")
    tiny.result("upcycle", llama, out, *options, *calibrate(request.param, text))
    return out


def test_what_is_kept_and_redrawn(split_model: Path, llama: Path) -> None:
    """Against whole matrices: kept units are the dense ones times 2, redrawn ones have the moments of their slice."""
    found, made, dense = entry(split_model), weights(split_model), weights(llama)
    recipe, measured = UpcycleRecipe.from_json(found["recipe"]), Measured.from_json(found.get("measured", {}), {})
    for layer in range(LAYERS):
        units = order(split_model, layer).view(2, 32)
        for expert in range(6):
            mine = units[expert % 2]
            shuffled = permutation(recipe, layer, expert, 32)
            mine = mine if shuffled is None else mine[shuffled]
            for projection, name in zip(PROJECTIONS, ("w1", "w3", "w2"), strict=True):
                matrix = dense[f"model.layers.{layer}.mlp.{projection}_proj.weight"]
                rows = (2 * matrix.T if projection == "down" else matrix)[mine]
                new = made[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"]
                new = new.T if projection == "down" else new
                redrawn = redrawn_units(recipe, layer, expert, projection, 32, measured)
                kept = torch.ones(32, dtype=torch.bool)
                kept[redrawn] = False
                assert torch.equal(new[kept], rows[kept])
                assert bool((new[redrawn] != rows[redrawn]).all())


@pytest.mark.parametrize("level", ["quick", "full"])
def test_a_swapped_unit_and_an_edited_split_are_found(split_model: Path, level: str, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    shutil.copytree(split_model, out)
    assert tiny.in_process("verify", out, "--level", level)[0] == 0
    recipe = UpcycleRecipe.from_json(entry(out)["recipe"])
    reader, path = CheckpointReader(out), out / "model.safetensors"
    raw = bytearray(path.read_bytes())
    for expert in range(recipe.num_experts):  # its units the other way around
        info = reader.tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight"]
        rows = raw[info.start : info.start + info.size]
        width = info.size // info.shape[0]
        turned = b"".join(rows[at : at + width] for at in reversed(range(0, len(rows), width)))
        raw[info.start : info.start + info.size] = turned
    path.write_bytes(raw)
    assert "differ from the source" in tiny.refusal("verify", out, "--level", level)
    shutil.copy(split_model / "model.safetensors", out)
    document = json.loads((out / "moetool.json").read_text())
    found = document["lineage"][-1]
    if recipe.split == "random":
        found["recipe"]["seed"] = 1
        expected = "differ"
    else:
        found["measured"]["split"]["0"] = found["measured"]["split"]["1"]
        expected = "differ from the source"
    (out / "moetool.json").write_text(json.dumps(document))
    assert expected in tiny.refusal("verify", out, "--level", level)
    del found["measured" if recipe.split == "activation" else "split_units"]
    found["recipe"]["seed"] = 0
    (out / "moetool.json").write_text(json.dumps(document))
    assert "edited" in tiny.refusal("verify", out, "--level", level)


def test_similarity_to_the_dense_model(split_model: Path, llama: Path, tmp_path: Path) -> None:
    """Against plain loops over units, after every weight has moved."""
    trained = tmp_path / "moe"
    shutil.copytree(split_model, trained)
    draw = torch.Generator().manual_seed(1)
    tensors = {
        name: w + 0.1 * torch.randn(w.shape, generator=draw)
        for name, w in load_file(trained / "model.safetensors").items()
    }
    save_file(tensors, trained / "model.safetensors", metadata={"format": "pt"})
    origin = read_origin(trained)
    assert origin
    dense = weights(llama)
    for row in similarity(trained, origin, find_dense(origin)):
        layer = row["layer"]
        units = order(trained, layer).view(2, 32)
        for expert in range(6):
            found = row["with_dense"]["experts"][expert]
            places = {p: origin.redrawn(layer, expert, p) for p in PROJECTIONS}
            plain = _plain_cosines(trained, dense, origin.recipe, layer, expert, units[expert % 2], places)
            assert {part: found[part] for part in plain} == pytest.approx(plain, abs=1e-5)
        assert row["with_dense"]["kept"] > 0.8


def _plain_cosines(
    folder: Path,
    dense: Mapping[str, Tensor],
    recipe: UpcycleRecipe,
    layer: int,
    expert: int,
    mine: Tensor,
    redrawn: Mapping[str, Tensor],
) -> dict[str, float]:
    made, sums = load_file(folder / "model.safetensors"), {part: [0.0, 0.0, 0.0] for part in ("all", "kept", "redrawn")}
    shuffled = permutation(recipe, layer, expert, 32)
    for projection, name in zip(PROJECTIONS, ("w1", "w3", "w2"), strict=True):
        new = made[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"]
        old = dense[f"model.layers.{layer}.mlp.{projection}_proj.weight"]
        new, old = (new.T, 2 * old.T) if projection == "down" else (new, old)
        for place in range(32):
            unit = int(mine[place if shuffled is None else shuffled[place]])
            a, b = new[place].double(), old[unit].double()
            for part in ("all", "redrawn" if redrawn[projection][place] else "kept"):
                for at, value in enumerate((a @ b, a @ a, b @ b)):
                    sums[part][at] += float(value)
    return {part: dot / (aa * bb) ** 0.5 for part, (dot, aa, bb) in sums.items()}


def test_analysis_of_a_split_model(split_model: Path, text: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    code, _, err = tiny.in_process(
        "analyze-routing", split_model, "--data", f"a={text}", "--out", report, "--max-tokens", 400, "--quiet"
    )
    assert code == 0, err
    found = json.loads((report / "report.json").read_text())["upcycling"]
    assert found["notes"] == []
    assert found["mean"]["with_dense"]["kept"] == pytest.approx(1, abs=1e-6)
    assert abs(found["mean"]["with_dense"]["redrawn"]) < 0.1
    assert found["unit_use"]["a"][0]["use"] > 0
    broken = tmp_path / "broken"
    shutil.copytree(split_model, broken)
    document = json.loads((broken / "moetool.json").read_text())
    document["lineage"][-1].pop("measured", None)
    document["lineage"][-1].pop("split_units", None)
    (broken / "moetool.json").write_text(json.dumps(document))
    line = tiny.refusal("analyze-routing", broken, "--data", f"a={text}", "--out", tmp_path / "other")
    assert "delete it to analyse the checkpoint without it" in line


@pytest.mark.parametrize("method", ["drop", "noise"])
def test_least_used_units_are_redrawn_more_often(method: str, llama: Path, text: Path, tmp_path: Path) -> None:
    options: tuple[object, ...] = ("--granularity", 2, "--num-experts", 32, "--method", method)
    options += (f"--{method}-ratio", "0.25")
    options += ("--drop-units", "least-used", *calibrate("activation", text))
    found = tiny.result("upcycle", llama, tmp_path / "moe", *options)
    assert found["redrawn_units"]["per_expert"] == 8
    assert found["proof"]["redrawn_units"] == 8 * 32 * LAYERS
    origin, own = read_origin(tmp_path / "moe"), contributions(llama, text)
    assert origin
    kept_pairs = []
    for layer in range(LAYERS):
        counts = torch.zeros(F)
        sets = []
        for expert in range(32):
            held = origin.held(layer, expert)
            assert held is not None
            redrawn = origin.redrawn(layer, expert)
            assert int(redrawn.sum()) == 8
            counts[held[redrawn]] += 1
            sets.append(frozenset(held[redrawn].tolist()))
        assert len(set(sets)) == 32  # experts differ
        rank = own[layer].argsort().argsort().double()
        # Each unit is in 16 experts; the eighth that does least is redrawn in far more of them than the last eighth.
        assert counts[rank < 8].mean() > 2 * counts[rank >= 56].mean()
        pairs = [(sets[a], sets[b]) for a in range(32) for b in range(a % 2, a, 2)]
        kept_pairs += [(32 - len(one | another)) / 32 for one, another in pairs]
    assert found["redrawn_units"]["common"] == pytest.approx(sum(kept_pairs) / len(kept_pairs))
    # Each donor by its own units.
    donor = tiny.save_llama(tmp_path / "donor", seed=1)
    two = ("--num-experts", 4, "--drop-units", "least-used", "--calibrate", f"a={text}", "--max-tokens", TOKENS)
    assert tiny.result("upcycle", llama, tmp_path / "two", "--donor", donor, *two)["proof"]["redrawn_units"] > 0


def test_the_same_command_again_finds_it_finished(llama: Path, text: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    options = ("--granularity", 2, "--num-experts", 4, "--drop-units", "least-used")
    first = tiny.result("upcycle", llama, out, *options, *calibrate("activation", text))
    assert "already_finished" not in first
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert tiny.result("upcycle", llama, out, *options, *calibrate("activation", text))["already_finished"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # The options that it left say the same, to another folder; a cache that is lost changes nothing.
    code, _, err = tiny.in_process("upcycle", "--config", out / "moetool.yaml", llama, tmp_path / "again")
    assert code == 0, err
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == before["model.safetensors"]
    line = tiny.refusal("upcycle", llama, out, *options, *calibrate("activation", other))
    assert "other calibrate" in line
    assert "--overwrite" in line
    words = ("--calibrate", f"t0={text}", "--seq-len", WINDOW, "--max-tokens", TOKENS)
    line = tiny.refusal("upcycle", llama, out, *options, "--split", "random", *words)
    assert "split activation -> random" in line
    line = tiny.refusal("upcycle", llama, out, "--granularity", 2, "--num-experts", 4)
    assert "split activation -> default" in line


def test_a_plan_reads_the_text_and_writes_nothing(llama: Path, text: Path, tmp_path: Path) -> None:
    options = ("--granularity", 4, "--num-experts", 8, "--top-k", 4, *calibrate("activation", text))
    code, out, err = tiny.in_process("upcycle", llama, tmp_path / "moe", *options, "--plan")
    assert code == 0, err
    assert "(activation split)" in " ".join(out.split())
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("option", [("--split", "activation", "--granularity", 2), ("--drop-units", "least-used")])
def test_a_text_too_short_for_what_is_measured_is_told(
    option: tuple[object, ...], llama: Path, text: Path, tmp_path: Path
) -> None:
    told = {}
    for tokens in (20, 2_000):
        more = ("--calibrate", f"a={text}", "--seq-len", WINDOW, "--max-tokens", tokens)
        code, _, err = tiny.in_process("upcycle", llama, tmp_path / "moe", *option, *more, "--plan")
        assert code == 0, err
        told[tokens] = " ".join(err.split())
    assert f"warning: {option[0]} {option[1]}: the units' contributions in the two halves" in told[20]
    assert "the units' contributions" not in told[2_000]


def test_the_difference_of_halves_by_hand() -> None:
    """Units with norms 1 and 2 of `down`; |h| sums to (6, 1) in the first half and (2, 3) in the second.

    Contributions are (6, 2) and (2, 6): three quarters and a quarter, then a quarter and three quarters.
    """
    ffn: Any = SimpleNamespace(down=SimpleNamespace(weight=torch.tensor([[1.0, 0.0], [0.0, 2.0]])))
    first, whole = (UnitSums(torch.tensor(one), torch.zeros(2)) for one in ([6.0, 1.0], [8.0, 4.0]))
    assert difference(ffn, whole, first) == pytest.approx(0.5)
    assert difference(ffn, whole, whole) == 1.0  # a text of one token has no second half


REFUSED = [
    (("--split", "activation", "--granularity", 2), "--split activation needs text: give --calibrate NAME=PATH"),
    (("--drop-units", "least-used"), "--drop-units least-used needs text: give --calibrate NAME=PATH"),
    (("--calibrate", "a=x.txt"), "--calibrate has no effect without an option that reads its text"),
    (
        ("--split", "random", "--granularity", 2, "--calibrate", "a=x.txt"),
        "--calibrate has no effect without an option that reads its text",
    ),
    (("--split", "random"), "--split has no effect with --granularity 1"),
    (("--split", "random", "--granularity", 2, "--method", "scratch"), "--split has no effect with --method scratch"),
    (("--drop-units", "least-used", "--method", "copy"), "--drop-units has no effect with --method copy"),
    (("--drop-units", "least-used", "--method", "scratch"), "--drop-units has no effect with --method scratch"),
]


@pytest.mark.parametrize(("options", "line"), REFUSED, ids=[" ".join(map(str, o)) for o, _ in REFUSED])
def test_options_that_contradict_each_other(
    options: tuple[object, ...], line: str, llama: Path, tmp_path: Path
) -> None:
    code, _, err = tiny.in_process("upcycle", llama, tmp_path / "moe", *options)
    assert code == (1 if "text" in line else 2)
    assert line in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "moe").exists()


def test_a_multimodal_model_is_sent_to_convert(text: Path, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING["llava"](**MULTIMODAL["llava"][0]))
    dense = tmp_path / "dense"
    model.save_pretrained(dense)
    tiny.save_tokenizer(dense)
    options = ("--granularity", 2, "--num-experts", 4, "--method", "copy", *calibrate("activation", text))
    line = tiny.refusal("upcycle", dense, tmp_path / "moe", *options)
    assert f"is a llava; take its text model out first: moetool convert {dense}" in line
    assert tiny.in_process("convert", dense, tmp_path / "text")[0] == 0
    assert tiny.result("upcycle", tmp_path / "text", tmp_path / "moe", *options)["recipe"]["split"] == "activation"


def test_texts_that_cannot_be_used_are_one_line(llama: Path, text: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    out, options = tmp_path / "moe", ("--granularity", 2, "--num-experts", 4, "--split", "activation")

    def refused(*more: object) -> str:
        line = tiny.refusal("upcycle", llama, out, *options, *more)
        assert not out.exists()
        return line

    assert "empty" in refused("--calibrate", f"a={empty}")
    assert "nowhere" in refused("--calibrate", f"a={tmp_path / 'nowhere.txt'}")
    assert "--seq-len 4096: the model has only 128 positions" in refused("--calibrate", f"a={text}", "--seq-len", 4096)
    larger = tiny.save_llama(tmp_path / "larger", vocab_size=600)
    tiny.save_tokenizer(larger, 400)
    code, _, err = tiny.in_process("tokenize", text, "--out", tmp_path / "tokens", "--tokenizer", larger)
    assert code == 0, err
    assert "token" in refused("--calibrate", f"a={tmp_path / 'tokens'}")
    least = ("--drop-units", "least-used", "--calibrate", f"a={text}")
    line = tiny.refusal("upcycle", llama, out, *least, "--drop-index", "per-matrix")
    assert "--drop-index per-matrix" in line
    line = tiny.refusal("upcycle", llama, out, *least, "--drop-ratio", "0")
    assert "no effect" in line
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "is not empty" in tiny.refusal("upcycle", llama, out, *options, "--calibrate", f"a={text}")
