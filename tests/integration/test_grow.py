"""`moetool grow`: exact starts in every family that allows them, refused by name in the others."""

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
from moetool.checkpoint.model import load_model
from moetool.routing.capture import RouterCapture
from tests import tiny
from tests.integration.test_convert import SOURCE_OF, weights

WITH_BIAS = ("ernie4_5_moe", "lfm2_moe", "glm4_moe", "dots1", "solar_open")


def grow(*arguments: object) -> dict[str, Any]:
    return tiny.result("grow", *arguments)


def fails(*arguments: object) -> str:
    return tiny.refusal("grow", *arguments)


def run(folder: Path) -> tuple[Tensor, list[Tensor]]:
    """Logits of some tokens, and each layer's choices."""
    model = load_model(folder).eval()
    capture = RouterCapture(model)
    with torch.no_grad(), capture.collect() as routes:
        logits = model(torch.randint(1, 300, (64, 4), generator=torch.Generator().manual_seed(0))).logits
    return logits, [route.indices_TK for route in routes]


def upcycled(family: str, folder: Path, *more: object) -> Path:
    """Two layers with experts that differ, under routers and biases as training leaves them."""
    dense = tiny.save_dense(SOURCE_OF[family], folder / "dense")
    # LFM2 adds 1e-6 to the sum of the chosen scores, which shows where all are small: so not too large a router.
    size = ("--num-experts", 4, "--top-k", 2, "--drop-ratio", 0.9, "--router-std", "0.3", "--verify", "none")
    done = tiny.in_process("upcycle", dense, folder / "moe", "--target", family, *size, *more)
    assert done[0] == 0, done[2]
    tensors = load_file(folder / "moe" / "model.safetensors")
    draw = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if name.endswith(("expert_bias", "correction_bias")):
            tensors[name] = torch.randn(tensor.shape, generator=draw) * 0.1
    save_file(tensors, folder / "moe" / "model.safetensors", metadata={"format": "pt"})
    return folder / "moe"


@pytest.mark.parametrize("family", registry.names("target"))
def test_the_exact_starts_are_exact(family: str, tmp_path: Path) -> None:
    moe = upcycled(family, tmp_path)
    before, chosen = run(moe)
    document = grow(moe, tmp_path / "double", "--num-experts", 12)
    assert document["top_k"] == {"before": 2, "after": 6}
    assert document["exact"]
    after, routes = run(tmp_path / "double")
    assert float((after - before).abs().max()) < 1e-5 * float(before.abs().max())
    for old, new in zip(chosen, routes, strict=True):  # all copies of what was chosen
        assert torch.equal(torch.cat([old, old + 4, old + 8], -1).sort().values, new.sort().values)
    if family not in WITH_BIAS:
        assert "has no selection bias" in fails(moe, tmp_path / "a", "--num-experts", 8, "--start", "sleeping")
        return
    number = 8 if family == "ernie4_5_moe" else 7
    grow(moe, tmp_path / "sleeping", "--num-experts", number, "--start", "sleeping", "--max-shard-size", "40KB")
    after, routes = run(tmp_path / "sleeping")
    assert float((after - before).abs().max()) < 1e-5 * float(before.abs().max())
    assert all(torch.equal(old.sort().values, new.sort().values) for old, new in zip(chosen, routes, strict=True))
    code, _, err = tiny.in_process("verify", tmp_path / "sleeping")
    assert code == 0, err


def test_a_fused_layout_grows_to_the_same(tmp_path: Path) -> None:
    moe = upcycled("mixtral", tmp_path)
    assert tiny.in_process("convert", moe, tmp_path / "fused", "--layout", "fused")[0] == 0
    for source in ("moe", "fused"):
        grow(tmp_path / source, tmp_path / f"{source}-8", "--num-experts", 8)
    one, two = (load_model(tmp_path / f"{name}-8").state_dict() for name in ("moe", "fused"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(".experts.gate_up_proj" in name for name in weights(tmp_path / "fused-8"))


def test_twins_say_what_they_cost_before_they_are_written(mixtral: Path, tmp_path: Path) -> None:
    arguments = (mixtral, tmp_path / "out", "--num-experts", 8, "--start", "twins")
    code, _, err = tiny.in_process("grow", *arguments, "--plan")
    assert code == 0
    assert "a token's 2 experts may be copies of only 1 of the 2 before" in " ".join(err.split())
    assert not (tmp_path / "out").exists()
    document = grow(*arguments)
    assert not document["exact"]
    before, after = run(mixtral)[0], run(tmp_path / "out")[0]
    assert float((after - before).abs().max()) > 0.01 * float(before.abs().max())
    assert grow(mixtral, tmp_path / "b", "--num-experts", 6, "--start", "twins", "--top-k", 3)["top_k"]["after"] == 3


def test_sleeping_experts_are_woken_by_loss_free(tmp_path: Path, jsonl: Path) -> None:
    source = tiny.save_glm4_moe(tmp_path / "moe")
    least = grow(source, tmp_path / "a", "--num-experts", 8, "--start", "sleeping")["recipe"]["wake_after"]
    assert 1000 < least < 1010  # scores between 0 and 1, biases all 0
    assert f"give at least {least}" in fails(
        source, tmp_path / "b", "--num-experts", 8, "--start", "sleeping", "--wake-after", 900
    )
    grow(source, tmp_path / "b", "--num-experts", 8, "--start", "sleeping", "--wake-after", 2000)
    biases = [tensor for name, tensor in weights(tmp_path / "b").items() if name.endswith("correction_bias")]
    assert biases[0].tolist() == pytest.approx([0.0] * 4 + [-2.0] * 4)
    assert len(biases) == 2
    run_ = ("--seq-len", 16, "--global-batch-size", 2, "--max-steps", 6, "--val-fraction", 0, "--lr", 1e-9)
    done = tiny.in_process(
        "cpt", tmp_path / "b", tmp_path / "run", "--train", f"a={jsonl}", "--balance", "loss-free=0.4", *run_
    )
    assert done[0] == 0, done[2]
    routes = run(tmp_path / "run")[1]
    assert all(bool((one >= 4).any()) for one in routes)


def test_copies_that_are_always_chosen_together_stay_the_same(mixtral: Path, tmp_path: Path, jsonl: Path) -> None:
    code, _, err = tiny.in_process("grow", mixtral, tmp_path / "a", "--num-experts", 8)
    assert (code, "keeps them equal" in " ".join(err.split())) == (0, True)
    size = ("--seq-len", 16, "--global-batch-size", 4, "--max-steps", 8, "--val-fraction", 0, "--lr", "1e-2")
    done = tiny.in_process("cpt", tmp_path / "a", tmp_path / "run", "--train", f"a={jsonl}", *size)
    assert done[0] == 0, done[2]
    start, end = weights(tmp_path / "a"), weights(tmp_path / "run")
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    moved = float((end[name.format(1)] - start[name.format(1)]).abs().max())
    apart = float((end[name.format(1)] - end[name.format(5)]).abs().max())
    assert apart < 1e-3 * moved


def test_what_does_not_fit_is_one_line(mixtral: Path, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "has 4 experts already" in fails(mixtral, out, "--num-experts", 4)
    assert "needs a multiple of the model's 4 experts" in fails(mixtral, out, "--num-experts", 6)
    assert "is exact with 4 only" in fails(mixtral, out, "--num-experts", 8, "--top-k", 2)
    assert "a llama cannot be grown: it is dense" in fails(llama, out, "--num-experts", 8)
    code, _, err = tiny.in_process("grow", mixtral, out, "--num-experts", 8, "--wake-after", 5)
    assert (code, "--wake-after has no effect with --start double-k" in err) == (2, True)
    glm = tiny.save_glm4_moe(tmp_path / "glm")
    config = json.loads((glm / "config.json").read_text())
    for change, message in (
        ({"n_group": 2, "topk_group": 1}, "within 2 groups"),
        ({"norm_topk_prob": False}, "does not divide its sigmoid scores"),
        ({"n_routed_experts": 5}, "config.json says 5 experts"),
        ({"quantization_config": {"a": 1}}, "is quantised"),
    ):
        (glm / "config.json").write_text(json.dumps(config | change))
        assert message in fails(glm, out, "--num-experts", 8 if "n_routed_experts" not in change else 10)
    odd = Path(shutil.copytree(mixtral, tmp_path / "odd"))
    tensors = load_file(odd / "model.safetensors")
    save_file(tensors | {"model.layers.0.mlp.experts.0.scale": torch.ones(1)}, odd / "model.safetensors")
    assert "belongs to experts" in fails(odd, out, "--num-experts", 8)
    assert not out.exists()


def test_numbers_of_experts_stand_under_every_name(tmp_path: Path) -> None:
    for family, keys in (
        ("qwen3_moe", {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 4}),
        ("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": [4, 4], "num_shared_expert": [1, 1]}),
    ):
        moe = upcycled(family, tmp_path / family)
        grow(moe, tmp_path / family / "grown", "--num-experts", 8)
        config = json.loads((tmp_path / family / "grown" / "config.json").read_text())
        assert {key: config[key] for key in keys} == keys


def test_the_lineage_goes_on(tmp_path: Path, jsonl: Path) -> None:
    moe = upcycled("mixtral", tmp_path)
    tiny.save_tokenizer(moe)
    grow(moe, tmp_path / "a", "--num-experts", 8)
    grow(tmp_path / "a", tmp_path / "b", "--num-experts", 16)
    assert float((run(moe)[0] - run(tmp_path / "b")[0]).abs().max()) < 1e-4
    lineage = json.loads((tmp_path / "b" / "moetool.json").read_text())["lineage"]
    assert [entry["command"] for entry in lineage] == ["upcycle", "grow", "grow"]
    assert lineage[1]["recipe"]["experts"] == {"layers": [0, 1], "from": [[0, 1, 2, 3] * 2] * 2}
    assert "8 experts, top-4, double-k" in " ".join(tiny.in_process("inspect", tmp_path / "a")[1].split())
    out = tmp_path / "report"
    code, _, err = tiny.in_process("analyze-routing", tmp_path / "b", "--data", f"a={jsonl}", "--out", out)
    assert code == 0, err
    upcycling = json.loads((out / "report.json").read_text())["upcycling"]
    assert not upcycling["notes"]
    rows = upcycling["layers"][0]["with_dense"]["experts"]
    assert len(rows) == 16
    assert rows[0] == rows[4] == rows[12] != rows[1]
    assert len(upcycling["unit_use"]["a"][0]["experts"]) == 16
    assert tiny.in_process("verify", tmp_path / "b")[0] == 0
