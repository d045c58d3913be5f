"""Sources in other forms: families that are another one under other names, and text models inside multimodal ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from moetool.arch.dense_families import DENSE
from moetool.arch.forms import FLAT, LEFT_OUT
from tests import tiny
from tests.integration.test_upcycle_families import close, logits

# Of their own family in transformers; the others are text models inside multimodal ones.
ALIKE = {name: spec for name, spec in DENSE.items() if spec.like and name in tiny.DENSE}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.5, 3.0, 4.0],
}  # fmt: skip
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
SOURCES: list[tuple[str, dict[str, Any], str]] = [
    ("phi3", {}, "mixtral"),
    ("phi3", {"rope_parameters": LONG, "sliding_window": None}, "mixtral"),
    ("phi3", {"rope_parameters": HALF, "sliding_window": 512}, "glm4_moe"),
    ("ministral", {}, "qwen2_moe"),
    ("cwm", {}, "qwen2_moe"),
    ("internlm3", {}, "mixtral"),
    ("iquestcoder", {}, "mixtral"),
    ("seed_oss", {}, "glm4_moe"),
    ("seed_oss", {"head_dim": 8, "attention_out_bias": True}, "granitemoehybrid"),
    ("helium", {}, "ernie4_5_moe"),
    ("cohere", {}, "cohere2_moe"),
    ("granitemoehybrid", {"layer_types": ["attention"] * 2, "position_embedding_type": "rope"}, "granitemoehybrid"),
    ("granitemoehybrid", {"attention_bias": True, "mamba_proj_bias": True}, "granitemoehybrid"),
]


def test_every_family_that_is_like_another_is_tried() -> None:
    assert {name for name, _, _ in SOURCES} >= set(ALIKE)


@pytest.mark.parametrize(("family", "changes", "target"), SOURCES)
def test_the_first_target_that_fits_is_the_dense_model(
    family: str, changes: dict[str, Any], target: str, tmp_path: Path
) -> None:
    dense = tiny.save_dense(family, tmp_path / "dense", **changes)
    command = ("upcycle", dense, tmp_path / "moe", "--method", "copy", "--num-experts", 4, "--verify", "full", "--json")
    code, out, err = tiny.in_process(*command)
    assert code == 0, err
    assert json.loads(out)["target"] == target
    assert json.loads(out)["dense_family"] == family
    assert close(logits(tmp_path / "moe"), logits(dense))


def test_parts_of_fused_matrices_are_redrawn_and_hashed_like_others(tmp_path: Path) -> None:
    """In several shards, with donors, gone on with, and proved; the same bytes with any number of workers."""
    dense, donor = (tiny.save_dense("phi3", tmp_path / name, seed=i) for i, name in enumerate(("a", "b")))
    AutoModelForCausalLM.from_pretrained(dense).save_pretrained(dense, max_shard_size="30KB")
    (dense / "model.safetensors").unlink()
    common = ("--donor", donor, "--num-experts", 4, "--verify", "full")
    for workers in (1, 3):
        out = tmp_path / f"moe-{workers}"
        code, _, err = tiny.in_process("upcycle", dense, out, *common, "--workers", workers)
        assert code == 0, err
        assert tiny.in_process("verify", out)[0] == 0
    one, three = (load_file(tmp_path / f"moe-{workers}" / "model.safetensors") for workers in (1, 3))
    assert all(one[name].equal(three[name]) for name in one)
    lineage = json.loads((tmp_path / "moe-1" / "moetool.json").read_text())["lineage"][0]
    assert len(lineage["source"]["sha256"]) > 2
    shard = dense / sorted(lineage["source"]["sha256"])[0]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    assert "is not the file that was upcycled" in tiny.in_process("verify", tmp_path / "moe-1")[2]


@pytest.mark.parametrize("name", ["yarn", "longrope"])
def test_scaled_positions_as_the_published_phis_write_them(name: str, tmp_path: Path) -> None:
    """Beyond the positions of the first training, so that the long factors count."""
    dense = tiny.save_dense("phi3", tmp_path / "dense", rope_parameters=LONG)
    config = json.loads((dense / "config.json").read_text())
    config["rope_scaling"] = {"type": name} | {key: LONG[key] for key in ("short_factor", "long_factor")}
    config |= {"rope_theta": LONG["rope_theta"], "original_max_position_embeddings": 32}
    del config["rope_parameters"]
    (dense / "config.json").write_text(json.dumps(config))
    code, _, err = tiny.in_process("upcycle", dense, tmp_path / "moe", "--method", "copy", "--num-experts", 4)
    assert code == 0, err
    assert close(logits(tmp_path / "moe"), logits(dense))


def test_a_fused_matrix_with_other_rows_is_refused(tmp_path: Path) -> None:
    dense = tiny.save_dense("phi3", tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.self_attn.qkv_proj.weight"] = torch.zeros(60, 32)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    code, _, err = tiny.in_process("upcycle", dense, tmp_path / "moe")
    assert code == 1
    assert "qkv_proj.weight has shape [60, 32], config.json says 64 rows" in err


TEXT = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14,
    "embed_dim": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
TIED = {"tie_word_embeddings": True}
# multimodal family: its settings, and the target of its text model
MULTIMODAL: dict[str, tuple[dict[str, Any], str]] = {
    "mistral3": (
        {"text_config": TEXT | {"model_type": "mistral", "sliding_window": None}, "vision_config": VISION},
        "mixtral",
    ),
    "llava": (
        {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION | {"model_type": "clip_vision_model"}},
        "mixtral",
    ),
    "internvl": (
        {"text_config": TEXT | {"model_type": "qwen3"}, "vision_config": VISION | {"model_type": "internvl_vision"}},
        "qwen3_moe",
    ),
    "idefics3": ({"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION}, "mixtral"),
    "qwen2_vl": ({"text_config": TEXT | MROPE, "vision_config": QWEN_VISION}, "qwen2_moe"),
    "qwen2_5_vl": ({"text_config": TEXT | MROPE | TIED, "vision_config": QWEN_VISION} | TIED, "qwen2_moe"),
    "qwen3_vl": ({"text_config": TEXT | MROPE, "vision_config": QWEN_VISION}, "qwen3_moe"),
    "qwen3_5": (
        {"text_config": TEXT | tiny.DENSE["qwen3_5_text"], "vision_config": QWEN_VISION},
        "qwen3_5_moe_text",
    ),
}


@pytest.mark.parametrize("family", MULTIMODAL)
def test_a_multimodal_model_gives_its_text_model(family: str, tmp_path: Path) -> None:
    settings, target = MULTIMODAL[family]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family](**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + float("norm" in name))
    dense, out = tmp_path / "dense", tmp_path / "moe"
    model.save_pretrained(dense)
    if family in FLAT:  # as they are published: the text model's settings at the top
        config = json.loads((dense / "config.json").read_text())
        text = config.pop("text_config")
        text.pop("model_type")
        (dense / "config.json").write_text(json.dumps(text | config))
    assert json.loads(tiny.in_process("inspect", dense, "--json")[1])["hidden_size"] == TEXT["hidden_size"]
    command = ("upcycle", dense, out, "--method", "copy", "--num-experts", 4, "--verify", "full")
    code, said, err = tiny.in_process(*command, "--json")
    assert code == 0, err
    assert (json.loads(said)["target"], json.loads(said)["text_model_of"]) == (target, family)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert not any("vis" in name for name in file.keys())  # noqa: SIM118 (it is no dict)
    tokens = torch.randint(1, 250, (3, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = AutoModelForImageTextToText.from_pretrained(dense).eval()(input_ids=tokens).logits
        found = AutoModelForCausalLM.from_pretrained(out, experts_implementation="eager").eval()(tokens).logits
    assert close(found, wanted)
    code, said, _ = tiny.in_process(*command[:2], tmp_path / "other", "--plan")
    assert f"the text model of a {family}" in " ".join(said.split())


def test_a_multimodal_model_whose_text_model_fits_nothing_is_named(tmp_path: Path) -> None:
    dense = tiny.save_llama(tmp_path / "dense")
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    (dense / "config.json").write_text(json.dumps(config))
    code, _, err = tiny.in_process("upcycle", dense, tmp_path / "moe")
    assert code == 1
    assert "'gemma3_text' (the text model in a gemma3)" in err


def test_a_base_model_without_head(tmp_path: Path) -> None:
    """Tied, its embedding is the head; untied, the head is lost."""
    for tied in (True, False):
        dense = tiny.save_llama(tmp_path / f"dense-{tied}", tie_word_embeddings=tied)
        base = tmp_path / f"base-{tied}"
        AutoModelForCausalLM.from_pretrained(dense).model.save_pretrained(base)
        code, _, err = tiny.in_process("upcycle", base, tmp_path / f"moe-{tied}", "--method", "copy")
        assert code == (0 if tied else 1), err
        if tied:
            assert close(logits(tmp_path / "moe-True"), logits(dense))
        else:
            assert "has no output head (lm_head.weight)" in err


def test_sizes_that_a_text_config_leaves_out_are_those_of_transformers() -> None:
    for family, sizes in LEFT_OUT.items():
        assert {key: getattr(CONFIG_MAPPING[family](), key) for key in sizes} == sizes


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# family, what is put into its saved config.json
READ_AS_TRANSFORMERS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_scaling": YARN}),  # beside rope_parameters, which transformers then ignores
    ("qwen3", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("granitemoehybrid", {"time_step_limit": [0.0, 0.1]}),
    ("phi3", {"layer_types": ["full_attention", "full_attention"]}),
    ("cwm", {"rope_parameters": None, "rope_theta": None}),
    ("olmo2", {"attention_dropout": 0}),
    ("cohere2", {"attention_dropout": 0}),
]


@pytest.mark.parametrize(("family", "settings"), READ_AS_TRANSFORMERS)
def test_config_json_is_read_as_transformers_reads_it(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    dense, out = tiny.save_dense(family, tmp_path / "dense"), tmp_path / "moe"
    config = json.loads((dense / "config.json").read_text()) | settings
    (dense / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    code, _, err = tiny.in_process("upcycle", dense, out, "--method", "copy", "--num-experts", 4, "--verify", "full")
    assert code == 0, err
    assert close(logits(out), logits(dense))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1.0}},
            "rope_type is 'nonsense', expected",
        ),
        ("llama", {"rope_parameters": {"rope_type": {"a": 1}}}, "rope_type is \"{'a': 1}\", expected one of default"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "position setting factor is 'None', not a number"),
        (
            "phi3",
            {"rope_parameters": {"partial_rotary_factor": 7}},
            "partial_rotary_factor is '7', expected a fraction up to 1",
        ),
        ("llama", {"hidden_act": "SiLU"}, "hidden_act 'SiLU' is unknown to transformers, did you mean 'silu'?"),
        ("llama", {"eos_token_id": "</s>"}, "eos_token_id is '</s>', expected a token id"),
        ("llama", {"use_cache": "yes"}, "use_cache is 'yes', expected true or false"),
        ("granitemoehybrid", {"time_step_limit": 3}, "time_step_limit is '3', expected two numbers"),
    ],
)
def test_what_transformers_could_not_load_is_refused(
    family: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    dense = tiny.save_dense(family, tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text()) | settings
    (dense / "config.json").write_text(json.dumps(config))
    code, _, err = tiny.in_process("upcycle", dense, tmp_path / "moe")
    assert code == 1
    assert message in err


@pytest.mark.parametrize("headless", [True, False])
def test_a_multimodal_model_that_does_not_say_whether_it_is_tied(headless: bool, tmp_path: Path) -> None:
    """Then what decides is whether there is a head."""
    settings = MULTIMODAL["llava"][0]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING["llava"](**settings))
    dense, out, name = tmp_path / "dense", tmp_path / "moe", "language_model.lm_head.weight"
    model.save_pretrained(dense)
    config = json.loads((dense / "config.json").read_text())
    for where in (config, config["text_config"]):
        where.pop("tie_word_embeddings", None)
    (dense / "config.json").write_text(json.dumps(config))
    tensors = load_file(dense / "model.safetensors")
    head = tensors.pop(name)
    save_file(tensors if headless else tensors | {name: head}, dense / "model.safetensors", metadata={"format": "pt"})
    code, _, err = tiny.in_process("upcycle", dense, out, "--num-experts", 4)
    assert code == 0, err
    written = load_file(out / "model.safetensors")
    assert ("lm_head.weight" not in written) if headless else written["lm_head.weight"].equal(head)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is headless
