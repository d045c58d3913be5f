"""`--plan` of a hub model reads configuration and headers only; told by a small hub of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.hub import served


@pytest.mark.parametrize("shards", [1, 3])
def test_a_plan_of_a_hub_model_reads_no_weights(shards: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    dense = tiny.save_llama(
        tmp_path / "hub" / "them" / "dense", hidden_size=128, intermediate_size=512, vocab_size=3000
    )
    if shards > 1:
        (dense / "model.safetensors").rename(tmp_path / "away.safetensors")
        (dense / "config.json").read_text()
        (tmp_path / "whole").mkdir()
        (tmp_path / "away.safetensors").rename(tmp_path / "whole" / "model.safetensors")
        (tmp_path / "whole" / "config.json").write_text((dense / "config.json").read_text())
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
        model.save_pretrained(dense, max_shard_size="2MB")
        assert len(list(dense.glob("*.safetensors"))) >= shards
    weights = sum(p.stat().st_size for p in dense.glob("*.safetensors"))
    with served(tmp_path / "hub", tmp_path / "cache") as (env, asked):
        told = tiny.cli("upcycle", "them/dense", tmp_path / "moe", "--granularity", 2, "--plan", "--json", env=env)
    assert told.returncode == 0, told.stderr
    local = tiny.cli("upcycle", dense, tmp_path / "moe", "--granularity", 2, "--plan", "--json")
    remote_plan, local_plan = json.loads(told.stdout), json.loads(local.stdout)
    for key in ("parameters", "num_bytes", "num_shards", "recipe", "flops_per_token", "target"):
        assert remote_plan[key] == local_plan[key]
    # The client asks for the first 100 kB of each file, in which the headers lie.
    read = sum(size for name, size in asked if name.endswith(".safetensors"))
    assert 0 < read <= 100_001 * len(list(dense.glob("*.safetensors")))
    assert read < weights / 4
    assert not (tmp_path / "moe").exists()


def test_a_hub_model_without_safetensors_or_that_is_not_there(tmp_path: Path) -> None:
    dense = tiny.save_llama(tmp_path / "hub" / "them" / "dense")
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    with served(tmp_path / "hub", tmp_path / "cache") as (env, _):
        told = tiny.cli("upcycle", "them/dense", tmp_path / "moe", "--plan", env=env)
        assert told.returncode == 1
        assert "holds no safetensors on the hub" in told.stderr
        told = tiny.cli("upcycle", "them/other", tmp_path / "moe", "--plan", env=env)
    assert told.returncode == 1
    assert "the hub did not provide it" in told.stderr
    assert len(told.stderr.strip().splitlines()) == 1


def test_only_what_is_needed_is_fetched_and_a_plan_needs_no_network_afterwards(tmp_path: Path) -> None:
    dense = tiny.save_llama(tmp_path / "hub" / "them" / "dense")
    (dense / "fp8").mkdir()
    for name in ("consolidated.safetensors", "consolidated.00.pth", "fp8/model.safetensors", "fp8/config.json"):
        (dense / name).write_bytes((dense / "model.safetensors").read_bytes())
    (dense / "LICENSE").write_text("Do as you like.")
    with served(tmp_path / "hub", tmp_path / "cache") as (env, asked):
        made = tiny.cli("upcycle", "them/dense", tmp_path / "moe", env=env)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "moe" / "LICENSE").read_text() == "Do as you like."
    fetched = {name.partition("/them/dense/")[2] for name, size in asked if size}
    assert "model.safetensors" in fetched
    assert not [name for name in fetched if name.startswith(("consolidated", "fp8"))]
    offline = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    told = tiny.cli("upcycle", "them/dense", tmp_path / "other", "--plan", "--json", env=offline)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["target"] == "mixtral"
