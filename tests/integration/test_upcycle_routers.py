"""Routers that are fitted on text: what is predicted is what the written model does, in every family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moetool import registry
from moetool.calibration.parts import HELD_OUT
from moetool.checkpoint.model import load_model
from moetool.data.make_tokens import tokenized
from moetool.data.text import TextSource
from moetool.lineage import read_lineage
from moetool.routing.capture import RouterCapture
from moetool.upcycle.router_fit import Inputs, Wanted, fit
from tests import tiny
from tests.integration.test_convert import SOURCE_OF

SEQ_LEN = 16
RUN = ("--seq-len", SEQ_LEN, "--batch-size", 13)
WORDS = {"a": "The quick brown fox jumps over the lazy dog", "b": "def add(a, b): return a + b[0] * 42"}


def text(folder: Path, name: str) -> Path:
    draw = np.random.default_rng(sum(name.encode()))
    words = WORDS[name].split()
    documents = [" ".join(draw.choice(words, 30)) for _ in range(40)]
    return tiny.save_jsonl(folder / f"{name}.jsonl", documents, repeat=1)


def upcycle(*arguments: object) -> dict[str, Any]:
    return tiny.result("upcycle", *arguments)


def fails(*arguments: object) -> str:
    return tiny.refusal("upcycle", *arguments)


def routed(folder: Path, paths: dict[str, Path]) -> dict[int, dict[str, torch.Tensor]]:
    """Layer -> text -> chosen experts (T, K) of every fourth window, by transformers alone."""
    model = load_model(folder).eval()
    capture = RouterCapture(model)
    found: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in capture.layers}
    for name, path in paths.items():
        tokens = tokenized(TextSource(str(path)), folder)
        ids = torch.from_numpy(np.asarray(tokens.read(0, tokens.num_tokens)).astype(np.int64))
        windows = [ids[start : start + SEQ_LEN] for start in range(0, len(ids), SEQ_LEN)]
        held_out = windows[HELD_OUT - 1 :: HELD_OUT]
        whole = [window for window in held_out if len(window) == SEQ_LEN]  # all but perhaps the last
        chosen: dict[int, list[torch.Tensor]] = {layer: [] for layer in capture.layers}
        for together in [torch.stack(whole), *(window[None] for window in held_out[len(whole) :])]:
            with torch.no_grad(), capture.collect() as routes:
                model(together)
            for route in routes:
                chosen[route.layer].append(route.indices_TK)
        for layer, some in chosen.items():
            found[layer][name] = torch.cat(some)
    return found


def load_of(chosen_TK: torch.Tensor) -> torch.Tensor:
    return torch.bincount(chosen_TK.flatten(), minlength=64) / chosen_TK.numel()


def counted(folder: Path, paths: dict[str, Path]) -> dict[int, dict[str, torch.Tensor]]:
    """Layer -> text -> load of each expert, on every fourth window, by transformers alone."""
    return {
        layer: {name: load_of(chosen_TK) for name, chosen_TK in texts.items()}
        for layer, texts in routed(folder, paths).items()
    }


def dense_of(family: str, folder: Path, **changes: Any) -> Path:
    dense = tiny.save_dense(SOURCE_OF[family], folder, **changes)
    tiny.save_tokenizer(dense)
    return dense


def check_loads(document: dict[str, Any], found: dict[int, dict[str, torch.Tensor]]) -> None:
    assert [row["layer"] for row in document["fitted"]["layers"]] == sorted(found)
    for row in document["fitted"]["layers"]:
        for name, load in row["load"].items():
            measured = found[row["layer"]][name][: len(load)]
            assert float(measured.sum()) == pytest.approx(1)
            assert torch.tensor(load).sub(measured).abs().max() < 0.005, (row["layer"], name)


@pytest.mark.parametrize("family", registry.names("target"))
def test_balanced_is_as_predicted_in_every_family(family: str, tmp_path: Path) -> None:
    dense = dense_of(family, tmp_path / "dense")
    paths = {name: text(tmp_path, name) for name in WORDS}
    data = [word for name, path in paths.items() for word in ("--calibrate", f"{name}={path}")]
    options = ("--target", family, "--num-experts", 8, *RUN, *data)
    normal = upcycle(dense, tmp_path / "normal", "--target", family, "--num-experts", 8)
    assert normal["fitted"] is None
    out = tmp_path / "moe"
    document = upcycle(dense, out, *options, "--router", "balanced", "--max-shard-size", "50KB")
    found = {"normal": counted(tmp_path / "normal", paths), "balanced": counted(out, paths)}
    check_loads(document, found["balanced"])
    largest = {}
    for name, by_layer in found.items():
        layers = by_layer.values()
        largest[name] = max(float(torch.stack([*loads.values()]).mean(0).max()) for loads in layers)
    assert largest["balanced"] < largest["normal"]
    assert largest["balanced"] < 0.125 * 1.5
    plan = json.loads(tiny.in_process("upcycle", dense, tmp_path / "none", *options, "--router", "balanced", "--plan",
                                      "--json")[1])  # fmt: skip
    assert plan["fitted"] == document["fitted"]
    assert tiny.in_process("verify", out)[0] == 0
    again = upcycle(dense, out, *options, "--router", "balanced", "--max-shard-size", "50KB")
    assert again["already_finished"]


@pytest.fixture(scope="module")
def donors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dense models that differ a little, and a text for each."""
    folder = tmp_path_factory.mktemp("donors")
    dense = dense_of("qwen3_moe", folder / "0")
    other = dense_of("qwen3_moe", folder / "1")
    tensors = load_file(other / "model.safetensors")
    draw = torch.Generator().manual_seed(5)
    noisy = {name: tensor + 0.05 * torch.randn(tensor.shape, generator=draw) for name, tensor in tensors.items()}
    save_file(noisy, other / "model.safetensors", metadata={"format": "pt"})
    for name in WORDS:
        text(folder, name)
    assert dense != other
    return folder


def given(folder: Path, *names: str) -> list[str]:
    return [word for name in names for word in ("--calibrate", f"{name}={folder / name}.jsonl")]


SHAPES: dict[str, tuple[object, ...]] = {
    "copies": ("--num-experts", 8, "--top-k", 2),
    "top-1": ("--num-experts", 4, "--top-k", 1),
    "one each": ("--num-experts", 2, "--top-k", 1),
    "both": ("--num-experts", 2, "--top-k", 2),
    "parts": ("--num-experts", 8, "--top-k", 2, "--granularity", 2),
    "shared": ("--num-experts", 12, "--top-k", 3, "--granularity", 4, "--shared-experts", 1, "--target", "qwen2_moe"),
    "biased": ("--num-experts", 8, "--top-k", 2, "--target", "glm4_moe"),
    "biased parts": (
        "--num-experts",
        8,
        "--top-k",
        4,
        "--granularity",
        2,
        "--shared-experts",
        0,
        "--target",
        "glm4_moe",
    ),
}


@pytest.mark.parametrize("method", ["copy", "drop"])
@pytest.mark.parametrize("shape", SHAPES)
def test_ridge_sends_each_text_to_its_donor(shape: str, method: str, donors: Path, tmp_path: Path) -> None:
    sizes = SHAPES[shape]
    if "--target" in sizes and "qwen2_moe" in sizes:
        dense = [tiny.save_dense("qwen2", tmp_path / str(n), seed=n, use_sliding_window=False) for n in (0, 1)]
        for one in dense:
            tiny.save_tokenizer(one)
    else:
        dense = [donors / "0", donors / "1"]
    out = tmp_path / "moe"
    options = ("--donor", dense[1], *sizes, *RUN, "--method", method, "--router", "ridge", *given(donors, "a", "b"))
    document = upcycle(dense[0], out, *options)
    found = counted(out, {name: donors / f"{name}.jsonl" for name in WORDS})
    check_loads(document, found)
    own = document["recipe"]["num_experts"] // 2
    for row in document["fitted"]["layers"]:
        for donor, (name, load) in enumerate(row["load"].items()):
            share = sum(load[donor * own : (donor + 1) * own])
            assert row["to_donor"][name] == pytest.approx(share)
            assert share > (0.75 if shape != "both" else 0.49)
        together = [sum(loads) / 2 for loads in zip(*row["load"].values(), strict=True)]
        if shape == "copies" and method == "copy":  # a donor's experts share its load
            for first in (0, own):
                mine = together[first : first + own]
                assert max(mine) < 1.5 * sum(mine) / own
    if "parts" in shape:  # whole groups are chosen
        assert document["proof"]["split_groups"] == 0
        for row in document["fitted"]["layers"]:
            for load in row["load"].values():
                assert load[::2] == load[1::2]


def test_the_rows_are_ridge_regression(donors: Path, tmp_path: Path) -> None:
    """Of the first layer, whose input no router changes: from the formula, with transformers' own hidden states."""
    dense, out = [donors / "0", donors / "1"], tmp_path / "moe"
    options = ("--num-experts", 2, "--top-k", 1, "--donor", dense[1], *RUN, "--method", "copy", "--router", "ridge")
    upcycle(dense[0], out, *options, *given(donors, "a", "b"))
    model, means, seconds = load_model(out).eval(), [], []
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, 1)))
    for name in WORDS:
        tokens = tokenized(TextSource(str(donors / f"{name}.jsonl")), out)
        ids = torch.from_numpy(np.asarray(tokens.read(0, tokens.num_tokens)).astype(np.int64))
        seen.clear()
        for number, start in enumerate(range(0, len(ids), SEQ_LEN)):
            if number % HELD_OUT != HELD_OUT - 1:
                with torch.no_grad():
                    model(ids[None, start : start + SEQ_LEN])
        x_TD = torch.cat(seen).double()
        means.append(x_TD.mean(0))
        seconds.append(x_TD.T @ x_TD / len(x_TD))
    second_DD = (seconds[0] + seconds[1]) / 2
    second_DD += 0.01 * second_DD.diagonal().mean() * torch.eye(len(second_DD))
    row_D = torch.linalg.solve(second_DD, (means[0] - means[1]) / 4)  # the first row less the mean of both
    router_ED = load_file(out / "model.safetensors")["model.layers.0.mlp.gate.weight"].double()
    assert torch.nn.functional.cosine_similarity(router_ED[0], row_D, dim=0) > 0.9999
    assert torch.allclose(router_ED[0], -router_ED[1])


def test_a_copy_stays_exact(donors: Path, tmp_path: Path) -> None:
    from tests.integration.test_upcycle_families import close, logits

    before = logits(donors / "0")
    for number, sizes in enumerate(SHAPES.values()):
        if "qwen2_moe" not in sizes:
            out = tmp_path / str(number)
            options = ("--method", "copy", "--router", "balanced", *sizes, *RUN, *given(donors, "a"))
            check_loads(upcycle(donors / "0", out, *options), counted(out, {"a": donors / "a.jsonl"}))
            assert close(logits(out), before), sizes


def test_some_layers_and_bf16(donors: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    options = ("--moe-layers", "1-", "--dtype", "bf16", "--router", "balanced", *RUN, *given(donors, "a", "b"))
    document = upcycle(donors / "0", out, *options)
    assert [row["layer"] for row in document["fitted"]["layers"]] == [1]
    check_loads(document, counted(out, {name: donors / f"{name}.jsonl" for name in WORDS}))
    entry = read_lineage(out)["lineage"][-1]  # type: ignore[index]
    assert list(entry["measured"]["routers"]) == ["1"]
    assert set(entry["recipe"]["calibrate"]["texts"]) == set(WORDS)
    other = tiny.in_process("upcycle", donors / "0", out, *options, "--max-tokens", 300)
    assert other[0] == 1
    assert "different finished checkpoint (other calibrate)" in other[2]
    lineage = read_lineage(out)
    assert lineage
    lineage["lineage"][-1]["measured"]["loads"]["1"]["a"][0] += 0.5
    (out / "moetool.json").write_text(json.dumps(lineage))
    assert "or other numbers measured on the text)" in fails(donors / "0", out, *options)


@pytest.mark.parametrize("change", ["factors", "directions", "groups", "mix", "router", "fewer"])
def test_a_changed_router_is_found(change: str, donors: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    upcycle(donors / "0", out, "--router", "balanced", *RUN, *given(donors, "a"))
    if change == "router":
        tensors = load_file(out / "model.safetensors")
        tensors["model.layers.0.mlp.gate.weight"][0, 0] += 1
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    else:
        document = read_lineage(out)
        assert document
        rows = document["lineage"][-1]["measured"]["routers"]["0"]
        rows |= {
            "factors": {"factors": [2.0] * 8},
            "directions": {"directions": "AAAA"},
            "groups": {"groups": 7},
            "mix": {"mix": [[0.0]] * 8},
            "fewer": {"groups": 4, "factors": [1.0] * 4, "mix": [[0.0, 0.0]] * 4},
        }[change]
        (out / "moetool.json").write_text(json.dumps(document))
    code, _, err = tiny.in_process("verify", out)
    assert code == 1
    assert len(err.strip().splitlines()) == 1, err


def test_loads_are_proven_with_the_text(donors: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    upcycle(donors / "0", out, "--router", "balanced", "--max-tokens", 600, *RUN, *given(donors, "a", "b"))
    code, printed, err = tiny.in_process("verify", out, *given(donors, "a", "b"), "--json")
    assert code == 0, err
    assert json.loads(printed)["proof"]["load_difference"] < 1e-6
    assert "are not those" in tiny.refusal("verify", out, *given(donors, "a"))
    document = read_lineage(out)
    assert document
    document["lineage"][-1]["measured"]["loads"]["1"]["b"][3] += 0.02
    (out / "moetool.json").write_text(json.dumps(document))
    assert "layer 1: a load on b is off by 0.02" in tiny.refusal("verify", out, *given(donors, "a", "b"))
    document["lineage"][-1]["recipe"]["calibrate"]["seq_len"] = -1
    (out / "moetool.json").write_text(json.dumps(document))
    assert "records no router" in tiny.refusal("verify", out, *given(donors, "a", "b"))
    upcycle(donors / "0", tmp_path / "plain")
    assert "records no router" in tiny.refusal("verify", tmp_path / "plain", *given(donors, "a"))


def test_a_text_that_changes_makes_predicted_loads_rough(donors: Path, tmp_path: Path) -> None:
    lines = [(donors / f"{name}.jsonl").read_text() for name in WORDS]
    (tmp_path / "mixed.jsonl").write_text("".join(lines))
    command = ("upcycle", donors / "0", tmp_path / "moe", "--router", "balanced", *RUN, *given(tmp_path, "mixed"))
    code, out, err = tiny.in_process(*command, "--json")
    assert code == 0
    layers = json.loads(out)["fitted"]["layers"]
    for layer, texts in routed(tmp_path / "moe", {"mixed": tmp_path / "mixed.jsonl"}).items():
        chosen_TK = texts["mixed"]
        first_E, second_E = load_of(chosen_TK[: len(chosen_TK) // 2]), load_of(chosen_TK[len(chosen_TK) // 2 :])
        assert layers[layer]["halves"]["mixed"] == pytest.approx(float((first_E - second_E).abs().max()), abs=0.005)
    worst = max(row["halves"]["mixed"] for row in layers)
    assert worst > 0.04  # the words of the second half are others
    assert f"--calibrate mixed: loads in the two halves of its held-out text differ by up to {worst:.1%}" in err
    _, plan, told = tiny.in_process(*command, "--plan")
    assert f"± {worst / 2:.1%}" in " ".join(plan.split())
    assert "--calibrate mixed: loads in the two halves" in told


def test_the_order_of_texts_says_whose_they_are(donors: Path, tmp_path: Path) -> None:
    """What is kept of one order is not taken for the other; a proof keeps to the order of the run."""
    options = ("--donor", donors / "1", "--method", "copy", "--router", "ridge", "--num-experts", 4, *RUN)
    for names in (("a", "b"), ("b", "a")):
        out = tmp_path / names[0]
        document = upcycle(donors / "0", out, *options, *given(donors, *names))
        check_loads(document, counted(out, {name: donors / f"{name}.jsonl" for name in names}))
        for row in document["fitted"]["layers"]:
            assert [*row["to_donor"]] == [*names]
            first = {name: sum(load[:2]) for name, load in row["load"].items()}  # of DENSE's experts
            assert first[names[0]] > 0.7 > 0.3 > first[names[1]]
        code, printed, err = tiny.in_process("verify", out, *given(donors, "b", "a"), "--json")
        assert code == 0, err
        assert json.loads(printed)["proof"]["load_difference"] < 1e-6


@pytest.mark.parametrize("damage", ["empty", "a layer less"])
def test_a_kept_measurement_that_is_damaged_is_made_again(
    damage: str, donors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETOOL_CACHE", str(tmp_path / "cache"))
    command = ("upcycle", donors / "0", tmp_path / "a", "--router", "balanced", *RUN, *given(donors, "a"), "--json")
    plan = tiny.in_process(*command, "--plan")[1]
    (kept,) = (tmp_path / "cache").glob("calibration/*.json")
    document = json.loads(kept.read_text())
    del document["measured"]["routers"]["0"]
    kept.write_text("{}" if damage == "empty" else json.dumps(document))
    again = tiny.in_process(*command, "--plan")[1]
    assert json.loads(again)["fitted"] == json.loads(plan)["fitted"]
    assert "0" in json.loads(kept.read_text())["measured"]["routers"]


def test_a_cache_that_cannot_be_written_is_named(donors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETOOL_CACHE", "/dev/null/cache")
    assert "set MOETOOL_CACHE to a folder that can" in fails(
        donors / "0", "/tmp/out", "--router", "balanced", *RUN, *given(donors, "a"), "--plan"
    )


@pytest.mark.parametrize("biased", [False, True])
def test_a_short_text_counts_as_much_as_a_long_one(biased: bool) -> None:
    """Two domains with means of their own, one with a hundredth of the other's tokens: together they are balanced."""
    E, K, D = 8, 2, 32
    draw = torch.Generator().manual_seed(3)
    means = torch.randn(2, D, generator=draw)

    def inputs(mean_D: torch.Tensor, tokens: int) -> Inputs:
        made = Inputs.zeros(D, second=False)
        made.add(torch.randn(tokens, D, generator=draw) + mean_D, every=1)
        return made

    wanted = Wanted(torch.zeros(E, dtype=torch.int64), K, torch.sigmoid, biased, biased)
    drawn = 0.02 * torch.randn(E, D, generator=draw)
    rows = fit(drawn, [inputs(means[0], 8000), inputs(means[1], 80)], wanted)
    load = torch.zeros(E)
    for mean_D in means:
        scores = (inputs(mean_D, 8000).sample_TD @ rows.rows(drawn).T).sigmoid()
        scores = scores if rows.bias_G is None else scores + rows.bias_G
        load += torch.bincount(scores.topk(K).indices.flatten(), minlength=E) / (2 * K * 8000)
    assert load.max() < 1.35 / E


def test_a_model_that_overflows_is_refused(donors: Path, tmp_path: Path) -> None:
    """Before anything is written."""
    dense, out = tmp_path / "dense", tmp_path / "moe"
    shutil.copytree(donors / "0", dense)
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    text = ["--method", "copy", *RUN, *given(donors, "a")]
    told = fails(dense, out, "--router", "balanced", *text)
    assert "layer 1: a router cannot be fitted" in told
    told = fails(dense, out, "--router", "ridge", "--donor", donors / "1", *text, *given(donors, "b"))
    assert "layer 1: a router cannot be fitted" in told
    told = fails(dense, out, "--granularity", 2, "--split", "activation", *text)
    assert "layer 0: the outputs of its units on the texts are not finite" in told
    assert not out.exists()


def test_zeros_give_zeros() -> None:
    zero = [Inputs.zeros(4, second=True), Inputs.zeros(4, second=True)]
    for text in zero:
        text.add(torch.zeros(8, 4), every=1)
    wanted = Wanted(torch.tensor([0, 1]), 1, lambda logits: logits, close=False, biased=False)
    assert not fit(torch.ones(2, 4), zero, wanted).rows(torch.ones(2, 4)).any()


def test_what_is_missing_is_one_line(donors: Path, tmp_path: Path) -> None:
    dense, out = donors / "0", tmp_path / "moe"
    one, both = given(donors, "a"), given(donors, "a", "b")
    assert "--router balanced needs text: give --calibrate" in fails(dense, out, "--router", "balanced")
    assert "--calibrate has no effect without an option that reads its text" in fails(dense, out, *one)
    assert "DENSE is the only one" in fails(dense, out, "--router", "ridge", *one)
    donor = ("--donor", donors / "1", "--router", "ridge")
    assert "give --calibrate 2 times, not 1" in fails(dense, out, *donor, *one)
    assert "above 0" in fails(dense, out, "--router", "balanced", "--router-std", 0, *one)
    assert "only 1200 tokens" not in fails(dense, out, *donor, *both, "--max-tokens", 40, "--seq-len", 16)
    same = [*given(donors, "a"), "--calibrate", f"again={donors / 'a.jsonl'}"]
    assert "--calibrate again is the same text as a" in fails(dense, out, *donor, *same)
    unread = tiny.in_process("upcycle", dense, out, "--max-tokens", 40)[2]
    assert "--max-tokens has no effect without a text; give --calibrate" in " ".join(unread.split())
    short = fails(dense, out, *donor, *both, "--max-tokens", 40, "--seq-len", 16)
    assert "--calibrate a: only 40 tokens, but 4 windows of 16 are needed" in short
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in fails(dense, out, "--router", "balanced", "--calibrate", f"e={tmp_path / 'empty.jsonl'}")
    assert "expected NAME=PATH" in tiny.in_process("upcycle", dense, out, "--calibrate", "a")[2]
    assert not out.exists()
