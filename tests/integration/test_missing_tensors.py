"""A checkpoint that lacks tensors: no command copies or uses it as if they were there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moetool.surgery.complete import _experts_missing
from tests import tiny


def without(source: Path, folder: Path, *parts: str) -> Path:
    """A checkpoint without the tensors whose names have one of some parts."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}
    assert len(left) < len(tensors)
    save_file(left, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("lm_head", "lm_head.weight,"),
        ("model.norm", "model.norm.weight,"),
        ("0.block_sparse_moe.gate", "model.layers.0.block_sparse_moe.gate.weight,"),
        ("0.block_sparse_moe.experts.2.w1", "model.layers.0.block_sparse_moe.experts.2.w1.weight,"),
        ("1.block_sparse_moe.experts.3", "model.layers.1.block_sparse_moe.experts.3.w1.weight and 2 more tensors,"),
        ("1.block_sparse_moe.experts", "model.layers.1.block_sparse_moe.experts.0.w1.weight and 11 more tensors,"),
    ],
)
def test_convert_says_which_tensor_a_checkpoint_lacks(part: str, named: str, mixtral: Path, tmp_path: Path) -> None:
    broken = without(mixtral, tmp_path / "broken", part)
    for more in ([], ["--plan"]):
        assert f"broken lacks {named}" in tiny.refusal("convert", broken, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["average", "grow", "prune", "densify", "upcycle", "cpt"])
def test_no_command_writes_a_checkpoint_from_one_that_lacks_its_head(
    command: str, mixtral: Path, llama: Path, jsonl: Path, tmp_path: Path
) -> None:
    broken, out = without(mixtral, tmp_path / "broken", "lm_head"), tmp_path / "out"
    dense = without(llama, tmp_path / "dense", "lm_head") if command == "upcycle" else llama
    text = ("--data", f"t={jsonl}", "--device", "cpu", "--max-tokens", 64)
    arguments: dict[str, tuple[object, ...]] = {
        "average": (out, broken, shutil.copytree(broken, tmp_path / "again")),
        "grow": (broken, out, "--num-experts", 8),
        "prune": (broken, out, "--keep-experts", 2, *text),
        "densify": (broken, out, "--keep-experts", 2, *text),
        "upcycle": (dense, out),
        "cpt": (broken, out, "--train", f"t={jsonl}", "--max-steps", 1, "--seq-len", 16),
    }
    assert "lm_head.weight" in tiny.refusal(command, *arguments[command], "--quiet")
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("command", ["analyze-routing", "eval", "sample"])
def test_no_command_measures_a_model_that_lacks_an_expert(
    command: str, mixtral: Path, jsonl: Path, tmp_path: Path
) -> None:
    broken, text = without(mixtral, tmp_path / "broken", "1.block_sparse_moe.experts"), f"t={jsonl}"
    arguments: dict[str, tuple[object, ...]] = {
        "analyze-routing": ("--data", text, "--out", tmp_path / "out"),
        "eval": ("--text", text, "--out", tmp_path / "out"),
        "sample": (tmp_path / "out.jsonl", "--max-tokens", 20),
    }
    line = tiny.refusal(command, broken, *arguments[command], "--device", "cpu", "--quiet")
    assert "missing tensors model.layers.1.mlp.experts" in line


def test_verify_does_not_prove_a_copy_of_a_checkpoint_that_lacks_its_head(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions wrote such copies."""
    broken = without(mixtral, tmp_path / "broken", "lm_head")
    with monkeypatch.context() as earlier:
        earlier.setattr("moetool.surgery.plan.check_whole", lambda *those: None)
        tiny.result("convert", broken, tmp_path / "copy")
    assert "broken lacks lm_head.weight" in tiny.refusal("verify", tmp_path / "copy")


def test_tied_embeddings_are_no_missing_head(tmp_path: Path) -> None:
    tied = tiny.save_mixtral(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    tiny.result("convert", tied, tmp_path / "out")


def test_a_model_without_a_head_is_whole(tmp_path: Path) -> None:
    """config.json names its class: here a base model, such as an embedding model."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaModel(config).save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["architectures"] == ["LlamaModel"]
    tiny.result("convert", tmp_path / "base", tmp_path / "out")


def test_a_checkpoint_whose_config_names_no_class_needs_no_head(mixtral: Path, tmp_path: Path) -> None:
    """Without `architectures` it may be a model with a head or a base model, whose tensors have no prefix."""
    base = without(mixtral, tmp_path / "base", "lm_head")
    tensors = load_file(base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    config.pop("architectures")
    (base / "config.json").write_text(json.dumps(config))
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, base / "model.safetensors")
    tiny.result("convert", base, tmp_path / "out")
    broken = without(base, tmp_path / "broken", "1.input_layernorm")
    assert "lacks layers.1.input_layernorm.weight," in tiny.refusal("convert", broken, tmp_path / "other")


def test_in_a_family_without_a_spec_a_matrix_may_be_of_fewer_experts() -> None:
    """So it is in LongCat-Flash, whose last experts do nothing; a gap among the others is still found."""
    there = {f"l.experts.{expert}.{name}" for expert in range(4) for name in ("up", "down")}
    assert not _experts_missing(there - {"l.experts.3.down"}, {}, None)
    assert _experts_missing(there - {"l.experts.2.down"}, {}, None) == ["l.experts.2.down"]
