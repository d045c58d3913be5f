"""The command on every family whose router can be hooked, against what its routers return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moetool.routing.capture import RouterCapture
from moetool.routing.drift import drift
from moetool.routing.shape import outline
from tests import tiny

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
ROUTED: dict[str, Any] = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
# family: the settings that it needs besides, its layers with a router, and the class of its routers
FAMILIES: dict[str, tuple[dict[str, Any], list[int], str]] = {
    "mixtral": ({"num_local_experts": 4}, [0, 1, 2], "MixtralTopKRouter"),
    "qwen2_moe": (
        {"num_experts": 4, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0]}, [1, 2], "Qwen2MoeTopKRouter",
    ),
    "qwen3_moe": ({"num_experts": 4, "mlp_only_layers": [1]}, [0, 2], "Qwen3MoeTopKRouter"),
    "qwen3_next": (
        {
            "num_experts": 4, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
        [0, 1, 2], "Qwen3NextTopKRouter",
    ),
    "olmoe": ({"num_experts": 4}, [0, 1, 2], "OlmoeTopKRouter"),
    "flex_olmo": ({"num_experts": 4}, [0, 1, 2], "FlexOlmoTopKRouter"),
    "granitemoe": ({"num_local_experts": 4}, [0, 1, 2], "GraniteMoeTopKRouter"),
    "granitemoeshared": (
        {"num_local_experts": 4, "shared_intermediate_size": 16}, [0, 1, 2], "GraniteMoeSharedTopKRouter",
    ),
    "granitemoe_swa": (
        {"num_local_experts": 4, "shared_intermediate_size": 16, "sliding_window": 8}, [0, 1, 2],
        "GraniteMoeSWATopKRouter",
    ),
    "granitemoehybrid": (
        {
            "num_local_experts": 4, "shared_intermediate_size": 16, "layer_types": ["full_attention"] * 3,
            "mamba_n_heads": 4,
        },
        [0, 1, 2], "GraniteMoeHybridTopKRouter",
    ),
    "phimoe": ({"num_local_experts": 4}, [0, 1, 2], "PhimoeTopKRouter"),
    "gpt_oss": ({"num_local_experts": 4}, [0, 1, 2], "GptOssTopKRouter"),
    "ernie4_5_moe": (
        {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
        [1, 2], "Ernie4_5_MoeTopKRouter",
    ),
    "dots1": (ROUTED | {"first_k_dense_replace": 1}, [1, 2], "Dots1TopkRouter"),
    "glm4_moe": (ROUTED | {"first_k_dense_replace": 1}, [1, 2], "Glm4MoeTopkRouter"),
    "solar_open": (ROUTED, [0, 1, 2], "SolarOpenTopkRouter"),
    "deepseek_v2": (ROUTED | LATENT | {"first_k_dense_replace": 1}, [1, 2], "DeepseekV2TopkRouter"),
    "deepseek_v3": (ROUTED | LATENT | {"first_k_dense_replace": 1}, [1, 2], "DeepseekV3TopkRouter"),
    "hunyuan_v1_moe": ({"num_experts": 4, "moe_topk": 2}, [0, 1, 2], "HunYuanMoEV1Gate"),
    "cohere2_moe": ({"num_experts": 4, "num_shared_experts": 1}, [0, 1, 2], "Cohere2MoeTopKRouter"),
    "minimax_m2": ({"num_local_experts": 4}, [0, 1, 2], "MiniMaxM2TopKRouter"),
    "lfm2_moe": (
        {"num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
        [1, 2], "Lfm2MoeTopKRouter",
    ),
    "afmoe": (
        {
            "num_experts": 4, "num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 8,
            "layer_types": ["sliding_attention"] * 3,
        },
        [1, 2], "AfmoeTokenChoiceRouter",
    ),
}  # fmt: skip
# What the published layout calls the bias that only chooses experts.
BIASES = ("e_score_correction_bias", "expert_bias")
BIASED = ["ernie4_5_moe", "dots1", "glm4_moe", "solar_open", "deepseek_v3", "minimax_m2", "lfm2_moe", "afmoe"]
SHARED = [
    "qwen2_moe", "qwen3_next", "granitemoeshared", "granitemoe_swa", "granitemoehybrid", "ernie4_5_moe", "dots1",
    "glm4_moe",
    "solar_open", "deepseek_v2", "deepseek_v3", "hunyuan_v1_moe", "cohere2_moe", "afmoe",
]  # fmt: skip
LOUD = 3  # the expert that a bias prefers


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the same for all families, and take longer than all else."""
    monkeypatch.setattr("moetool.routing.plots.draw_plots", lambda report: {})


def build(family: str, folder: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SMALL | FAMILIES[family][0]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) < 200_000, "a default of the family is not overridden"
    for router in routers(model, family).values():
        for name, parameter in router.named_parameters():
            if name.endswith("weight"):  # some start at zero, where every choice is a tie
                nn.init.normal_(parameter)
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


def routers(model: nn.Module, family: str) -> dict[int, nn.Module]:
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__ == FAMILIES[family][2]]
    return {int(name.split(".layers.")[1].split(".")[0]): module for name, module in found}


def counts(folder: Path, family: str, tokens: list[int]) -> dict[int, list[int]]:
    """Layer -> tokens of each expert: the third thing that each router returns, a window a forward."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {layer: [0] * 4 for layer in routers(model, family)}
    for layer, module in routers(model, family).items():
        module.register_forward_hook(
            lambda _, inputs, output, layer=layer: found.update(
                {layer: (torch.tensor(found[layer]) + output[2].flatten().bincount(minlength=4)).tolist()}
            )
        )
    for start in range(0, len(tokens), 16):
        with torch.no_grad():
            model(torch.tensor([tokens[start : start + 16]]), use_cache=False)
    return found


def analyze(folder: Path, text: Path, out: Path) -> dict[str, Any]:
    flags = ("--seq-len", 16, "--batch-size", 3, "--max-tokens", 200, "--vocabulary-layers", "none", "--device", "cpu")
    code, _, errors = tiny.in_process("analyze-routing", folder, "--data", f"a={text}", "--out", out, "--quiet", *flags)
    assert code == 0, errors
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def tokens_of(folder: Path, text: Path) -> list[int]:
    from moetool.checkpoint.model import load_tokenizer

    tokenizer, ids = load_tokenizer(folder), []
    for line in text.read_text().splitlines():
        ids += [*tokenizer.encode(json.loads(line)["text"], add_special_tokens=False), 0]
    return ids[:200]


@pytest.mark.parametrize("family", FAMILIES)
def test_load_is_what_the_routers_return(family: str, jsonl: Path, tmp_path: Path) -> None:
    folder = build(family, tmp_path / "model")
    expected = counts(folder, family, tokens_of(folder, jsonl))
    report = analyze(folder, jsonl, tmp_path / "out")
    rows = report["domains"]["a"]["layers"]
    assert [row["layer"] for row in rows] == FAMILIES[family][1]
    assert (report["num_experts"], report["top_k"], report["domains"]["a"]["num_tokens"]) == (4, 2, 200)
    for row in rows:
        # Top-2 of 4 routed experts: a shared one would be a fifth, or make more than 400 routes.
        assert sum(expected[row["layer"]]) == 400
        assert row["load"] == pytest.approx([count / 400 for count in expected[row["layer"]]])
        assert sum(row["mean_probability"]) == pytest.approx(1)
        assert len(set(row["load"])) > 1, "nothing to tell apart"


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_and_top_k_are_known_without_weights(family: str) -> None:
    config = AutoConfig.for_model(family, **(SMALL | FAMILIES[family][0]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = outline(model, RouterCapture(model))
    assert found is not None
    assert (found.layers, found.num_experts, found.top_k) == (FAMILIES[family][1], 4, 2)


def test_a_router_that_takes_token_numbers_is_not_known_without_weights() -> None:
    config = AutoConfig.for_model("deepseek_v4", num_hidden_layers=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert outline(model, RouterCapture(model)) is None


@pytest.mark.parametrize("family", BIASED)
def test_a_selection_bias_changes_the_counts_alone(family: str, jsonl: Path, tmp_path: Path) -> None:
    folder = build(family, tmp_path / "model")
    before = analyze(folder, jsonl, tmp_path / "before")["domains"]["a"]["layers"]
    tensors, found = load_file(folder / "model.safetensors"), 0
    for name in tensors:
        if name.endswith(BIASES):
            tensors[name].view(-1)[LOUD] = 100.0
            found += 1
    assert found == len(before)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    after = analyze(folder, jsonl, tmp_path / "after")["domains"]["a"]["layers"]
    for old, new in zip(before, after, strict=True):
        assert old["load"][LOUD] < 0.5
        assert new["load"][LOUD] == 0.5  # every token's first choice
    # The router's probabilities are those before the bias; the first layer's input has not changed.
    assert after[0]["mean_probability"] == pytest.approx(before[0]["mean_probability"])


@pytest.mark.parametrize("family", FAMILIES)
def test_drift_finds_the_router_and_the_expert_that_moved(family: str, tmp_path: Path) -> None:
    before, after = build(family, tmp_path / "before"), tmp_path / "after"
    model = AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32)
    last = FAMILIES[family][1][-1]
    shared = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shared" in name:  # a shared expert is no routed one
                parameter.mul_(3)
                shared += 1
            elif f".layers.{last}." in name and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                parameter[2].mul_(0.5)
        for parameter in routers(model, family)[last].parameters():
            parameter.mul_(1.25)
    assert (shared > 0) == (family in SHARED)
    model.save_pretrained(after)
    rows = drift(before, after, 4)
    assert [row["layer"] for row in rows] == FAMILIES[family][1]
    assert rows[-1]["router"] == pytest.approx(0.25)
    assert rows[-1]["experts"] == pytest.approx([0, 0, 0.5, 0])
    assert all(row["router"] == 0 and row["experts"] == [0] * 4 for row in rows[:-1])


def test_routers_that_do_not_tell_their_choices_are_refused_before_weights_are_read(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_local_experts": 4, "intermediate_size_mlp": 32, "moe_layers": [0, 1, 2], "num_experts_per_tok": 1}
    config = AutoConfig.for_model("llama4_text", **(SMALL | settings))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny.save_tokenizer(tmp_path / "model")
    monkeypatch.setattr("moetool.routing.analysis.load_model", lambda *_: pytest.fail("a model was loaded"))
    command = ("analyze-routing", tmp_path / "model", "--data", f"a={jsonl}", "--out", tmp_path / "out", "--quiet")
    code, _, errors = tiny.in_process(*command)
    assert (code, errors.count("\n")) == (1, 1)
    assert "Llama4Router does not return (logits, weights, chosen experts)" in errors
    assert not (tmp_path / "out").exists()
