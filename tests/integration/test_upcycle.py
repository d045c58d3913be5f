"""`moetool upcycle` on tiny models, loaded back by stock transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tests import tiny

W = {"gate": "w1", "up": "w3", "down": "w2"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def upcycle(*arguments: object) -> dict[str, Any]:
    code, out, err = tiny.in_process("upcycle", *arguments, "--json")
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def logits(folder: Path, length: int = 24) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(0, 300, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


def save_mistral(folder: Path, **changes: Any) -> Path:
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**(sizes | heads | changes))).save_pretrained(folder)
    return folder


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 16},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "yarn rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "gelu": {"hidden_act": "gelu"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_ratio_0_gives_the_dense_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    dense = tiny.save_llama(tmp_path / "dense", **changes)
    upcycle(dense, tmp_path / "moe", "--drop-ratio", "0", "--num-experts", "4")
    assert (logits(dense) - logits(tmp_path / "moe")).abs().max() < 1e-5


def test_mistral_keeps_its_sliding_window(tmp_path: Path) -> None:
    dense = save_mistral(tmp_path / "dense", sliding_window=8)
    upcycle(dense, tmp_path / "moe", "--method", "copy")
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["sliding_window"] == 8
    assert (logits(dense) - logits(tmp_path / "moe")).abs().max() < 1e-5


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_drop_redraws_the_same_floor_of_units_in_all_three_matrices(
    tmp_path: Path, seed: int, dtype: torch.dtype
) -> None:
    dense = tiny.save_llama(tmp_path / "dense", dtype=dtype, intermediate_size=65)
    upcycle(dense, tmp_path / "moe", "--drop-ratio", "0.5", "--seed", seed)
    old, new = weights(dense), weights(tmp_path / "moe")
    sets = []
    for layer in range(2):
        for expert in range(8):
            found = {}
            for projection, w in W.items():
                before = old[f"model.layers.{layer}.mlp.{projection}_proj.weight"]
                after = new[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{w}.weight"]
                assert after.dtype == dtype
                axis = 1 if projection == "down" else 0
                differs = (before != after).any(1 - axis)
                found[projection] = differs.nonzero().flatten().tolist()
                # 5 sigma bounds on the mean and standard deviation of the redrawn slice, against the
                # slice that it replaced (reference: z-tests with n = |S| x D values).
                units = differs.nonzero().flatten()
                was = before.index_select(axis, units).double()
                now = after.index_select(axis, units).double()
                n = was.numel()
                assert abs(now.mean() - was.mean()) < 5 * was.std() / n**0.5
                assert abs(now.std() - was.std()) < 5 * was.std() / (2 * n) ** 0.5
            assert len(found["gate"]) == 32  # floor(0.5 x 65)
            assert found["gate"] == found["up"] == found["down"]
            sets.append(tuple(found["gate"]))
    assert len(set(sets)) == 16, "each expert of each layer draws its own set"


def test_statistics_are_those_of_the_slice_not_of_the_matrix(tmp_path: Path) -> None:
    # Units with wildly different scales: redrawing with the whole matrix's deviation would show.
    dense = tiny.save_llama(tmp_path / "dense", intermediate_size=64)
    tensors = load_file(dense / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[name] = tensors[name] * torch.logspace(-3, 3, 64)[:, None] + 5
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    document = upcycle(dense, tmp_path / "moe", "--verify", "full", "--drop-ratio", "0.1")
    assert document["proof"]["worst_sigma"] < 5
    old, new = tensors[name], weights(tmp_path / "moe")
    deviations = set()
    for expert in range(8):
        after = new[f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"]
        units = (old != after).any(1)
        assert 0.5 < float(after[units].std() / old[units].std()) < 2
        deviations.add(round(float(after[units].std()), 1))
    assert len(deviations) > 4


def test_bytes_do_not_depend_on_workers_shards_or_resume(llama: Path, tmp_path: Path) -> None:
    for index in ("shared", "per-matrix"):
        plain = ("--drop-index", index, "--verify", "none")
        upcycle(llama, tmp_path / f"a-{index}", *plain, "--workers", "1")
        upcycle(llama, tmp_path / f"b-{index}", *plain, "--workers", "5", "--max-shard-size", "40KB")
        one, many = weights(tmp_path / f"a-{index}"), weights(tmp_path / f"b-{index}")
        assert one.keys() == many.keys()
        assert all(torch.equal(one[name], many[name]) for name in one)
        assert len(list((tmp_path / f"b-{index}").glob("*.safetensors"))) > 5


def test_blocks_do_not_show(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tiny model fits in one block; a small block size makes many, and verify must still agree.
    monkeypatch.setattr("moetool.surgery.fill.BLOCK_ELEMENTS", 200)
    for index in ("shared", "per-matrix"):
        out = tmp_path / index
        assert upcycle(llama, out, "--drop-index", index, "--verify", "full")["proof"]["worst_sigma"] < 5


@pytest.mark.parametrize("index", ["shared", "per-matrix"])
def test_ratio_0_equals_copy_in_every_tensor(llama: Path, tmp_path: Path, index: str) -> None:
    upcycle(llama, tmp_path / "copy", "--method", "copy")
    for ratio in ("0", "0.01"):  # floor(0.01 x 64) = 0
        out = tmp_path / f"zero-{ratio}"
        upcycle(llama, out, "--drop-ratio", ratio, "--drop-index", index)
        a, b = weights(tmp_path / "copy"), weights(out)
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert a.keys() == b.keys()


def test_the_router_does_not_depend_on_the_method(llama: Path, tmp_path: Path) -> None:
    upcycle(llama, tmp_path / "copy", "--method", "copy")
    upcycle(llama, tmp_path / "drop")
    name = "model.layers.1.block_sparse_moe.gate.weight"
    assert torch.equal(weights(tmp_path / "copy")[name], weights(tmp_path / "drop")[name])
    first = weights(tmp_path / "drop")["model.layers.0.block_sparse_moe.gate.weight"]
    assert not torch.equal(first, weights(tmp_path / "drop")[name])


def test_per_matrix_leaves_an_eighth_of_the_units_whole(tmp_path: Path) -> None:
    dense = tiny.save_llama(tmp_path / "dense", intermediate_size=512)
    upcycle(dense, tmp_path / "moe", "--drop-index", "per-matrix", "--num-experts", "4")
    old, new = weights(dense), weights(tmp_path / "moe")
    prefix, expert = "model.layers.0.mlp", "model.layers.0.block_sparse_moe.experts.1"
    rows = {tuple(row.tolist()): i for i, row in enumerate(old[f"{prefix}.gate_proj.weight"])}
    whole = 0
    for unit in range(512):
        dense_unit = rows.get(tuple(new[f"{expert}.w1.weight"][unit].tolist()))
        whole += (
            dense_unit is not None
            and torch.equal(new[f"{expert}.w3.weight"][unit], old[f"{prefix}.up_proj.weight"][dense_unit])
            and torch.equal(new[f"{expert}.w2.weight"][:, unit], old[f"{prefix}.down_proj.weight"][:, dense_unit])
        )
    assert 34 < whole < 94  # 512 / 8 = 64, standard deviation below 7.5


def test_save_pretrained_gives_the_same_tensors_back(llama: Path, tmp_path: Path) -> None:
    upcycle(llama, tmp_path / "moe")
    AutoModelForCausalLM.from_pretrained(tmp_path / "moe").save_pretrained(tmp_path / "again")
    mine, theirs = weights(tmp_path / "moe"), weights(tmp_path / "again")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_config_is_readable_old_and_new(tmp_path: Path) -> None:
    dense = tiny.save_llama(tmp_path / "dense", dtype=torch.bfloat16, **VARIANTS["llama3 rope"])
    raw = json.loads((dense / "config.json").read_text())
    raw["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (dense / "config.json").write_text(json.dumps(raw))
    (dense / "evil.py").write_text("raise SystemExit")
    upcycle(dense, tmp_path / "moe")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 2)
    assert not config["output_router_logits"]
    assert "auto_map" not in config
    assert not (tmp_path / "moe" / "evil.py").exists()
    assert (tmp_path / "moe" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    assert (tmp_path / "moe" / "generation_config.json").exists()


def test_a_config_in_the_old_form_gives_the_same_model(llama: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(llama, tmp_path / "old"))
    raw = json.loads((old / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "torch_dtype": "float32",
    }
    raw.pop("dtype")
    (old / "config.json").write_text(json.dumps(raw))
    upcycle(old, tmp_path / "moe", "--method", "copy")
    assert (logits(old) - logits(tmp_path / "moe")).abs().max() < 1e-5


def test_lineage_records_what_was_done(llama: Path, tmp_path: Path) -> None:
    import hashlib

    upcycle(llama, tmp_path / "moe", "--drop-ratio", "0.25")
    (entry,) = json.loads((tmp_path / "moe" / "moetool.json").read_text())["lineage"]
    sha = hashlib.sha256((llama / "model.safetensors").read_bytes()).hexdigest()
    assert entry["source"]["sha256"] == {"model.safetensors": sha}
    assert entry["recipe"]["drop_ratio"] == "0.25"
    assert entry["redrawn_units"]["num_redrawn"] == 16
    assert len(entry["redrawn_units"]["digests"][1]) == 8


def test_a_head_that_differs_from_tied_embeddings_is_kept(tmp_path: Path) -> None:
    dense = tiny.save_llama(tmp_path / "dense")
    raw = json.loads((dense / "config.json").read_text()) | {"tie_word_embeddings": True}
    (dense / "config.json").write_text(json.dumps(raw))
    upcycle(dense, tmp_path / "moe", "--method", "copy")
    assert not json.loads((tmp_path / "moe" / "config.json").read_text())["tie_word_embeddings"]
    assert (logits(dense) - logits(tmp_path / "moe")).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_rounds_once(llama: Path, tmp_path: Path, dtype: str) -> None:
    document = upcycle(llama, tmp_path / "moe", "--dtype", dtype, "--verify", "full")
    assert document["proof"]["tensors"] == 65
    wanted = getattr(torch, dtype)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights(tmp_path / "moe")[name], weights(llama)[name].to(wanted))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").dtype == wanted


def test_llama_needs_no_lm_head_only_when_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    model.save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    code, _, err = tiny.in_process("upcycle", tmp_path / "dense", tmp_path / "moe")
    assert code == 1
    assert "has no output head (lm_head.weight)" in err
