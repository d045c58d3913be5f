"""`moetool prune`: scores by hand, what stays the same, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetool import registry
from moetool.calibration.experts import layers_with_experts
from moetool.calibration.sums import Calibration, ExpertSums
from moetool.calibration.text_pass import calibrate, mean_losses
from moetool.checkpoint.model import load_model
from moetool.data.make_tokens import tokenized
from moetool.data.text import TextSource
from moetool.data.tokens import TokenStream
from moetool.errors import ConfigError
from moetool.prune.choose import choose, highest, super_experts
from moetool.prune.reroute import Sample, by_reconstruction
from moetool.routing.origin import read_origin
from moetool.routing.text_pass import Windows
from tests import tiny
from tests.integration.test_convert import weights
from tests.integration.test_grow import run, upcycled

SMALL = ("--seq-len", 16, "--batch-size", 2, "--max-tokens", 200)


def prune(*arguments: object) -> dict[str, Any]:
    return tiny.result("prune", *arguments, *SMALL)


def fails(*arguments: object) -> str:
    return tiny.refusal("prune", *arguments, *SMALL)


def stream(folder: Path, path: Path) -> TokenStream:
    return tokenized(TextSource(str(path)), folder)


def qwen(folder: Path, **changes: Any) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 64, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 6,
        "num_experts_per_tok": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": 0,
        "eos_token_id": 0, "norm_topk_prob": False,
    }  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**(settings | changes))).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


# Softmax over all experts and renormalised; not renormalised; sigmoid with a bias, renormalised and times 1.5.
FAMILIES = {"mixtral": tiny.save_mixtral, "qwen3_moe": qwen, "glm4_moe": tiny.save_glm4_moe}


def by_hand(layer: int, folder: Path, hidden_TD: Tensor, family: str) -> dict[str, Tensor]:
    """The sums of each expert, one token and one expert at a time, from the files."""
    w = weights(folder)
    prefix = f"model.layers.{layer}." + ("block_sparse_moe" if family == "mixtral" else "mlp")
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    router = w[f"{prefix}.gate.weight"]
    E = len(router)
    sums = {name: torch.zeros(E, dtype=torch.float64) for name in ("routes", "gate", "norm", "square", "weighted")}
    for x in hidden_TD:
        logits = router @ x
        if family == "glm4_moe":
            score = logits.sigmoid()
            chosen = (score + w[f"{prefix}.gate.e_score_correction_bias"]).topk(2).indices
            g = 1.5 * score[chosen] / score[chosen].sum()
        else:
            score = logits.softmax(-1)
            chosen = score.topk(2).indices
            g = score[chosen] / score[chosen].sum() if family == "mixtral" else score[chosen]
        for weight, e in zip(g.tolist(), chosen.tolist(), strict=True):
            one = f"{prefix}.experts.{e}"
            h = torch.nn.functional.silu(w[f"{one}.{gate}.weight"] @ x) * (w[f"{one}.{up}.weight"] @ x)
            norm = float((w[f"{one}.{down}.weight"] @ h).norm())
            for name, value in (
                ("routes", 1),
                ("gate", weight),
                ("norm", norm),
                ("square", norm**2),
                ("weighted", weight * norm),
            ):
                sums[name][e] += value
    return sums


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sums_and_scores_of_a_layer_by_hand(family: str, jsonl: Path, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "moe")
    if family == "glm4_moe":
        tensors = weights(folder)
        for name in tensors:
            if name.endswith("correction_bias"):
                tensors[name] = torch.tensor([0.3, -0.2, 0.1, 0.0])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_model(folder).eval()
    # 3 windows of 16 tokens (the fourth would be held out), the last not full: 40 tokens.
    found = calibrate(model, {"a": stream(folder, jsonl)}, Windows(16, 1, 40))
    for layer in found.sums:
        sums, hidden_TD = found.sums[layer], found.fitted[layer]
        assert len(hidden_TD) == 40
        hand = by_hand(layer, folder, hidden_TD, family)
        for name, value_E in hand.items():
            assert torch.allclose(getattr(sums, f"{name}_E"), value_E, rtol=1e-4), name
        assert float(sums.routes_E.sum()) == 80
        n = hand["routes"].clamp(min=1)
        wanted = {
            "frequency": hand["routes"] / 40, "ean": hand["norm"], "weighted-ean": hand["weighted"],
            "reap": hand["weighted"] / n, "man": hand["norm"] / n, "msan": hand["square"] / n,
        }  # fmt: skip
        assert wanted.keys() == set(registry.names("score"))
        for name, score_E in wanted.items():
            assert torch.allclose(registry.load("score", name)(sums), score_E, rtol=1e-4), name


def test_sums_of_two_texts_add_up(mixtral: Path, jsonl: Path) -> None:
    model = load_model(mixtral).eval()
    text = stream(mixtral, jsonl)
    run = Windows(16, 1, 32)
    half = [text.documents(torch.arange(a, b).numpy()) for a, b in ((0, 1), (1, 3))]
    both = calibrate(model, {"a": half[0], "b": half[1]}, run)
    apart = [calibrate(model, {"a": one}, run).sums for one in half]
    for layer, sums in both.sums.items():
        added = apart[0][layer] + apart[1][layer]
        for name in ("tokens", "routes_E", "gate_E", "norm_E", "square_E", "weighted_E", "largest_E"):
            assert torch.allclose(getattr(sums, name), getattr(added, name))
    again = Calibration.from_tensors(both.to_tensors())
    assert all(torch.equal(again.sums[n].gate_E, both.sums[n].gate_E) for n in both.sums)


def test_every_fourth_window_of_each_text_is_held_out(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    other = tiny.save_jsonl(tmp_path / "other.jsonl", ["router token expert layer gate " * 40])
    model = load_model(mixtral).eval()
    one, two = stream(mixtral, jsonl), stream(mixtral, other)
    received: list[Tensor] = []
    hook = layers_with_experts(model)[0].experts.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    found = [calibrate(model, {"a": one, "b": two}, Windows(16, size, 128)) for size in (8, 3)]  # 8 windows of each
    hook.remove()
    windows = torch.cat([part.reshape(-1, 16, 32) for part in received[:2]])  # of both texts
    held = [3, 7, 11, 15]
    for calibration in found:
        assert torch.allclose(calibration.held_out[0], windows[held].flatten(0, 1), atol=1e-6)
        rest = [number for number in range(16) if number not in held]
        assert torch.allclose(calibration.fitted[0], windows[rest].flatten(0, 1), atol=1e-6)
        assert float(calibration.sums[0].tokens) == 12 * 16
        assert float(calibration.sums[0].routes_E.sum()) == 2 * 12 * 16
    short = calibrate(model, {"a": one}, Windows(16, 2, 48))
    assert len(short.held_out[0]) == 0
    assert choose(layers_with_experts(model), short, "auto", 3).held_out == 0


def test_a_folder_that_is_taken_is_told_before_the_model_runs(
    mixtral: Path, llama: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetool.calibration.measure.load", None)
    options = ("--keep-experts", 3, "--data", f"a={jsonl}")
    assert "is a different finished checkpoint; choose another folder" in fails(mixtral, llama, *options)
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty; choose another folder" in fails(mixtral, tmp_path, *options)


def test_a_short_text_is_told(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    few = ("--keep-experts", 3, "--data", f"a={jsonl}", "--seq-len", 16, "--max-tokens", 40, "--plan")
    code, out, err = tiny.in_process("prune", mixtral, tmp_path / "out", *few)
    assert code == 0
    assert "too short to hold tokens out" in " ".join(err.split())
    assert "on the tokens of the scores" in " ".join(out.split())


def test_super_experts_are_kept_whatever_their_score(
    mixtral: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(mixtral).eval()
    layers = layers_with_experts(model)
    found = calibrate(model, {"a": stream(mixtral, jsonl)}, Windows(16, 2, 200))
    lowest = int(found.sums[0].norm_E.argmin())
    with torch.inference_mode():  # as the sums were made
        found.sums[0].largest_E[lowest] = 1e4
    assert lowest not in choose(layers, found, "ean", 3).kept[0]
    assert lowest in choose(layers, found, "ean", 3, protect_super=True).kept[0]
    glm = {0: layers[0]}  # two in one layer are above the quantile only among hundreds of experts
    monkeypatch.setattr("moetool.prune.choose.super_experts", lambda _: {0: [0, 1]})
    with pytest.raises(ConfigError, match="layer 0 has 2 super experts, more than --keep-experts 2 lets it keep"):
        choose(glm, found, "ean", 2, num_groups=2, protect_super=True)


@pytest.mark.parametrize("family", registry.names("target"))
def test_logits_are_the_same_until_a_token_used_a_pruned_expert(family: str, jsonl: Path, tmp_path: Path) -> None:
    moe = upcycled(family, tmp_path, "--num-experts", 8)
    tiny.save_tokenizer(moe)
    if family == "ernie4_5_moe":  # a softmax over fewer experts is larger, and a bias beside it counts less
        biased = ("prune", moe, tmp_path / "a", "--keep-experts", 7, "--data", f"a={jsonl}", *SMALL, "--plan")
        assert "bias counts less" in " ".join(tiny.in_process(*biased)[2].split())
        tensors = weights(moe)
        unbiased = {name: tensor * ("correction_bias" not in name) for name, tensor in tensors.items()}
        save_file(unbiased, moe / "model.safetensors", metadata={"format": "pt"})
    document = prune(moe, tmp_path / "out", "--keep-experts", 7, "--data", f"a={jsonl}", "--score", "frequency")
    kept = {row["layer"]: row["kept"] for row in document["layers"]}
    before, chosen = run(moe)
    after, _ = run(tmp_path / "out")
    gone = torch.stack([(~torch.isin(one, torch.tensor(kept[layer]))).any(-1) for layer, one in enumerate(chosen)]).any(
        0
    )
    same = gone.reshape(64, -1).cumsum(1) == 0
    assert 20 < int(same.sum()) < same.numel()
    scale = float(before.abs().max())
    assert float((after - before)[same].abs().max()) < 1e-5 * scale
    assert float((after - before)[~same].abs().max()) > 1e-5 * scale
    assert tiny.in_process("verify", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("family", registry.names("target"))
def test_the_layer_that_is_predicted_is_the_layer_that_is_written(family: str, jsonl: Path, tmp_path: Path) -> None:
    """The first layer's load and output, the router choosing among what is kept: in the sample and in the result."""
    moe = upcycled(family, tmp_path, "--num-experts", 8)
    tiny.save_tokenizer(moe)
    prune(moe, tmp_path / "out", "--keep-experts", 4, "--data", f"a={jsonl}", "--score", "reap")
    kept = json.loads((tmp_path / "out" / "moetool.json").read_text())["lineage"][-1]["recipe"]["experts"]["from"][0]
    models = [load_model(folder).eval() for folder in (moe, tmp_path / "out")]
    first, second = (layers_with_experts(model)[0] for model in models)
    hidden_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sample, other = Sample.of(first, hidden_TD), Sample.of(second, hidden_TD)
        error, load_M = sample.compare(kept)
        _, wanted_M = other.compare(range(4))
    difference = (sample.whole_TD - other.whole_TD).square().sum() / sample.whole_TD.square().sum()
    assert error == pytest.approx(float(difference), rel=1e-4)
    assert load_M.tolist() == wanted_M.tolist()


def test_weights_that_are_no_shares_grow_and_prune_says_so(jsonl: Path, tmp_path: Path) -> None:
    """A softmax over all experts that is not divided by the chosen ones' sum: fewer experts, more weight for each."""
    source = qwen(tmp_path / "moe")
    arguments = (source, tmp_path / "out", "--keep-experts", 5, "--data", f"a={jsonl}", *SMALL)
    code, _, err = tiny.in_process("prune", *arguments)
    assert code == 0
    assert "norm_topk_prob" in err
    models = [load_model(folder).eval() for folder in (source, tmp_path / "out")]
    kept = json.loads((tmp_path / "out" / "moetool.json").read_text())["lineage"][-1]["recipe"]["experts"]["from"][0]
    hidden_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, second = (layers_with_experts(model)[0] for model in models)
        weights_TK, chosen_TK = first.routing(range(6))(hidden_TD)
        after_TK, found_TK = second.routing(range(5))(hidden_TD)
        same_T = torch.isin(chosen_TK, torch.tensor(kept)).all(-1)
        assert torch.equal(torch.tensor(kept)[found_TK][same_T].sort().values, chosen_TK[same_T].sort().values)
        assert bool((after_TK[same_T].sum(-1) > weights_TK[same_T].sum(-1)).all())


def test_dead_experts_go_without_a_change_of_the_loss(jsonl: Path, tmp_path: Path) -> None:
    """A collapsed upcycling: a large negative bias of the sigmoid family keeps half of the experts from everything."""
    source = tiny.save_glm4_moe(tmp_path / "moe", n_routed_experts=8)
    tensors = weights(source)
    dead = {1: [0, 3, 4, 7], 2: [1, 2, 5, 6]}
    for layer, experts in dead.items():
        tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"][experts] = -5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for score in ("auto", "reap", "frequency", "reconstruction"):
        out = tmp_path / score
        document = prune(
            source, out, "--keep-experts", 4, "--data", f"a={jsonl}", "--val", f"a={jsonl}", "--score", score
        )
        for row in document["layers"]:
            assert sorted(set(range(8)) - set(row["kept"])) == dead[row["layer"]] == row["unused"]
            assert row["mass_kept"] == pytest.approx(1)
        assert document["val"]["a"]["after"] == pytest.approx(document["val"]["a"]["before"], abs=1e-6)
        assert float((run(out)[0] - run(source)[0]).abs().max()) < 1e-4
    code, _, err = tiny.in_process("prune", source, tmp_path / "b", "--keep-experts", 6, "--data", f"a={jsonl}", *SMALL)
    assert code == 0
    assert "has 4 experts without a token, but only 2 are removed" in " ".join(err.split())
    for score in ("reap", "reconstruction"):  # of equal ones the last
        document = prune(source, tmp_path / f"6-{score}", "--keep-experts", 6, "--data", f"a={jsonl}", "--score", score)
        assert [sorted(set(range(8)) - set(row["kept"])) for row in document["layers"]] == [[4, 7], [5, 6]]


def test_auto_takes_the_smallest_error_and_reconstruction_beats_chance(
    mixtral: Path, jsonl: Path, tmp_path: Path
) -> None:
    document = prune(mixtral, tmp_path / "a", "--keep-experts", 3, "--data", f"a={jsonl}")
    assert set(document["errors"]) == {*registry.names("score"), "reconstruction"}
    assert document["errors"][document["score"]] == min(document["errors"].values())
    model = load_model(mixtral).eval()
    found = calibrate(model, {"a": stream(mixtral, jsonl)}, Windows(16, 2, 400))
    layer = layers_with_experts(model)[0]
    with torch.no_grad():
        sample = Sample.of(layer, found.fitted[0])
        kept = by_reconstruction(sample, [range(4)], 3, set())
        every = {drop: sample.compare([e for e in range(4) if e != drop])[0] for drop in range(4)}
        assert sample.compare(range(4))[0] < 1e-12
        assert set(range(4)) - set(kept) == {min(every, key=lambda drop: every[drop])}
        drawn = choose(layers_with_experts(model), found, "random", 2)
        assert drawn.kept != choose(layers_with_experts(model), found, "random", 2, seed=1).kept
        assert drawn.kept == choose(layers_with_experts(model), found, "random", 2).kept


def test_highest_by_groups_and_super_experts_by_hand() -> None:
    score_E = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 6.0])
    assert highest(score_E, [range(8)], 3, set()) == [0, 1, 7]
    assert highest(score_E, [range(4), range(4, 8)], 2, set()) == [0, 1, 4, 7]
    assert highest(score_E, [range(4), range(4, 8)], 2, {3, 6}) == [0, 3, 6, 7]
    assert highest(torch.zeros(4), [range(4)], 2, set()) == [0, 1]
    sums = {n: ExpertSums.zeros(100) for n in range(4)}
    for n in sums:
        sums[n].largest_E[:] = 1
        sums[n].largest_E[7] = 50
    assert super_experts(Calibration(sums, {}, {})) == {0: [], 1: [], 2: []}  # 1 % are that large: no exception
    sums[1].largest_E[7] = sums[3].largest_E[7] = 1
    sums[0].largest_E[7] = 1
    assert super_experts(Calibration(sums, {}, {})) == {0: [], 1: [], 2: [7]}  # the last quarter does not count


def test_what_does_not_fit_is_one_line(mixtral: Path, llama: Path, jsonl: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", ("--data", f"a={jsonl}")
    assert "has 4 experts; keep fewer" in fails(mixtral, out, "--keep-experts", 4, *data)
    assert "every token goes to 2 experts" in fails(mixtral, out, "--keep-experts", 1, *data)
    assert "a llama cannot be pruned: it is dense" in fails(llama, out, "--keep-experts", 2, *data)
    code, _, err = tiny.in_process("prune", mixtral, out, "--keep-experts", 2)
    assert (code, "--data NAME=PATH" in err) == (2, True)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty" in fails(mixtral, out, "--keep-experts", 2, "--data", f"a={empty}")
    glm = tiny.save_glm4_moe(tmp_path / "glm", n_routed_experts=8, n_group=2, topk_group=1)
    assert "within 2 groups" in fails(glm, out, "--keep-experts", 5, *data)
    document = prune(glm, tmp_path / "grouped", "--keep-experts", 6, *data, "--score", "ean")
    assert all(sum(expert < 4 for expert in row["kept"]) == 3 for row in document["layers"])
    quantised = Path(shutil.copytree(mixtral, tmp_path / "quantised"))
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "is quantised" in fails(quantised, out, "--keep-experts", 2, *data)
    bad = Path(shutil.copytree(mixtral, tmp_path / "bad"))
    tensors = load_file(bad / "model.safetensors")
    for name in tensors:
        if name.endswith("w2.weight"):
            tensors[name][0, 0] = torch.nan
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    assert "is not a number" in fails(bad, out, "--keep-experts", 2, *data)
    assert not out.exists()


def test_a_plan_writes_nothing_and_a_calibration_is_made_once(
    mixtral: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("prune", mixtral, tmp_path / "out", "--keep-experts", 3, "--data", f"a={jsonl}", *SMALL)
    code, out, err = tiny.in_process(*arguments, "--plan", "--json")
    assert code == 0, err
    planned = json.loads(out)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("moetool.calibration.measure.calibrate", lambda *args, **more: pytest.fail("calibrated again"))
    code, out, err = tiny.in_process(*arguments)
    assert code == 0, err
    assert f"moetool cpt {tmp_path / 'out'}" in out.replace("\n", "")
    recorded = json.loads((tmp_path / "out" / "moetool.json").read_text())["lineage"][-1]["recipe"]
    assert recorded["experts"]["from"] == [row["kept"] for row in planned["layers"]]
    assert recorded["score"] == planned["score"]
    assert json.loads(tiny.in_process(*arguments, "--json")[1])["already_finished"]
    code, _, err = tiny.in_process(*arguments, "--score", "random", "--seed", 5)
    assert (code, "different finished checkpoint" in " ".join(err.split())) == (1, True)
    code, _, err = tiny.in_process(*arguments, "--score", "ean", "--seed", 5)
    assert (code, "--seed" in err) == (2, True)


def origins_are_doubled(tmp_path: Path, jsonl: Path) -> None:
    """Grow the pruned checkpoint in `a` from 3 to 6 experts: an analysis follows them to the upcycling."""
    grown, out = tmp_path / "b", tmp_path / "report"
    assert tiny.in_process("grow", tmp_path / "a", grown, "--num-experts", 6)[0] == 0
    code, _, err = tiny.in_process("analyze-routing", grown, "--data", f"a={jsonl}", "--out", out)
    assert code == 0, err
    assert not json.loads((out / "report.json").read_text())["upcycling"]["notes"]
    origin = read_origin(grown)
    assert origin is not None
    kept = json.loads((grown / "moetool.json").read_text())["lineage"][1]["recipe"]["experts"]["from"]
    assert origin.experts == tuple(tuple(one * 2) for one in kept)


def test_the_lineage_goes_on(jsonl: Path, tmp_path: Path) -> None:
    moe = upcycled("mixtral", tmp_path)
    tiny.save_tokenizer(moe)
    data = ("--data", f"a={jsonl}", "--score", "ean")
    prune(moe, tmp_path / "a", "--keep-experts", 3, *data)
    origins_are_doubled(tmp_path, jsonl)
    assert "3 experts kept by ean" in " ".join(tiny.in_process("inspect", tmp_path / "b")[1].split())


def test_the_loss_is_that_of_transformers(mixtral: Path, jsonl: Path) -> None:
    model, text = load_model(mixtral).eval(), stream(mixtral, jsonl)
    ids = torch.from_numpy(text.read(0, 40))
    with torch.no_grad():
        parts = [
            model(ids[None, a:b], labels=ids[None, a:b]).loss.item() * (b - a - 1)
            for a, b in ((0, 16), (16, 32), (32, 40))
        ]
    found = mean_losses(model, {"a": text}, Windows(16, 2, 40))["a"]
    assert found == pytest.approx(sum(parts) / (15 + 15 + 7), rel=1e-5)
