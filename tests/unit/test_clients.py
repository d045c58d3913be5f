"""Where checkpoints run: the knowledge on the specs, against what was measured (docs/clients.md)."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from moetool import registry
from moetool.arch.clients import CLIENTS, obstacles
from tests import tiny
from tests.clients import page

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_theta": 10000.0, "original_max_position_embeddings": 32}
T4, V, L, M = CLIENTS
ALL = set(CLIENTS)
# dense family, its changes, options -> the clients in which it was measured to be exact.
MEASURED: list[tuple[str, dict[str, Any], str, set[str]]] = [
    ("llama", {"head_dim": 8}, "--target mixtral", ALL),
    ("llama", {"head_dim": 16, "rope_parameters": LLAMA3}, "--target mixtral", {T4, V, L}),
    ("llama", {"head_dim": 16}, "--target mixtral --granularity 2 --top-k 4", {T4, V, L}),
    ("llama", {"head_dim": 8}, "--target qwen2_moe", {T4, V}),
    ("llama", {"head_dim": 8}, "--target granitemoe", ALL),
    ("llama", {"head_dim": 8, "rope_parameters": LLAMA3}, "--target granitemoe", {T4, V, M}),
    ("llama", {"rope_parameters": LLAMA3}, "--target glm4_moe", {T4, V}),
    ("llama", {}, "--target solar_open", {V}),
    ("llama", {}, "--target glm4_moe --shared-experts 0", {T4}),
    ("llama", {"hidden_act": "gelu"}, "--target mixtral", {T4}),
    ("mistral", {}, "--target mixtral", {T4, V}),
    ("mistral", {"sliding_window": None}, "--target mixtral", ALL),
    ("qwen3", {}, "--target qwen3_moe", ALL),
    ("qwen3", {"attention_bias": True}, "--target qwen3_moe", {T4}),
    ("qwen3", {"rope_parameters": LLAMA3}, "--target qwen3_moe", {T4, V}),
    ("qwen2", {}, "--target qwen2_moe", set()),  # a window in some layers
    ("qwen2", {"use_sliding_window": False}, "--target qwen2_moe", {T4, V}),
    ("qwen3", {}, "--target qwen3_moe --moe-layers every:2", {T4, V, M}),
    ("qwen3", {}, "--target glm4_moe", {T4, V, M}),
    ("qwen3", {}, "--target dots1", {T4, V, M}),
    ("qwen3", {"num_key_value_heads": 4, "tie_word_embeddings": False}, "--target dots1", ALL),
    ("olmo2", {}, "--target flex_olmo", {T4, V}),
    ("granite", {"attention_bias": False}, "--target granitemoe", ALL),
    ("ernie4_5", {}, "--target ernie4_5_moe", {T4, V, M}),
    ("cohere2", {"sliding_window": None, "layer_types": ["full_attention"] * 2}, "--target cohere2_moe", {V}),
    ("cohere2", {"sliding_window": 128}, "--target cohere2_moe", {V, L}),
    ("cohere2", {"sliding_window": 128, "tie_word_embeddings": False}, "--target cohere2_moe", {L}),
    ("hunyuan_v1_dense", {}, "--target hunyuan_v1_moe", {T4, V}),
    ("smollm3", {}, "--target granitemoe_swa", {V}),
    ("granite_swa", {}, "--target granitemoe_swa", {V}),
    ("granite_swa", {"layer_rope_theta": [10000.0] * 2}, "--target granitemoe_swa", {V, L}),
    ("lfm2", {}, "--target lfm2_moe", {L, M}),
    ("lfm2", {"tie_word_embeddings": False}, "--target lfm2_moe", set()),
]


def test_limits_name_clients() -> None:
    for name in registry.names("target"):
        assert {limit.client for limit in registry.load("target", name).limits} <= ALL


@pytest.mark.parametrize(("family", "changes", "options", "exact"), MEASURED)
def test_the_plan_says_where_it_runs_as_measured(
    family: str, changes: dict[str, Any], options: str, exact: set[str], tmp_path: Path
) -> None:
    dense = tiny.save_dense(family, tmp_path / "dense", **changes)
    code, out, err = tiny.in_process(
        "upcycle", dense, tmp_path / "moe", "--num-experts", 4, "--plan", "--json", *options.split()
    )
    assert code == 0, err
    clients = json.loads(out)["clients"]
    assert {client for client, reason in clients.items() if reason is None} == exact


def test_what_is_beside_the_weights_matters() -> None:
    ernie = {"model_type": "ernie4_5_moe", "moe_num_shared_experts": 0, "num_hidden_layers": 2}
    assert obstacles(ernie)[L] == "its converter needs tokenizer.model"
    assert obstacles(ernie, {"tokenizer.model"})[L] is None
    glm = {"model_type": "glm4_moe", "n_shared_experts": 1}
    assert obstacles(glm, {"[gMASK]"})[L] is None
    with pytest.raises(LookupError):
        obstacles({"model_type": "never"})


@pytest.mark.parametrize("name", registry.names("target"))
def test_nonsense_in_a_config_is_no_bug(name: str) -> None:
    keys = {*page.load()["llama-mixtral-plain"]["config"], "layer_types", "mlp_layer_types"}
    keys |= {"num_key_value_heads", "moe_layer_interval", "moe_num_shared_experts", "moe_intermediate_size"}
    spec = registry.load("target", name)
    nonsense: tuple[Any, ...] = (None, "x", [], {}, -1, 0, [1, "a"])
    for key, value in product(keys, nonsense):
        assert set(obstacles({key: value, "model_type": spec.model_type})) == ALL


def test_auto_takes_a_family_that_runs_in_all_that_are_asked_for(tmp_path: Path) -> None:
    dense = tiny.save_dense("llama", tmp_path / "llama", head_dim=8, hidden_act="silu")
    command = ("upcycle", dense, tmp_path / "moe", "--plan", "--json", "--for", "llama.cpp")
    assert json.loads(tiny.in_process(*command)[1])["target"] == "mixtral"
    code, _, err = tiny.in_process(*command, "--target", "qwen2_moe")
    assert code == 1
    assert "--for llama.cpp: qwen2_moe with these options does not run in llama.cpp" in err
    assert "use --target mixtral" in err


def test_auto_goes_on_to_a_later_family(tmp_path: Path) -> None:
    """Qwen3 with some dense layers does not run in llama.cpp as qwen3_moe, and nothing else takes it."""
    dense = tiny.save_dense("qwen3", tmp_path / "qwen3", num_hidden_layers=4)
    command = ("upcycle", dense, tmp_path / "moe", "--plan", "--json", "--moe-layers", "every:2")
    assert tiny.in_process(*command, "--for", "vllm")[0] == 0
    code, _, err = tiny.in_process(*command, "--for", "llama.cpp")
    assert code == 1
    assert "use --target qwen3_moe and leave out --moe-layers" in err
    # Of the families for a Qwen3, dots1 alone has windows by layer.
    mixed = tiny.save_dense("qwen3", tmp_path / "mixed", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert json.loads(tiny.in_process("upcycle", mixed, tmp_path / "m", "--plan", "--json")[1])["target"] == "dots1"


def test_a_client_that_is_none_is_refused(tmp_path: Path) -> None:
    code, _, err = tiny.in_process("upcycle", tmp_path, tmp_path / "moe", "--for", "vlm")
    assert code == 2
    assert "did you mean 'vllm'?" in err


def test_for_is_recorded_and_read_again(llama: Path, tmp_path: Path) -> None:
    assert tiny.in_process("upcycle", llama, tmp_path / "a", "--for", "vllm", "--for", "llama.cpp")[0] == 0
    yaml = tmp_path / "a" / "moetool.yaml"
    assert "for:\n- vllm\n- llama.cpp\n" in yaml.read_text()
    code, _, err = tiny.in_process("upcycle", "--config", yaml, llama, tmp_path / "b", "--target", "qwen2_moe")
    assert code == 1
    assert "--for llama.cpp" in err


def test_inspect_says_where_a_checkpoint_runs(mixtral: Path, llama: Path) -> None:
    assert json.loads(tiny.in_process("inspect", mixtral, "--json")[1])["clients"] == dict.fromkeys(CLIENTS)
    assert "clients" not in json.loads(tiny.in_process("inspect", llama, "--json")[1])


def test_biases_that_other_readers_always_have_are_zeros(tmp_path: Path) -> None:
    dense = tiny.save_dense("llama", tmp_path / "dense", head_dim=8)
    assert tiny.in_process("upcycle", dense, tmp_path / "moe", "--target", "qwen2_moe", "--verify", "full")[0] == 0
    written = load_file(tmp_path / "moe" / "model.safetensors")
    biases = [name for name in written if name.endswith("_proj.bias")]
    assert len(biases) == 3 * 2  # queries, keys and values of two layers
    assert not any(written[name].any() for name in biases)
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["qkv_bias"] is True


def test_a_tied_head_is_written_out_where_other_readers_never_tie(tmp_path: Path) -> None:
    dense = tiny.save_dense("qwen3", tmp_path / "dense")
    command = ("upcycle", dense, tmp_path / "moe", "--target", "glm4_moe", "--verify", "full", "--json")
    code, out, err = tiny.in_process(*command)
    assert code == 0, err
    written = load_file(tmp_path / "moe" / "model.safetensors")
    assert written["lm_head.weight"].equal(written["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["tie_word_embeddings"] is False
    assert json.loads(out)["parameters"]["total"] == sum(tensor.numel() for tensor in written.values())
    assert json.loads(out)["parameters"]["dense"] == sum(
        tensor.numel() for tensor in load_file(dense / "model.safetensors").values()
    )


@pytest.mark.parametrize("target", ["qwen2_moe", "granitemoe"])
def test_heads_of_another_size_are_refused_where_other_readers_have_no_head_dim(target: str, tmp_path: Path) -> None:
    dense = tiny.save_dense("llama", tmp_path / "dense", head_dim=16)
    code, _, err = tiny.in_process("upcycle", dense, tmp_path / "moe", "--target", target)
    assert code == 1
    assert "its heads have size 16, and only heads of size 32 / 4" in err
    assert "choose from mixtral, glm4_moe, solar_open" in err


def test_what_only_a_tokenizer_lacks_is_said(tmp_path: Path) -> None:
    dense = tiny.save_dense("ernie4_5", tmp_path / "dense")
    code, _, err = tiny.in_process("upcycle", dense, tmp_path / "moe", "--for", "llama.cpp")
    assert code == 1
    assert "--target ernie4_5_moe would if DENSE's tokenizer had tokenizer.model" in err


def test_a_head_of_its_own_counts_as_one_whatever_config_json_says(tmp_path: Path) -> None:
    """vLLM always ties a Cohere2 MoE, and would compute another model without a word."""
    dense = tiny.save_dense("cohere2", tmp_path / "dense", tie_word_embeddings=False, sliding_window=128)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    command = ("upcycle", dense, tmp_path / "moe", "--num-experts", 4)
    code, _, err = tiny.in_process(*command, "--for", "vllm")
    assert code == 1
    assert "because it always ties the output head to the embedding" in err
    assert json.loads(tiny.in_process(*command, "--json")[1])["clients"]["vllm"]
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["tie_word_embeddings"] is False
