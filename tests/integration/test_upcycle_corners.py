"""Sources, sizes and dtypes at the edge of what is usual: right results prove, wrong ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moetool import recipe, registry
from moetool.surgery import fill
from moetool.surgery.moments import standard_errors
from moetool.upcycle import blocks
from tests import tiny

UP = "model.layers.0.mlp.up_proj.weight"


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    """Of sequences longer than the sliding windows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    found: Tensor = model.eval()(torch.randint(1, 300, (2, 24), generator=torch.Generator().manual_seed(0))).logits
    return found


def upcycle(*arguments: object) -> str:
    """By the real command, with a full proof; returns what it says on failure, in one line."""
    code, _, err = tiny.in_process("upcycle", *arguments, "--verify", "full")
    assert "Traceback" not in err
    assert code in (0, 1), err
    return err if code else ""


def change_config(folder: Path, **changes: Any) -> Path:
    """Change keys of a config.json, or take them out where the value is `...`."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def change_weights(folder: Path, change: Any, marks: str = "mlp") -> Path:
    """Apply a function to the tensors whose names hold `marks`."""
    tensors = load_file(folder / "model.safetensors")
    changed = {name: change(t).contiguous() if marks in name else t for name, t in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_no_two_blocks_of_experts_share_a_random_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # gate and up have 6 blocks here, down has 7: numbers counted by either would meet.
    dense = tiny.save_dense("llama", tmp_path / "dense", intermediate_size=48)
    monkeypatch.setattr(fill, "BLOCK_ELEMENTS", 256)
    drawn: list[int] = []
    real = recipe.generator

    def generator(seed: int, stream: str, index: int = 0) -> torch.Generator:
        drawn.extend([index] * (stream == "values"))
        return real(seed, stream, index)

    monkeypatch.setattr(blocks, "generator", generator)
    assert upcycle(dense, tmp_path / "moe", "--num-experts", 4) == ""
    assert len(drawn) == 2 * 4 * (6 + 6 + 7)
    assert len(set(drawn)) == len(drawn)


def test_gate_and_up_of_different_dtypes_fit_one_tensor(tmp_path: Path) -> None:
    dense = change_weights(tiny.save_dense("granite", tmp_path / "dense"), lambda t: t.bfloat16(), "up_proj")
    assert upcycle(dense, tmp_path / "moe", "--method", "copy") == ""
    assert (logits(tmp_path / "moe") - logits(dense)).abs().max() < 1e-4


def test_a_mistral_with_windows_in_some_layers_is_no_mixtral(tmp_path: Path) -> None:
    # transformers takes such a model for a Ministral; Mixtral would have the window everywhere.
    dense = tiny.save_dense("mistral", tmp_path / "dense")
    change_config(dense, layer_types=["full_attention", "sliding_attention"])
    assert "only some of its layers have a sliding window" in upcycle(dense, tmp_path / "moe", "--target", "mixtral")
    assert upcycle(dense, tmp_path / "ministral", "--method", "copy") == ""  # a family that has them by layer
    assert (logits(tmp_path / "ministral") - logits(dense)).abs().max() < 1e-4
    change_config(dense, layer_types=["sliding_attention"] * 2)
    assert upcycle(dense, tmp_path / "moe", "--method", "copy") == ""
    assert (logits(tmp_path / "moe") - logits(dense)).abs().max() < 1e-4


def test_a_cohere2_with_heads_of_their_own_size(tmp_path: Path) -> None:
    dense = tiny.save_dense("cohere2", tmp_path / "dense", head_dim=16)
    assert upcycle(dense, tmp_path / "moe", "--method", "copy") == ""
    assert (logits(tmp_path / "moe") - logits(dense)).abs().max() < 1e-4


def test_a_cohere2_without_windows(tmp_path: Path) -> None:
    dense = tiny.save_dense("cohere2", tmp_path / "dense", layer_types=["full_attention"] * 2)
    assert upcycle(dense, tmp_path / "moe", "--method", "copy") == ""
    assert (logits(tmp_path / "moe") - logits(dense)).abs().max() < 1e-4


def test_what_is_drawn_stays_in_the_range_of_the_dtype(tmp_path: Path) -> None:
    dense = change_weights(tiny.save_dense("llama", tmp_path / "dense"), lambda t: t * 3000)
    options = ("--method", "noise", "--noise-scale", 100, "--dtype")
    assert "would hold values that float16 cannot" in upcycle(dense, tmp_path / "half", *options, "float16")
    assert not (tmp_path / "half" / "config.json").exists()
    assert upcycle(dense, tmp_path / "brain", *options, "bfloat16") == ""


def test_donors_may_be_saved_in_another_form(tmp_path: Path) -> None:
    dense = tiny.save_llama(tmp_path / "dense", rope_theta=5e5)
    donor = tiny.save_llama(tmp_path / "donor", seed=1, rope_theta=5e5, dtype=torch.bfloat16)
    old = {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": None, "architectures": ..., "use_cache": False}
    change_config(donor, **old)
    assert upcycle(dense, tmp_path / "moe", "--donor", donor) == ""
    (dense / "vocab.json").write_text("{}")  # what a tokenizer.json was made from may be left behind
    tokenizer = json.loads((donor / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    (donor / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert upcycle(dense, tmp_path / "again", "--donor", donor) == ""
    change_config(donor, rope_theta=1e4)
    assert "rope_parameters is" in upcycle(dense, tmp_path / "other", "--donor", donor)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 64, "head_dim": None},
        {"head_dim": 10**400},
        {"initializer_range": 10**400},
        {"bos_token_id": float("nan")},
        {"eos_token_id": {"a": [float("inf")]}},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("target", ["mixtral", "granitemoe"])
def test_numbers_that_no_model_has_are_refused(target: str, change: dict[str, Any], tmp_path: Path) -> None:
    dense = change_config(tiny.save_dense("llama", tmp_path / "dense"), **change)
    told = upcycle(dense, tmp_path / "moe", "--target", target, "--method", "scratch")
    assert "config.json" in told
    assert not (tmp_path / "moe").exists()


def test_a_size_that_no_model_has_takes_no_time(tmp_path: Path) -> None:
    dense = change_config(tiny.save_dense("llama", tmp_path / "dense"), intermediate_size=10**15)
    assert "choose from 1, 2, 4, 5, 8" in upcycle(dense, tmp_path / "moe", "--granularity", 7)


SHAPES: dict[str, Any] = {
    "heavy": lambda t: t * torch.logspace(-2, 2, t.shape[0])[:, None],
    "constant": lambda t: torch.full_like(t, 0.1),
    "nearly": lambda t: 1 + t * 1e-3,
    "small": lambda t: t * 1e-6,
    "zero": torch.zeros_like,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", SHAPES)
def test_what_rounding_does_is_no_mistake(weights: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dense = tiny.save_dense("llama", tmp_path / "dense", num_hidden_layers=1, intermediate_size=256)
    change_weights(dense, lambda t: SHAPES[weights](t).to(dtype))
    runs: list[tuple[object, ...]] = [("--drop-ratio", 0.5)]
    runs += [("--method", "noise", "--noise-scale", scale) for scale in ("1e-3", "3e-3", "0.03", "0.1", "1", "100")]
    runs += [("--method", "noise", "--noise-std", std) for std in ("1e-9", "1e-6", "1e-3", "1")]
    for number, options in enumerate(runs):
        assert upcycle(dense, tmp_path / f"moe{number}", *options) == "", options


@pytest.mark.parametrize("hidden", [1, 2, 3])
def test_a_few_numbers_in_a_unit_prove(hidden: int, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "num_hidden_layers": 1}
    dense = tiny.save_dense("llama", tmp_path / "dense", hidden_size=hidden, intermediate_size=3, **sizes)
    for seed in range(8):
        for method in ("drop", "noise"):
            options = ("--method", method, f"--{method}-ratio", "0.34", "--num-experts", 32, "--seed", seed)
            assert upcycle(dense, tmp_path / f"{method}{seed}", *options) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": {"dtype": "F64"}},
        {"recipe": {"drop_index": "none"}},
        {"recipe": {"method": "none"}},
        {"recipe": {"router": "none"}},
        {"recipe": {"drop_ratio": "sNaN"}},
        {"recipe": {"noise_std": "Infinity"}},
        {"recipe": {"num_experts": 10**9}},
        {"source": {"name": "~nobody/model"}},
    ],
    ids=str,
)
def test_a_lineage_that_nothing_writes_is_one_line(change: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    assert upcycle(llama, out) == ""
    document = json.loads((out / "moetool.json").read_text())
    for part, values in change.items():
        document["lineage"][0][part] |= values
    (out / "moetool.json").write_text(json.dumps(document))
    code, _, err = tiny.in_process("verify", out, "--level", "quick")
    assert code == 1
    assert len(err.splitlines()) == 1


def test_a_list_of_shards_that_is_none_is_another_checkpoint(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    assert upcycle(llama, out) == ""
    document = json.loads((out / "moetool.json").read_text()) | {"shards": 64}
    (out / "moetool.json").write_text(json.dumps(document))
    assert "is a different finished checkpoint" in upcycle(llama, out)


def test_a_router_of_many_blocks_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "BLOCK_ELEMENTS", 64)
    drawn: list[tuple[int, ...]] = []
    real = registry.load("router", "orthogonal")

    def orthogonal(shape: tuple[int, ...], *arguments: Any) -> Tensor:
        drawn.append(shape)
        found: Tensor = real(shape, *arguments)
        return found

    monkeypatch.setattr("moetool.upcycle.router.orthogonal", orthogonal)
    dense = tiny.save_llama(tmp_path / "dense")
    options = ("--router", "orthogonal", "--num-experts", 16, "--workers", 1, "--seed", 77, "--method", "copy")
    assert upcycle(dense, tmp_path / "moe", *options) == ""
    assert set(drawn) == {(16, 32)}
    assert len(drawn) <= 4  # two layers, written and proved, in 8 blocks each


def test_standard_errors_are_normal_for_any_number_of_draws() -> None:
    """Of 20000 right slices, 5 % lie beyond 1.96 and about one in 16000 beyond 4 standard errors."""
    draw = torch.Generator().manual_seed(0)
    for n in (3, 10, 100):
        slices = torch.randn(20000, n, generator=draw, dtype=torch.float64)
        std = slices.std(1)
        far = [standard_errors((0.0, float(s), n), (0.0, 1.0), 0.0) for s in std]
        assert 0.03 < sum(f > 1.96 for f in far) / len(far) < 0.07
        assert sum(f > 4 for f in far) <= 8
    assert standard_errors((0.5, 1.0, 100), (0.0, 1.0), 0.0) == 5.0
    assert standard_errors((0.0, 1.5, 1000), (0.0, 1.0), 0.0) > 15
