"""Every pair of a dense and an MoE family: stock transformers loads the result, and it is the dense model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moetool import registry
from tests import tiny

SPECS = {name: registry.load("target", name) for name in registry.names("target")}
PAIRS = [(dense, name) for name, spec in SPECS.items() for dense in spec.dense]
SHARING = [(dense, name) for dense, name in PAIRS if SPECS[name].shared]
# What only some targets of a family can have, switched on or off in the dense model.
WITHOUT: dict[tuple[str, str], dict[str, Any]] = {
    **{("llama", target): {"head_dim": 16} for target in ("mixtral", "glm4_moe", "solar_open")},
    ("mistral", "glm4_moe"): {"sliding_window": None},
    ("granitemoehybrid", "granitemoehybrid"): {"position_embedding_type": "rope"},
    **{("qwen2", target): {"use_sliding_window": False} for target in ("glm4_moe", "granitemoehybrid")},
}
ROPE = {
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
    },
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
}  # fmt: skip


@torch.no_grad()
def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of 3 sequences of 48 tokens: longer than the windows and than the scaled positions."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokens = torch.randint(1, 300, (3, 48), generator=torch.Generator().manual_seed(1))
    found: torch.Tensor = model.eval()(tokens).logits
    return found


def upcycle(dense: Path, out: Path, target: str, *options: object) -> Path:
    """By the real command, with a full proof."""
    code, _, err = tiny.in_process("upcycle", dense, out, "--target", target, "--verify", "full", *options)
    assert code == 0, err
    return out


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) < 1e-5 * max(1.0, float(b.abs().max()))


def make(pair: tuple[str, str], folder: Path, **changes: Any) -> Path:
    return tiny.save_dense(pair[0], folder, **(WITHOUT.get(pair, {}) | changes))


Made = Callable[[tuple[str, str]], tuple[Path, torch.Tensor]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The dense model of a pair as it is by default, and its logits; made once, never modify it."""
    root = tmp_path_factory.mktemp("dense")

    @functools.cache
    def once(family: str, like: tuple[str, str] | None) -> tuple[Path, torch.Tensor]:
        folder = make(like or (family, ""), root / f"{family}-{like and like[1]}")
        return folder, logits(folder)

    return lambda pair: once(pair[0], pair if pair in WITHOUT else None)


@pytest.mark.parametrize("shared", [None, 0])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_copies_are_the_dense_model(pair: tuple[str, str], shared: int | None, made: Made, tmp_path: Path) -> None:
    spec = SPECS[pair[1]].shared
    if shared is not None and (spec is None or spec.sizes):
        pytest.skip("it has no shared expert, or always")
    dense, expected = made(pair)
    options = () if shared is None else ("--shared-experts", shared)
    out = upcycle(dense, tmp_path / "moe", pair[1], "--method", "copy", "--num-experts", 4, *options)
    assert close(logits(out), expected)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_what_transformers_saves_again_is_the_same_bits(pair: tuple[str, str], tmp_path: Path) -> None:
    dense = make(pair, tmp_path / "dense", dtype=torch.bfloat16)
    out = upcycle(dense, tmp_path / "moe", pair[1], "--num-experts", 12, "--drop-ratio", "0.3")
    ours = load_file(out / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert ours.keys() == again.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == again[name].dtype, name
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_scaled_positions_are_kept(pair: tuple[str, str], rope: str, made: Made, tmp_path: Path) -> None:
    dense = make(pair, tmp_path / "dense", rope_parameters=dict(ROPE[rope]))  # transformers may add to it
    out = upcycle(dense, tmp_path / "moe", pair[1], "--method", "copy", "--num-experts", 4)
    expected = logits(dense)
    assert close(logits(out), expected)
    assert not close(made(pair)[1], expected)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_biases_and_ties_are_kept_or_refused(pair: tuple[str, str], tied: bool, biased: bool, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"tie_word_embeddings": tied}
    if pair[0] not in ("mistral", "qwen2", "ernie4_5", "qwen3_5_text", "lfm2"):
        changes["attention_bias"] = biased
    elif biased:
        pytest.skip("the family has no such switch")
    dense = make(pair, tmp_path / "dense", **changes)
    fits = not changes.get("attention_bias") or "o" in SPECS[pair[1]].biases
    if not fits:
        code, _, err = tiny.in_process("upcycle", dense, tmp_path / "moe", "--target", pair[1])
        assert code == 1
        assert "its attention has biases" in err
        return
    out = upcycle(dense, tmp_path / "moe", pair[1], "--method", "copy", "--num-experts", 4)
    assert close(logits(out), logits(dense))
    names = set(load_file(out / "model.safetensors"))
    assert ("lm_head.weight" in names) == (not tied or not SPECS[pair[1]].ties)


@pytest.mark.parametrize(("experts", "top_k", "parts"), [(8, 4, 4), (16, 4, 2), (12, 12, 4)])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_fine_grained_experts_start_as_the_dense_model(
    pair: tuple[str, str], experts: int, top_k: int, parts: int, made: Made, tmp_path: Path
) -> None:
    shared = SPECS[pair[1]].shared
    if shared and shared.sizes:
        pytest.skip("it always has a shared expert")
    dense, expected = made(pair)
    # LFM2's weights are divided by their sum and 1e-6, which shows where all scores that are chosen are tiny.
    std = "0.02" if pair[1] == "lfm2_moe" else 1
    options = ("--num-experts", experts, "--top-k", top_k, "--granularity", parts, "--router-std", std)
    out = upcycle(dense, tmp_path / "moe", pair[1], "--drop-ratio", 0, *options, "--shared-experts", 0)
    assert close(logits(out), expected)


@pytest.mark.parametrize(
    ("experts", "top_k", "parts", "shared"),
    [(12, 3, 4, 1), (12, 6, 4, 1), (8, 2, 4, 2), (8, 2, 1, 1), (8, 4, 2, 2), (8, 4, 2, 4), (4, 2, 1, 2), (6, 2, 2, 1)],
)
@pytest.mark.parametrize("pair", SHARING, ids="-".join)
def test_shared_experts_start_as_the_dense_model(
    pair: tuple[str, str], experts: int, top_k: int, parts: int, shared: int, made: Made, tmp_path: Path
) -> None:
    spec = SPECS[pair[1]].shared
    assert spec is not None
    if spec.sizes and shared not in spec.sizes:
        pytest.skip("its shared expert has one size")
    dense, expected = made(pair)
    options = ("--num-experts", experts, "--top-k", top_k, "--granularity", parts, "--router-std", 1)
    out = upcycle(dense, tmp_path / "moe", pair[1], "--method", "copy", *options, "--shared-experts", shared)
    assert close(logits(out), expected)


@pytest.mark.parametrize("layers", ["2-", "0-1", "0,2", "every:2", "1-2"])
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if SPECS[pair[1]].moe_layers], ids="-".join)
def test_some_layers_stay_dense_or_it_is_refused(pair: tuple[str, str], layers: str, tmp_path: Path) -> None:
    able = {
        "glm4_moe": ["2-"],
        "dots1": ["2-"],
        "ernie4_5_moe": ["2-", "0-1", "every:2", "1-2", "0,2"],
    }.get(pair[1])
    changes: dict[str, Any] = {"num_hidden_layers": 4}
    if pair[0] == "cohere2":
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    dense = make(pair, tmp_path / "dense", **changes)
    command = ("--method", "copy", "--num-experts", 4, "--moe-layers", layers)
    if (able is None or layers in able) and not (pair[1] == "ernie4_5_moe" and layers == "0,2"):
        out = upcycle(dense, tmp_path / "moe", pair[1], *command)
        assert close(logits(out), logits(dense))
    else:
        code, _, err = tiny.in_process("upcycle", dense, tmp_path / "moe", "--target", pair[1], *command)
        assert code == 1
        assert f"--moe-layers {layers} does not fit {pair[1]}" in err
        assert not (tmp_path / "moe").exists()
