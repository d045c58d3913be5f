"""`moetool grow --utility`: which experts are copied, by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moetool.calibration.gradient import expert_gradients
from moetool.checkpoint.model import load_model
from moetool.checkpoint.reader import CheckpointReader
from moetool.data.make_tokens import tokenized
from moetool.data.text import TextSource
from moetool.errors import CheckpointError, DataError
from moetool.grow.plan import plan_growth
from moetool.grow.recipe import GrowRecipe
from moetool.grow.utility import most_useful
from moetool.routing.text_pass import Windows
from tests import tiny
from tests.integration.test_grow import fails, grow, run, upcycled

SMALL = ("--seq-len", 16, "--batch-size", 2, "--max-tokens", 48)  # three windows: none is held out
START = {"mixtral": "twins", "glm4_moe": "sleeping"}
FAMILIES: dict[str, Callable[[Path], Path]] = {"mixtral": tiny.save_mixtral, "glm4_moe": tiny.save_glm4_moe}


def windows(folder: Path, path: Path) -> Tensor:
    """The first three windows of 16 tokens."""
    stream = tokenized(TextSource(str(path)), folder)
    return torch.from_numpy(stream.read(0, 48).astype("int64")).reshape(3, 16)


def sums_by_hand(family: str, folder: Path, ids_BS: Tensor) -> dict[str, Tensor]:
    """Tokens and weights of each expert (layers, E), from the logits of the routers alone."""
    model = load_model(folder).eval()
    found: list[Tensor] = []
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    for gate in gates:
        gate.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].reshape(-1, 32) @ module.weight.T))
    with torch.no_grad():
        for ids_S in ids_BS:
            model(ids_S[None])
    rows: dict[str, list[Tensor]] = {"frequency": [], "gate": []}
    for number in range(len(gates)):
        frequency, weight = torch.zeros(4), torch.zeros(4)
        for logits_TE in found[number :: len(gates)]:
            for logits in logits_TE:
                score = logits.softmax(-1) if family == "mixtral" else logits.sigmoid()
                chosen = score.topk(2).indices
                for expert in chosen.tolist():
                    frequency[expert] += 1
                    weight[expert] += score[expert] / score[chosen].sum() * (1 if family == "mixtral" else 1.5)
        rows["frequency"].append(frequency)
        rows["gate"].append(weight)
    return {name: torch.stack(layers) for name, layers in rows.items()}


def gradients_by_hand(folder: Path, ids_BS: Tensor) -> Tensor:
    """Squared norms (layers, E) of the gradient of the mean loss, by autograd, one window at a time."""
    model = load_model(folder).eval()
    names = [name for name, _ in model.named_parameters() if ".experts." in name]
    weights = [dict(model.named_parameters())[name] for name in names]
    total = [torch.zeros_like(weight) for weight in weights]
    for ids_S in ids_BS:
        logits = model(ids_S[None]).logits[0, :-1]
        loss = -logits.log_softmax(-1)[torch.arange(15), ids_S[1:]].sum()
        for gathered, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
            gathered += gradient
    layers = sorted({name.split(".")[2] for name in names})
    rows = torch.zeros(len(layers), 4, dtype=torch.float64)
    for name, gradient in zip(names, total, strict=True):
        for expert in range(4):
            rows[layers.index(name.split(".")[2]), expert] += ((gradient[expert] / 45).double() ** 2).sum()
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_each_utility_by_hand(family: str, jsonl: Path, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "moe")
    ids_BS = windows(folder, jsonl)
    wanted = sums_by_hand(family, folder, ids_BS) | {"gradient": gradients_by_hand(folder, ids_BS)}
    chosen = set()
    for utility, scores_LE in wanted.items():
        out = tmp_path / utility
        how = ("--start", START[family], "--utility", utility, "--data", f"a={jsonl}", *SMALL)
        document = grow(folder, out, "--num-experts", 9, *how)
        lineage = json.loads((out / "moetool.json").read_text())["lineage"][-1]["recipe"]
        assert lineage["utility"] == utility
        assert list(lineage["data"]) == ["a"]
        for row, scores_E, origins in zip(document["layers"], scores_LE, lineage["experts"]["from"], strict=True):
            assert row["utility"] == pytest.approx(scores_E.tolist(), rel=1e-4), utility
            best, second = scores_E.argsort(descending=True).tolist()[:2]
            assert origins == [0, 1, 2, 3, *sorted([best] * 3 + [second] * 2)]  # at most three copies of one
            assert row["copies"] == [origins.count(expert) - 1 for expert in range(4)]
            chosen.add(tuple(origins))
        assert f"copies by {utility}" in " ".join(tiny.in_process("inspect", out)[1].split())
    assert len(chosen) > 1


def test_the_gradient_is_that_of_the_mean_over_all_texts(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    stream = tokenized(TextSource(str(jsonl)), mixtral)
    ids_BS = windows(mixtral, jsonl)
    model = load_model(mixtral)
    parts = {"a": stream.documents(torch.arange(1).numpy()), "b": stream}
    one = expert_gradients(model, {"b": stream}, Windows(16, 1, 48))
    two = expert_gradients(model, {"b": stream, "c": stream}, Windows(16, 1, 48))
    both = expert_gradients(model, parts, Windows(16, 3, 40))
    wanted = gradients_by_hand(mixtral, ids_BS)
    for row, layer in enumerate(one):
        assert torch.allclose(one[layer], wanted[row], rtol=1e-4)
        assert torch.allclose(two[layer], one[layer], rtol=1e-5)  # of the mean, so twice the text is the same
        assert not torch.allclose(both[layer], one[layer], rtol=1e-2)
    assert all(weight.grad is None for weight in model.parameters())
    with pytest.raises(DataError, match="--data a: the text has no next token to predict"):
        expert_gradients(model, {"a": stream}, Windows(16, 1, 1))


def test_the_greedy_rule() -> None:
    scores = torch.tensor([1.0, 5.0, 3.0, 3.0])
    assert most_useful(scores, 5) == [0, 1, 2, 3, 1]
    assert most_useful(scores, 8) == [0, 1, 2, 3, 1, 1, 1, 2]  # of equal ones the first
    assert most_useful(scores, 16) == [0, 1, 2, 3, *[0] * 3, *[1] * 3, *[2] * 3, *[3] * 3]


def test_sleeping_copies_of_any_experts_are_exact(jsonl: Path, tmp_path: Path) -> None:
    moe = upcycled("glm4_moe", tmp_path)
    tiny.save_tokenizer(moe)
    text = ("--utility", "frequency", "--data", f"a={jsonl}", "--val", f"a={jsonl}", *SMALL)
    document = grow(moe, tmp_path / "out", "--num-experts", 7, "--start", "sleeping", *text)
    assert document["val"]["a"]["after"] == pytest.approx(document["val"]["a"]["before"], abs=1e-5)
    (before, chosen), (after, routes) = run(moe), run(tmp_path / "out")
    assert float((after - before).abs().max()) < 1e-5 * float(before.abs().max())
    assert all(torch.equal(old.sort().values, new.sort().values) for old, new in zip(chosen, routes, strict=True))
    origins = json.loads((tmp_path / "out" / "moetool.json").read_text())["lineage"][-1]["recipe"]["experts"]["from"]
    weights, old = load_file(tmp_path / "out" / "model.safetensors"), load_file(moe / "model.safetensors")
    for layer, one in enumerate(origins):
        for after_, before_ in enumerate(one):
            name = f"model.layers.{layer}.mlp.experts.{{}}.up_proj.weight"
            assert torch.equal(weights[name.format(after_)], old[name.format(before_)])
            gate = f"model.layers.{layer}.mlp.gate.weight"
            assert torch.equal(weights[gate][after_], old[gate][before_])
    assert tiny.in_process("verify", tmp_path / "out")[0] == 0


def test_a_lineage_that_names_another_original_is_found(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    text = ("--start", "twins", "--utility", "gate", "--data", f"a={jsonl}", *SMALL)
    grow(mixtral, tmp_path / "out", "--num-experts", 6, *text)
    path = tmp_path / "out" / "moetool.json"
    lineage = json.loads(path.read_text())
    origins = lineage["lineage"][-1]["recipe"]["experts"]["from"][1]
    origins[5] = (origins[5] + 1) % 4
    path.write_text(json.dumps(lineage))
    code, _, err = tiny.in_process("verify", tmp_path / "out")
    assert (code, "should be a copy, but rows" in " ".join(err.split())) == (1, True)


def test_fewest_experts_that_a_token_goes_to(mixtral: Path) -> None:
    with CheckpointReader(mixtral) as reader:
        recipe = GrowRecipe(9, 4, "twins", None, "gate")
        origins: Any = {0: [0, 1, 2, 3, 0, 1, 1, 2, 3], 1: [0, 1, 2, 3, 0, 0, 0, 1, 2]}
        assert plan_growth([reader], recipe, 10**9, origins).used == (2, 1)  # layer 1 has four of expert 0
        origins[1] = [0, 1, 2, 3, 0, 0, 1, 2, 3]
        assert plan_growth([reader], recipe, 10**9, origins).used == (2, 2)  # three and two
        for wrong in ({0: origins[0]}, origins | {1: [1, 0, 2, 3, 0, 0, 1, 2, 3]}, origins | {1: [0, 1, 2, 3, 0]}):
            with pytest.raises(CheckpointError, match="the copies of an entry are not of the experts"):
                plan_growth([reader], recipe, 10**9, wrong)


def test_refusals(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", ("--data", f"a={jsonl}")

    def usage(*arguments: object) -> str:
        code, _, err = tiny.in_process("grow", mixtral, out, *arguments)
        assert code == 2, err
        return " ".join(err.split())

    assert "double-k needs as many copies of each expert" in usage("--num-experts", 8, "--utility", "gate", *data)
    twins = ("--num-experts", 8, "--start", "twins")
    assert "--utility gate needs a text" in usage(*twins, "--utility", "gate")
    assert "--data has no effect without --utility" in usage(*twins, *data)
    assert "--seq-len has no effect without a text" in usage(*twins, "--seq-len", 8)
    more = ("--start", "twins", "--utility", "gate", *data, *SMALL)
    assert "no expert is copied more than 3 times; give at most 16" in fails(mixtral, out, "--num-experts", 17, *more)
    gradient = ("--start", "twins", "--utility", "gradient", *data, "--stream")
    assert "--utility gradient needs the whole model" in fails(mixtral, out, "--num-experts", 8, *gradient)
    ernie = upcycled("ernie4_5_moe", tmp_path)
    message = fails(ernie, out, "--num-experts", 8, "--start", "sleeping", "--utility", "gate", *data)
    assert "needs as many copies of each expert in this family" in message
    assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    assert "is not empty" in fails(mixtral, tmp_path / "full", "--num-experts", 8, *more)


def test_layers_one_at_a_time_give_the_same_growth(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    how = ("--num-experts", 6, "--start", "twins", "--utility", "gate", "--data", f"a={jsonl}", "--val", f"a={jsonl}")
    found = [grow(mixtral, tmp_path / name, *how, *SMALL, *more) for name, more in (("a", ()), ("b", ("--stream",)))]
    assert found[0]["layers"] == found[1]["layers"]
    assert found[0]["val"] == found[1]["val"]


def test_the_loss_of_twins_is_measured(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    text = ("--val", f"a={jsonl}", *SMALL)
    planned = tiny.in_process(
        "grow", mixtral, tmp_path / "out", "--num-experts", 8, "--start", "twins", "--plan", *text
    )
    assert planned[0] == 0
    assert "loss on a" in planned[1] + planned[2]
    document = grow(mixtral, tmp_path / "out", "--num-experts", 8, "--start", "twins", *text)
    loss = document["val"]["a"]
    assert loss["after"] != pytest.approx(loss["before"], abs=1e-4)
