"""`moetool prune --merge ream`: exact where experts are equal, provable, in every family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import AutoModelForCausalLM

from moetool import registry
from moetool.arch.moe_source import moe_source
from moetool.calibration.experts import layers_with_experts
from moetool.checkpoint.model import load_model
from moetool.checkpoint.reader import CheckpointReader
from moetool.prune.align import unit_orders
from moetool.prune.group import Group
from moetool.prune.merge import merged_output
from moetool.prune.reroute import Sample
from moetool.recipe import PROJECTIONS
from moetool.surgery.rows import read_rows
from tests import tiny
from tests.integration.test_convert import same, weights
from tests.integration.test_grow import upcycled
from tests.integration.test_prune import SMALL, fails, origins_are_doubled, prune

REAM = ("--merge", "ream")


def matrices(folder: Path, layer: int) -> list[list[Tensor]]:
    """Gate, up and down of each routed expert of a layer, whatever the layout."""
    with CheckpointReader(folder) as reader:
        source = moe_source(reader)
        assert source is not None
        infos = [[source.expert(layer, e, name) for name in PROJECTIONS] for e in range(source.num_experts)]
        return [[read_rows(reader, info, 0, info.shape[0]) for info in three] for three in infos]


def entry(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "moetool.json").read_text())["lineage"][-1]  # type: ignore[no-any-return]


def with_permuted_copies(folder: Path, out: Path) -> Path:
    """All experts of each layer are the first one, with its units in another order."""
    shutil.copytree(folder, out)
    draw = torch.Generator().manual_seed(0)
    with CheckpointReader(out) as reader:
        source = moe_source(reader)
        assert source is not None
        raw = {name: bytearray((out / name).read_bytes()) for name in reader.shards}
        for layer in source.layers:
            first = matrices(folder, layer)[0]
            for expert in range(1, source.num_experts):
                order = torch.randperm(first[0].shape[0], generator=draw)
                for name, matrix, axis in zip(PROJECTIONS, first, (0, 0, 1), strict=True):
                    info = source.expert(layer, expert, name)
                    data = matrix.index_select(axis, order).contiguous().view(torch.uint8).numpy().tobytes()
                    raw[info.shard][info.start : info.start + info.size] = data
    for name, whole in raw.items():
        (out / name).write_bytes(whole)
    return out


@pytest.mark.parametrize(("family", "dtype"), [("mixtral", "fp32"), ("mixtral", "bf16"), ("granitemoe", "fp32")])
def test_copies_with_permuted_units_merge_into_the_expert_itself(
    family: str, dtype: str, jsonl: Path, tmp_path: Path
) -> None:
    moe = upcycled(family, tmp_path, "--num-experts", 6, "--dtype", dtype)
    tiny.save_tokenizer(moe)
    source, out = with_permuted_copies(moe, tmp_path / "copies"), tmp_path / "out"
    assert not any(torch.equal(*pair) for pair in zip(*matrices(source, 0)[:2], strict=True))
    document = prune(
        source, out, "--keep-experts", 3, "--data", f"a={jsonl}", "--val", f"a={jsonl}", "--score", "ean", *REAM
    )
    assert document["merge"]["merged"] == 6
    for layer in (0, 1):
        before, after = matrices(source, layer), matrices(out, layer)
        kept = document["layers"][layer]["kept"]
        for place, expert in enumerate(kept):
            assert all(torch.equal(a, b) for a, b in zip(after[place], before[expert], strict=True))
    losses = document["val"]["a"]
    if family == "mixtral" and dtype == "fp32":  # equal experts whose weights sum to 1: nothing has changed
        assert losses["after"] == pytest.approx(losses["before"], abs=1e-5)
        assert document["merge"]["errors"]["ream"] < 1e-9
    assert tiny.in_process("verify", out)[0] == 0


def by_hand(source: list[list[Tensor]], group: dict[str, Any]) -> list[np.ndarray]:
    """The weighted mean of a group of experts, their units assigned by another product."""
    experts = [[matrix.double().numpy() for matrix in source[number]] for number in group["experts"]]
    first = experts[0]
    total = [matrix * group["weights"][0] for matrix in first]
    for other, weight in zip(experts[1:], group["weights"][1:], strict=True):
        units, others = (np.concatenate([gate, up, down.T], axis=1) for gate, up, down in (first, other))
        _, order = linear_sum_assignment(units @ others.T, maximize=True)
        for mean, matrix in zip(total, (other[0][order], other[1][order], other[2][:, order]), strict=True):
            mean += weight * matrix
    return total


@pytest.mark.parametrize("family", registry.names("target"))
def test_every_family_loads_what_was_predicted(family: str, jsonl: Path, tmp_path: Path) -> None:
    moe, out = upcycled(family, tmp_path, "--num-experts", 8), tmp_path / "out"
    tiny.save_tokenizer(moe)
    document = prune(moe, out, "--keep-experts", 4, "--data", f"a={jsonl}", "--score", "weighted-ean", *REAM)
    unused = sum(
        row["scores"]["frequency"][e] == 0 for row in document["layers"] for e in range(8) if e not in row["kept"]
    )
    assert (document["merge"]["merged"], document["merge"]["left_out"]) == (8 - unused, unused)
    assert unused < 3
    assert tiny.in_process("verify", out)[0] == 0
    _, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    recipe = entry(out)["recipe"]
    for place, (layer, kept) in enumerate(zip(*recipe["experts"].values(), strict=True)):
        before, after = matrices(moe, layer), matrices(out, layer)
        groups = {group["experts"][0]: group for group in recipe["merged"][place]}
        assert groups
        for position, number in enumerate(kept):
            alone = {"experts": [number], "weights": [1.0]}
            wanted = by_hand(before, groups.get(number, alone))
            assert all(np.allclose(a.double(), b, atol=1e-6) for a, b in zip(after[position], wanted, strict=True))
    # The routers, biases, shared experts and all else are those of the same pruning without a merge.
    prune(moe, tmp_path / "none", "--keep-experts", 4, "--data", f"a={jsonl}", "--score", "weighted-ean")
    merged, plain = weights(out), weights(tmp_path / "none")
    assert {name for name in plain if not torch.equal(plain[name], merged[name])} <= set(routed(tmp_path / "none"))
    first, second = (layers_with_experts(load_model(folder).eval())[0] for folder in (moe, out))
    hidden_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), CheckpointReader(moe) as reader:
        source = moe_source(reader)
        assert source is not None
        order = unit_orders(source)
        sample, other = Sample.of(first, hidden_TD), Sample.of(second, hidden_TD)
        outputs = {
            group["experts"][0]: merged_output(first, Group(**group), lambda a, b: order(0, a, b), hidden_TD)
            for group in recipe["merged"][0]
        }
        error, load_M = sample.with_outputs(outputs).compare(recipe["experts"]["from"][0])
        assert load_M.tolist() == other.compare(range(4))[1].tolist()
    difference = (sample.whole_TD - other.whole_TD).square().sum() / sample.whole_TD.square().sum()
    assert error == pytest.approx(float(difference), rel=1e-4)


def routed(folder: Path) -> list[str]:
    """Names of the tensors with routed experts."""
    with CheckpointReader(folder) as reader:
        source = moe_source(reader)
        assert source is not None
        experts = [(layer, e) for layer in source.layers for e in range(source.num_experts)]
        return [name.format(layer=layer, expert=e) for name in source.spec.experts.values() for layer, e in experts]


def test_nothing_merged_writes_what_it_always_wrote(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    document = prune(mixtral, tmp_path / "out", "--keep-experts", 3, "--data", f"a={jsonl}", "--score", "ean")
    assert document["merge"] is None
    assert not any("groups" in row for row in document["layers"])
    found = entry(tmp_path / "out")
    assert set(found["recipe"]) == {"keep_experts", "score", "protect_super", "data", "experts"}
    assert "unit_orders" not in found


def test_unused_experts_are_left_out_and_super_experts_stay(jsonl: Path, tmp_path: Path) -> None:
    source = tiny.save_glm4_moe(tmp_path / "moe", n_routed_experts=8)
    tensors = weights(source)
    for layer, experts in {1: [0, 3, 4, 7], 2: [1, 2, 5, 6]}.items():
        tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"][experts] = -5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    data = ("--keep-experts", 4, "--data", f"a={jsonl}", "--score", "frequency")
    document = prune(source, tmp_path / "a", *data, *REAM)
    assert document["merge"] == {
        "method": "ream", "merged": 0, "into": 0, "left_out": 8,
        "errors": {"none": pytest.approx(0, abs=1e-10), "ream": pytest.approx(0, abs=1e-10)},
    }  # fmt: skip
    prune(source, tmp_path / "b", *data)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert tiny.in_process("verify", tmp_path / "a")[0] == 0


def test_groups_of_the_router_do_not_mix(jsonl: Path, tmp_path: Path) -> None:
    glm = tiny.save_glm4_moe(tmp_path / "glm", n_routed_experts=8, n_group=2, topk_group=2)
    document = prune(glm, tmp_path / "out", "--keep-experts", 4, "--data", f"a={jsonl}", "--score", "ean", *REAM)
    groups = [group["experts"] for row in document["layers"] for group in row["groups"]]
    assert len(groups) == 4  # one in each half of each layer
    assert all(len({expert // 4 for expert in experts}) == 1 for experts in groups)


def test_a_proof_finds_what_was_edited(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", ("--keep-experts", 2, "--data", f"a={jsonl}", "--score", "ean")
    prune(mixtral, out, *data, *REAM)
    document = json.loads((out / "moetool.json").read_text())

    def verified(**changes: Any) -> str:
        changed = json.loads(json.dumps(document))
        last = changed["lineage"][-1]
        last["recipe"] |= {key: value for key, value in changes.items() if key in last["recipe"]}
        last |= {key: value for key, value in changes.items() if key in last}
        (out / "moetool.json").write_text(json.dumps(changed))
        return tiny.refusal("verify", out)

    groups = document["lineage"][-1]["recipe"]["merged"]
    other = json.loads(json.dumps(groups))
    one = other[0][0]["weights"]
    one[0], one[1] = one[0] - 0.1, one[1] + 0.1
    assert "differ from the source" in verified(merged=other)
    assert "the unit orders rebuilt from the recipe differ from those in moetool.json" in verified(
        unit_orders=[["0"], []]
    )
    assert "merged experts of an entry cannot be read" in verified(merged=[3])
    (out / "moetool.json").write_text(json.dumps(document))
    assert tiny.in_process("verify", out)[0] == 0
    raw = bytearray((out / "model.safetensors").read_bytes())
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    with CheckpointReader(out) as reader:
        position = reader.tensors[name].start
    raw[position] ^= 1
    (out / "model.safetensors").write_bytes(raw)
    assert name in tiny.refusal("verify", out)


def test_it_is_told(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    arguments = ("prune", mixtral, tmp_path / "out", "--keep-experts", 2, "--data", f"a={jsonl}", *SMALL, *REAM)
    code, out, err = tiny.in_process(*arguments, "--plan")
    assert code == 0, err
    shown = " ".join(out.split())
    assert "4 experts into 2, 3 in the largest group (ream, all layers)" in shown
    planned = json.loads(tiny.in_process(*arguments, "--plan", "--json")[1])
    assert not (tmp_path / "out").exists()
    merge = planned["merge"]
    assert f"none {merge['errors']['none']:.4f}, ream {merge['errors']['ream']:.4f} (on the same tokens)" in shown
    assert merge["errors"]["none"] == pytest.approx(planned["errors"][planned["score"]])
    assert ("change the layers' outputs more" in " ".join(err.split())) == (
        merge["errors"]["ream"] > merge["errors"]["none"]
    )
    for row in planned["layers"]:
        for group in row["groups"]:
            assert sum(group["weights"]) == pytest.approx(1, abs=1e-12)
            assert group["experts"][0] in row["kept"]
            assert not set(group["experts"][1:]) & set(row["kept"])
    assert tiny.in_process(*arguments)[0] == 0
    recorded = entry(tmp_path / "out")["recipe"]
    assert recorded["merge"] == "ream"
    assert recorded["merged"] == [row["groups"] for row in planned["layers"]]
    assert json.loads(tiny.in_process(*arguments, "--json")[1])["already_finished"]
    other = fails(mixtral, tmp_path / "out", "--keep-experts", 2, "--data", f"a={jsonl}")
    assert "different finished checkpoint" in other
    shown = " ".join(tiny.in_process("inspect", tmp_path / "out")[1].split())
    assert "2 experts kept by" in shown
    assert "the others merged into them (ream)" in shown


def test_a_merged_expert_is_followed_as_its_centroid(jsonl: Path, tmp_path: Path) -> None:
    moe = upcycled("mixtral", tmp_path)
    tiny.save_tokenizer(moe)
    prune(moe, tmp_path / "a", "--keep-experts", 3, "--data", f"a={jsonl}", "--score", "ean", *REAM)
    origins_are_doubled(tmp_path, jsonl)


def test_a_killed_merge_is_finished_by_the_same_command(jsonl: Path, tmp_path: Path) -> None:
    source = tiny.save_mixtral(
        tmp_path / "moe", hidden_size=64, intermediate_size=256, num_hidden_layers=6, num_local_experts=8
    )
    out = tmp_path / "out"
    options = ("--keep-experts", 4, "--data", f"a={jsonl}", *REAM, "--max-shard-size", "300KB", "--score", "ean")
    whole = prune(source, tmp_path / "whole", *options)
    assert whole["merge"]["merged"] == 24
    command = ("prune", source, out, *options, *SMALL, "--verify", "none", "--workers", 1)
    complete = tiny.killed_while_writing(out, *command)
    assert "merge" in fails(source, out, *options[:4], "--max-shard-size", "300KB", "--score", "ean")
    assert tiny.in_process(*command)[0] == 0
    assert {name: (out / name).stat().st_ino for name in complete} == complete
    assert same(weights(out), weights(tmp_path / "whole"))
    assert tiny.in_process("verify", out)[0] == 0
