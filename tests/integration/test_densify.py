"""`moetool densify`: exact where it can be, in every family that has a dense twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moetool import registry
from moetool.calibration.text_pass import calibrate
from moetool.checkpoint.model import load_model
from moetool.routing.text_pass import Windows
from tests import tiny
from tests.integration.test_convert import SOURCE_OF, weights
from tests.integration.test_prune import SMALL, stream

NO_TWIN = ("granitemoe_swa", "granitemoehybrid", "lfm2_moe")  # the second with Mamba


def densify(*arguments: object) -> dict[str, Any]:
    return tiny.result("densify", *arguments, *SMALL)


def fails(*arguments: object) -> str:
    return tiny.refusal("densify", *arguments, *SMALL)


def logits(folder: Path) -> torch.Tensor:
    tokens = torch.randint(1, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return load_model(folder).eval()(tokens).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("family", "dense"),
    [
        *((family, SOURCE_OF[family]) for family in registry.names("target")),
        *(("glm4_moe", "qwen3"), ("glm4_moe", "qwen2"), ("mixtral", "mistral"), ("granitemoe", "llama")),
        *(("granitemoehybrid", "granite"), ("qwen2_moe", "llama"), ("cohere2_moe", "cohere2 and a shared expert")),
        ("ernie4_5_moe", "ernie4_5 and a shared expert"),
    ],
)
def test_all_experts_with_equal_weights_are_the_same_model(
    family: str, dense: str, jsonl: Path, tmp_path: Path
) -> None:
    dense, shared, _ = dense.partition(" and a shared expert")
    plain: dict[str, Any] = {"use_sliding_window": False} if (family, dense) == ("glm4_moe", "qwen2") else {}
    source, moe = tiny.save_dense(dense, tmp_path / "dense", **plain), tmp_path / "moe"
    tiny.save_tokenizer(source)
    size = ("--num-experts", 2, "--top-k", 2, "--drop-ratio", "0.8", "--router", "zeros", "--verify", "none")
    assert (
        tiny.in_process(
            "upcycle", source, moe, "--target", family, *size, *(("--shared-experts", 1) if shared else ())
        )[0]
        == 0
    )
    if family in NO_TWIN and dense != "granite":
        assert "no dense family with its attention" in fails(
            moe, tmp_path / "a", "--keep-experts", 2, "--data", f"a={jsonl}"
        )
        return
    document = densify(moe, tmp_path / "out", "--keep-experts", 2, "--data", f"a={jsonl}")
    before, after = logits(moe), logits(tmp_path / "out")
    assert float((before - after).abs().max()) < 1e-5 * float(before.abs().max()), document["family"]
    assert tiny.in_process("verify", tmp_path / "out")[0] == 0
    assert tiny.in_process("upcycle", tmp_path / "out", tmp_path / "again", "--num-experts", 2)[0] == 0  # and back


def test_weights_are_means_over_all_tokens(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    text = ("--data", f"a={jsonl}", "--val", f"a={jsonl}")
    document = densify(
        mixtral, tmp_path / "out", "--keep-experts", 3, *text, "--max-shard-size", "40KB", "--workers", 2
    )
    assert document["intermediate_size"] == 192
    assert document["val"]["a"]["after"] > 0
    w, old = weights(tmp_path / "out"), weights(mixtral)
    measured = calibrate(load_model(mixtral).eval(), {"a": stream(mixtral, jsonl)}, Windows(16, 2, 200))
    for row in document["layers"]:
        assert 0.5 < sum(row["weights"]) < 1
        sums = measured.sums[row["layer"]]
        mean_E, done_E = sums.gate_E / sums.tokens, sums.weighted_E
        assert sorted(row["experts"]) == sorted(done_E.topk(3).indices.tolist())
        assert row["weights"] == pytest.approx(mean_E[row["experts"]].tolist())
        assert len(set(row["weights"])) == 3  # no mean over experts
        prefix, experts = f"model.layers.{row['layer']}", row["experts"]
        own = [f"{prefix}.block_sparse_moe.experts.{e}" for e in experts]
        assert torch.equal(w[f"{prefix}.mlp.gate_proj.weight"], torch.cat([old[f"{e}.w1.weight"] for e in own]))
        assert torch.equal(w[f"{prefix}.mlp.up_proj.weight"], torch.cat([old[f"{e}.w3.weight"] for e in own]))
        down = [(old[f"{e}.w2.weight"].double() * c).float() for e, c in zip(own, row["weights"], strict=True)]
        assert torch.equal(w[f"{prefix}.mlp.down_proj.weight"], torch.cat(down, dim=1))
    every = densify(mixtral, tmp_path / "all", "--keep-experts", 4, *text)
    assert all(sum(row["weights"]) == pytest.approx(1) for row in every["layers"])
    assert "densify of" in tiny.in_process("inspect", tmp_path / "out")[1]
    code, out, _ = tiny.in_process(
        "densify", mixtral, tmp_path / "shown", "--keep-experts", 2, "--data", f"a={jsonl}", *SMALL, "--plan"
    )
    assert code == 0
    assert "per layer sum to" in out


def test_what_does_not_fit_is_one_line(mixtral: Path, llama: Path, jsonl: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", ("--data", f"a={jsonl}")
    assert "has 4 experts" in fails(mixtral, out, "--keep-experts", 5, *data)
    made = tmp_path / "made"
    densify(mixtral, made, "--keep-experts", 2, *data, *SMALL)
    document = json.loads((made / "moetool.json").read_text())
    for shared in ([0.5, 0.5], [None, float("nan")], [None]):
        document["lineage"][-1]["recipe"]["shared"] = shared
        (made / "moetool.json").write_text(json.dumps(document))
        code, _, err = tiny.in_process("verify", made)
        assert (code, err.count("\n")) == (1, 1)
        assert "weights of" in err
    assert "is a different finished checkpoint" in fails(mixtral, llama, "--keep-experts", 2, *data)
    assert "a llama cannot be densified: it is dense" in fails(llama, out, "--keep-experts", 1, *data)
    glm = tiny.save_glm4_moe(tmp_path / "glm", partial_rotary_factor=1.0)
    assert "has experts in layers 1 to 2 of 3 only" in fails(glm, out, "--keep-experts", 2, *data)
    assert not out.exists()
