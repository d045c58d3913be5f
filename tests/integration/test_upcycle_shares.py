"""A ratio for each layer, experts kept whole, and donors with weights, as the command writes and proves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetool.checkpoint.reader import CheckpointReader
from tests import tiny
from tests.integration.test_upcycle_methods import P, check_experts, expert, logits, upcycle, weights

FFN = "model.layers.{}.mlp.{}_proj.weight"
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"
MIXED = ("0.5", "0-1=0.25", "3=0")  # of 64 units in four layers: 16, 16, 32, 0
NUMBERS = {0: 16, 1: 16, 2: 32, 3: 0}


def ratios(method: str, texts: tuple[str, ...]) -> list[str]:
    return [word for text in texts for word in (f"--{method}-ratio", text)]


def bits(folder: Path) -> dict[str, bytes]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in weights(folder).items()}


def change(folder: Path, tensor: str) -> None:
    """One bit in the middle of a tensor."""
    path, info = folder / "model.safetensors", CheckpointReader(folder).tensors[tensor]
    whole = bytearray(path.read_bytes())
    whole[info.start + info.size // 2] ^= 1
    path.write_bytes(whole)


def new_units(rows: Tensor, dense: Tensor) -> int:
    """Rows that the dense matrix does not have."""
    known = {tuple(row) for row in dense.tolist()}
    return sum(tuple(row) not in known for row in rows.tolist())


@pytest.mark.parametrize("index", ["shared", "per-matrix"])
@pytest.mark.parametrize("method", ["drop", "noise"])
@pytest.mark.parametrize(("family", "target"), [("llama", "mixtral"), ("llama", "granitemoe"), ("qwen3", "glm4_moe")])
def test_layers_have_their_ratio_and_whole_experts_are_the_dense_ffn(
    family: str, target: str, method: str, index: str, tmp_path: Path
) -> None:
    dense, out = tiny.save_dense(family, tmp_path / "dense", num_hidden_layers=4), tmp_path / "moe"
    options = ("--method", method, *ratios(method, MIXED), "--drop-index", index, "--keep-experts-whole", 2)
    document = upcycle(dense, out, "--target", target, "--num-experts", 4, *options, "--verify", "full")
    check_experts(document, [dense], out)
    before, made = weights(dense), weights(out)
    for layer, number in NUMBERS.items():
        for e in range(4):
            for p in P:
                whole, found = before[FFN.format(layer, p)], expert(target, made, layer, e, p)
                if e < 2 or not number:
                    assert torch.equal(found, whole)
                else:
                    assert new_units(found.T if p == "down" else found, whole.T if p == "down" else whole) == number
    # Two of four experts in three layers; the gate's units are counted.
    assert document["proof"]["redrawn_units"] == 2 * (16 + 16 + 32)
    for level in ("quick", "full"):
        assert tiny.in_process("verify", out, "--level", level)[0] == 0


def test_a_layer_is_what_it_is_in_a_model_with_its_ratio_everywhere(tmp_path: Path) -> None:
    dense = tiny.save_llama(tmp_path / "dense")
    runs = {"mixed": ("0=0.25",), "half": (), "quarter": ("0.25",)}
    for name, texts in runs.items():
        upcycle(dense, tmp_path / name, *ratios("drop", texts))
    upcycle(dense, tmp_path / "whole", "--keep-experts-whole", 3)
    mixed, half, quarter, whole = (bits(tmp_path / name) for name in (*runs, "whole"))
    assert mixed == {name: (quarter if ".layers.0." in name else half)[name] for name in mixed}
    first = tuple(f".experts.{e}." for e in range(3))
    copied = {name for name in whole if any(part in name for part in first)}
    assert len(copied) == 2 * 3 * 3
    assert {name: raw for name, raw in whole.items() if name not in copied} == {
        name: raw for name, raw in half.items() if name not in copied
    }


@pytest.mark.parametrize(
    "options", [ratios("drop", ("0-=0",)), ratios("drop", ("0", "1=0")), ["--drop-ratio", "all=0"]]
)
def test_ratio_0_everywhere_is_the_dense_model(options: list[str], llama: Path, tmp_path: Path) -> None:
    document = upcycle(llama, tmp_path / "moe", *options)
    assert document["redrawn_units"] == {"per_expert": 0, "of": 64, "common": 1.0}
    assert (logits(tmp_path / "moe") - logits(llama)).abs().max() < 1e-5
    assert "redrawn_units" not in json.loads((tmp_path / "moe" / "moetool.json").read_text())["lineage"][0]


def test_experts_kept_whole_alone_give_the_dense_model(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    options = ("--drop-ratio", 1, "--keep-experts-whole", 2, "--shared-experts", 0)
    upcycle(llama, out, "--target", "glm4_moe", *options)
    tensors = load_file(out / "model.safetensors")
    for chosen, same in (([0, 1], True), ([1, 2], False)):
        for name in tensors:
            if name.endswith("e_score_correction_bias"):  # every token goes to these experts
                tensors[name] = torch.tensor([10.0 * (e in chosen) for e in range(8)])
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        assert (float((logits(out) - logits(llama)).abs().max()) < 1e-5) == same


def test_whole_groups_of_each_donor(tmp_path: Path) -> None:
    folders = [tiny.save_llama(tmp_path / f"dense{i}", seed=i) for i in range(2)]
    options = ("--granularity", 2, "--num-experts", 12, "--top-k", 4, "--keep-experts-whole", 4)
    out = tmp_path / "moe"
    document = upcycle(folders[0], out, "--donor", folders[1], *options, "--verify", "full")
    check_experts(document, folders, out)
    # Of each model the first two experts, which are the halves of its FFN; 4 of each donor's 6 are changed.
    assert document["proof"]["redrawn_units"] == 2 * 8 * 16
    made = weights(out)
    for donor, first in enumerate((0, 6)):
        whole = weights(folders[donor])[FFN.format(1, "gate")]
        assert torch.equal(torch.cat([made[EXPERT.format(1, first + e)] for e in range(2)]), whole)
    # Pairs of one part and donor: 3 of 3 experts, one of them whole: two pairs (1 - 1/2), one (1 - 1/2)^2.
    assert document["redrawn_units"]["common"] == pytest.approx((2 * 0.5 + 0.25) / 3)
    code, printed, _ = tiny.in_process("upcycle", folders[0], out, "--donor", folders[1], *options, "--plan")
    assert code == 0
    printed = " ".join(printed.split())
    assert "16 of 32 units redrawn in each expert, in gate, up and down alike, except in 4 kept whole;" in printed
    assert "two experts have 41.7% in common, on average" in printed


def test_plan_lineage_and_inspect_name_the_layers(tmp_path: Path) -> None:
    dense, out = tiny.save_llama(tmp_path / "dense", num_hidden_layers=4), tmp_path / "moe"
    arguments = ("upcycle", dense, out, *ratios("drop", MIXED), "--keep-experts-whole", 1)
    code, printed, _ = tiny.in_process(*arguments)
    assert code == 0
    printed = " ".join(printed.split())
    assert "16 of 64 units redrawn in each expert in layers 0-1, 32 in layer 2, 0 in layer 3, in gate" in printed
    assert "alike, except in 1 kept whole;" in printed
    plan = json.loads(tiny.in_process(*arguments, "--plan", "--json")[1])
    found = plan["redrawn_units"]
    assert (found["per_expert"], found["of"]) == (None, 64)
    assert [(row["layer"], row["per_expert"]) for row in found["layers"]] == list(NUMBERS.items())
    # 8 experts, one whole: 7 pairs with it, 21 without.
    common = [(7 * k + 21 * k * k) / 28 for k in (0.75, 0.75, 0.5, 1)]
    assert [row["common"] for row in found["layers"]] == pytest.approx(common)
    assert found["common"] == pytest.approx(sum(common) / 4)
    entry = json.loads((out / "moetool.json").read_text())["lineage"][0]
    assert entry["recipe"] == plan["recipe"]
    assert (entry["recipe"]["drop_ratio"], entry["recipe"]["keep_experts_whole"]) == (["0.5", "0-1=0.25", "3=0"], 1)
    assert entry["redrawn_units"]["num_redrawn"] == [16, 16, 32, 0]
    code, printed, _ = tiny.in_process("inspect", out)
    printed = " ".join(printed.split())
    assert "experts kept whole 1, method drop, 16 of 64 units redrawn in layers 0-1, 32 in layer 2" in printed
    # Finished: the same command says so, in whatever order; another recipe is refused by its name.
    turned = ("upcycle", dense, out, *ratios("drop", MIXED[::-1]), "--keep-experts-whole", 1)
    assert json.loads(tiny.in_process(*turned, "--json")[1])["already_finished"]
    told = tiny.refusal("upcycle", dense, out, *ratios("drop", MIXED))
    assert "(keep_experts_whole 1 -> default)" in told
    assert "drop_ratio ['0.5', '0-1=0.25', '3=0'] -> 0.5" in tiny.refusal("upcycle", dense, out)


def test_moetool_yaml_repeats_the_run(tmp_path: Path) -> None:
    folders = [tiny.save_llama(tmp_path / f"dense{i}", seed=i) for i in range(3)]
    options = (*ratios("drop", ("1=0.25", "0.5")), "--keep-experts-whole", 3, "--num-experts", 6)
    donors = ("--donor", f"{folders[1]}=0.70", "--donor", folders[2])
    first, second = tmp_path / "a", tmp_path / "b"
    upcycle(folders[0], first, *donors, *options)
    written = yaml.safe_load((first / "moetool.yaml").read_text())
    assert written["drop-ratio"] == ["0.5", "1=0.25"]
    assert written["keep-experts-whole"] == 3
    assert written["donor"] == [f"{folders[1]}=0.70", str(folders[2])]
    assert tiny.in_process("upcycle", "--config", first / "moetool.yaml", folders[0], second)[0] == 0
    assert bits(first) == bits(second)
    lineages = [json.loads((out / "moetool.json").read_text())["lineage"] for out in (first, second)]
    assert lineages[0] == lineages[1]
    assert lineages[0][0]["recipe"]["donor_weights"] == ["0.7", None]
    # A number alone is written as it was, and a file with one is read.
    upcycle(folders[0], tmp_path / "c", "--drop-ratio", "0.30")
    assert "drop-ratio: '0.3'\n" in (tmp_path / "c" / "moetool.yaml").read_text()
    config = tmp_path / "options.yaml"
    for text, expected in (("drop-ratio: 0.3", "0.3"), ("drop-ratio: [1=0.1]", ["0.5", "1=0.1"])):
        config.write_text(f"{text}\nmethod: drop\n")
        document = upcycle(folders[0], tmp_path / "d", "--config", config, "--plan")
        assert document["recipe"]["drop_ratio"] == expected


@pytest.mark.parametrize("number", [0, 3])
def test_a_kept_unit_that_was_touched_is_found(number: int, tmp_path: Path) -> None:
    """In a layer of ratio 0, and in an expert that was kept whole."""
    dense, out = tiny.save_llama(tmp_path / "dense"), tmp_path / "moe"
    upcycle(dense, out, "--drop-ratio", "1=0", "--keep-experts-whole", 1)
    layer = 0 if number == 0 else 1
    change(out, EXPERT.format(layer, number))
    told = tiny.refusal("verify", out)
    assert f"tensor {EXPERT.format(layer, number)} (model.safetensors) holds kept units, but rows" in told


def test_a_recipe_that_was_edited_is_found(tmp_path: Path) -> None:
    dense, out = tiny.save_llama(tmp_path / "dense"), tmp_path / "moe"
    upcycle(dense, out, "--drop-ratio", "1=0.25", "--keep-experts-whole", 1)
    document = json.loads((out / "moetool.json").read_text())
    for change in (
        {"drop_ratio": ["0.5", "1=0.5"]},
        {"drop_ratio": "0.5"},
        {"drop_ratio": ["0.5", "0=0.25"]},
        {"keep_experts_whole": 2},
        {"keep_experts_whole": 9},
        {"donor_weights": ["0.7"]},
    ):
        edited = json.loads(json.dumps(document))
        edited["lineage"][0]["recipe"] |= change
        (out / "moetool.json").write_text(json.dumps(edited))
        for level in ("quick", "full"):
            told = tiny.refusal("verify", out, "--level", level)
            assert "moetool.json" in told or "--keep-experts-whole 9" in told


def test_a_checkpoint_of_an_earlier_version_proves(llama: Path, tmp_path: Path) -> None:
    """Its moetool.json knows neither layers nor whole experts nor weights."""
    out = tmp_path / "moe"
    upcycle(llama, out, "--num-experts", 4)
    document = json.loads((out / "moetool.json").read_text())
    entry = document["lineage"][0]
    assert entry["recipe"] == {
        "target": "mixtral", "num_experts": 4, "top_k": 2, "method": "drop", "drop_ratio": "0.5",
        "drop_index": "shared", "noise_ratio": "0", "noise_scale": "0", "noise_std": None, "num_donors": 1,
        "granularity": 1, "shared_experts": 0, "moe_layers": "all", "router": "normal", "router_std": "0.02",
        "seed": 0, "dtype": "auto",
    }  # fmt: skip
    units = entry["redrawn_units"]
    assert list(units) == ["num_units", "num_redrawn", "matrices", "layers", "digests"]
    assert (units["num_units"], units["num_redrawn"], units["layers"]) == (64, 32, [0, 1])
    assert json.loads(tiny.in_process("upcycle", llama, out, "--num-experts", 4, "--json")[1])["already_finished"]
    for level in ("quick", "full"):
        assert tiny.in_process("verify", out, "--level", level)[0] == 0


def mean(sources: list[dict[str, Tensor]], shares: list[float], name: str) -> Tensor:
    """In numpy's fp32, in the order of the sources, rounded once."""
    total: Any = np.zeros(sources[0][name].shape, dtype=np.float32)
    for source, share in zip(sources, shares, strict=True):
        if share:
            total = total + source[name].float().numpy() * np.float32(share)
    return torch.from_numpy(total).to(sources[0][name].dtype)


WEIGHTS: dict[str, tuple[tuple[str, ...], list[float]]] = {
    "one": (("=0.7", ""), [0.15, 0.7, 0.15]),
    "both": (("=0.7", "=0.2"), [0.1, 0.7, 0.2]),
    "none": (("=0", ""), [0.5, 0, 0.5]),
    "rest": (("=0.75", "=0.25"), [0, 0.75, 0.25]),
    "all": (("=1", ""), [0, 1, 0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_all_but_the_experts_is_the_mean_by_weights(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    typed, shares = WEIGHTS[name]
    folders = [tiny.save_dense("qwen2", tmp_path / f"dense{i}", seed=i, dtype=dtype) for i in range(3)]
    donors = [word for folder, text in zip(folders[1:], typed, strict=True) for word in ("--donor", f"{folder}{text}")]
    out = tmp_path / "moe"
    options = ("--num-experts", 6, "--shared-experts", 1, "--moe-layers", "1-", "--verify", "full")
    document = upcycle(folders[0], out, *donors, *options)
    check_experts(document, folders, out)
    assert document["trunk_shares"] == pytest.approx(shares)
    dense, made = [weights(folder) for folder in folders], weights(out)
    trunk = [tensor for tensor in dense[0] if ".layers.1.mlp" not in tensor]
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias", FFN.format(0, "up")} < set(trunk)
    for tensor in trunk:
        assert torch.equal(made[tensor], mean(dense, shares, tensor)), tensor
        exact: Any = sum(share * source[tensor].double() for share, source in zip(shares, dense, strict=True))
        assert torch.allclose(made[tensor].double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
        if name == "all":
            assert torch.equal(made[tensor], dense[1][tensor])
    for p in P:  # the shared expert, whose gate of zeros halves its output
        shared = made[f"model.layers.1.mlp.shared_expert.{p}_proj.weight"]
        assert torch.equal(shared, mean(dense, shares, FFN.format(1, p)))
    assert tiny.in_process("verify", out)[0] == 0
    _, printed, _ = tiny.in_process("inspect", out)
    printed = "".join(printed.split())
    if name == "one":
        assert f"{folders[1]}(weight0.7)and{folders[2]}({'qwen2'})" in printed


def test_the_plan_says_whose_the_rest_is(tmp_path: Path) -> None:
    folders = [tiny.save_llama(tmp_path / f"dense{i}", seed=i) for i in range(3)]
    out = tmp_path / "moe"

    def said(*texts: str) -> str:
        donors = [w for folder, text in zip(folders[1:], texts, strict=True) for w in ("--donor", f"{folder}{text}")]
        code, printed, err = tiny.in_process("upcycle", folders[0], out, *donors, "--num-experts", 6, "--plan")
        assert code == 0, err
        return " ".join(printed.split())

    assert "trunk everything outside the experts is a mean, 0.15 of DENSE, 0.7 of donor 1, 0.15 of donor 2" in said(
        "=0.7", ""
    )
    assert "trunk everything outside the experts is donor 2's alone" in said("", "=1")
    assert "trunk" not in said("", "")
    assert not out.exists()


def test_equal_weights_are_the_plain_mean(tmp_path: Path) -> None:
    dense, donor = (tiny.save_llama(tmp_path / name, seed=n) for n, name in enumerate(("dense", "donor")))
    upcycle(dense, tmp_path / "moe", "--donor", donor)
    document = upcycle(dense, tmp_path / "moe", "--donor", f"{donor}=0.50")
    assert document["already_finished"]
    assert "donor_weights" not in document["recipe"]
    # A tensor of the trunk that is not the mean does not prove.
    change(tmp_path / "moe", "model.norm.weight")
    assert "model.norm.weight (model.safetensors) should be a copy" in tiny.refusal("verify", tmp_path / "moe")


def test_a_source_whose_weight_is_0_gives_experts_alone(tmp_path: Path) -> None:
    """What is not used is not looked at; what is used still is."""
    dense, donor = (tiny.save_llama(tmp_path / name, seed=n) for n, name in enumerate(("dense", "donor")))
    tensors = load_file(donor / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, donor / "model.safetensors", metadata={"format": "pt"})
    upcycle(dense, tmp_path / "moe", "--donor", f"{donor}=0")
    made, before = weights(tmp_path / "moe"), weights(dense)
    assert torch.equal(made["model.norm.weight"], before["model.norm.weight"])
    assert torch.equal(made["lm_head.weight"], before["lm_head.weight"])
    assert "NaN" in tiny.refusal("upcycle", dense, tmp_path / "other", "--donor", f"{donor}=0.1")


def test_a_name_may_end_like_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save_llama(tmp_path / "dense")
    for name in ("run=0.5", "lr=3e-4"):
        tiny.save_llama(tmp_path / name, seed=1)
    for typed, source, recorded in (
        ("run=0.5", "run=0.5", None),
        ("run=0.5=0.7", "run=0.5", ["0.7"]),
        ("lr=3e-4", "lr=3e-4", None),
        ("lr=3e-4=1", "lr=3e-4", ["1"]),
    ):
        out = tmp_path / f"moe-{typed}"
        upcycle("dense", out, "--donor", typed, "--verify", "full")
        entry = json.loads((out / "moetool.json").read_text())["lineage"][0]
        assert entry["recipe"].get("donor_weights") == recorded
        assert entry["donors"][0]["name"] == str(tmp_path / source) or entry["donors"][0]["name"] == source
        assert tiny.in_process("verify", out)[0] == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--drop-ratio 2=0.25", "--drop-ratio '2': '2' is not a range within layers 0-1"),
        ("--drop-ratio 0-=0.25 --drop-ratio 1=0", "both '0-' and '1' name layer 1"),
        ("--target qwen3_moe --moe-layers 1- --drop-ratio 0=0.1", "layer 0 stays dense; layers with experts are 1"),
        ("--method noise --noise-ratio 7-=0.1", "--noise-ratio '7-': '7-' is not a range"),
        ("--keep-experts-whole 9", "--keep-experts-whole 9 is not between 0 and --num-experts 8; choose from 0, 1, 2"),
        ("--keep-experts-whole 3 --granularity 2", "a multiple of 2 (2 experts together make up one dense FFN)"),
        ("--keep-experts-whole 3 --donor DONOR", "(each of 2 dense models keeps the same number); choose from 0, 2, 4"),
        ("--donor DONOR=0.7 --donor DONOR=0.6 --num-experts 6", "the weights of --donor sum to 1.3"),
        ("--donor DONOR=1.5", "DONOR=1.5: 1.5 is not between 0 and 1; a weight is the donor's share of a mean"),
        ("--donor DONOR=-1", "-1 is not a number of 0 or more"),
        ("--donor DONOR=nan", "nan is not a number of 0 or more"),
        ("--donor DONOR=most", "no folder DONOR=most"),
    ],
)
def test_refusals_are_one_line(options: str, told: str, tmp_path: Path) -> None:
    family = "qwen3" if "qwen3" in options else "llama"
    dense, donor = (tiny.save_dense(family, tmp_path / name, seed=n) for n, name in enumerate(("dense", "donor")))
    words = [word.replace("DONOR", str(donor)) for word in options.split()]
    assert told.replace("DONOR", str(donor)) in tiny.refusal("upcycle", dense, tmp_path / "moe", *words)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--drop-ratio 0.5 --drop-ratio 0.25", "0.5 and 0.25 are both for all layers; give one"),
        ("--drop-ratio first=0.5", "'first': give all, every:2, or layers such as 4- or 0-3,8"),
        ("--drop-ratio 0=2", "2 is not between 0 and 1"),
        ("--method copy --drop-ratio 0=0.5", "--drop-ratio has no effect with --method copy"),
        ("--method copy --keep-experts-whole 2", "--keep-experts-whole has no effect with --method copy"),
        ("--method drop --noise-ratio 0=0.5", "--noise-ratio has no effect with --method drop"),
        ("--keep-experts-whole -1", "should be greater than or equal to 0"),
        ("--keep-experts-whole 2 --drop-ratio 0", "has no effect with --drop-ratio 0, which changes no expert"),
        ("--keep-experts-whole 8", "leaves none of 8 experts to --method drop; give fewer, or --method copy"),
    ],
)
def test_what_is_mistyped_is_an_error_of_usage(options: str, told: str, llama: Path, tmp_path: Path) -> None:
    code, _, err = tiny.in_process("upcycle", llama, tmp_path / "moe", *options.split())
    assert code == 2
    assert told in " ".join(err.replace("│", " ").split())


def test_a_killed_run_is_finished_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moetool.checkpoint.writer import CheckpointWriter

    folders = [tiny.save_llama(tmp_path / f"dense{i}", seed=i) for i in range(2)]
    options = ("--donor", f"{folders[1]}=0.7", *ratios("drop", ("0.5", "1=0.25")), "--keep-experts-whole", 2)
    command = (*options, "--max-shard-size", "60KB")
    upcycle(folders[0], tmp_path / "whole", *command)
    real, calls = CheckpointWriter.finish, 0

    def finish(self: Any, files: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        real(self, files)

    monkeypatch.setattr(CheckpointWriter, "finish", finish)
    assert tiny.in_process("upcycle", folders[0], tmp_path / "moe", *command)[0] != 0
    assert (tmp_path / "moe" / "moetool.partial.json").exists()
    told = tiny.refusal("upcycle", folders[0], tmp_path / "moe", *command, "--keep-experts-whole", 4)
    assert "keep_experts_whole 2 -> 4" in told
    upcycle(folders[0], tmp_path / "moe", *command)
    assert bits(tmp_path / "moe") == bits(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
