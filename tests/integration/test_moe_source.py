"""A Mixture of Experts as a source: its matrices by name, in both layouts, against the loaded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moetool import registry
from moetool.arch.moe_source import MoESource, moe_source
from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.reader import CheckpointReader
from moetool.errors import CheckpointError
from moetool.recipe import PROJECTIONS
from moetool.routing.drift import read_block
from tests import tiny

SPECS = {name: registry.load("target", name) for name in registry.names("target")}
WITHOUT: dict[str, dict[str, Any]] = {"granitemoehybrid": {"use_sliding_window": False}}


@pytest.fixture(scope="module", params=SPECS)
def layouts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """The published layout, that of transformers 5's modules, and the model."""
    target, folder = request.param, tmp_path_factory.mktemp("source")
    dense = tiny.save_dense(SPECS[target].dense[0], folder / "dense", **WITHOUT.get(target, {}))
    code, _, err = tiny.in_process("upcycle", dense, folder / "moe", "--target", target, "--num-experts", 4, "--quiet")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(folder / "moe")
    model.save_pretrained(folder / "modules", save_original_format=False)
    return folder / "moe", folder / "modules", model


def read(source: MoESource, info: TensorInfo) -> torch.Tensor:
    return read_block(source.reader, info, 0, info.num_elements).reshape(info.shape)


def test_both_layouts_hold_what_the_model_has(layouts: tuple[Path, Path, Any]) -> None:
    *folders, model = layouts
    modules = dict(model.named_parameters()) | dict(model.named_buffers())
    for folder in folders:
        with CheckpointReader(folder) as reader:
            source = moe_source(reader)
            assert source is not None
            assert (source.layers, source.num_experts, source.top_k) == ((0, 1), 4, 2)
            assert source.num_routed == 2 * 4 * 3 * 32 * 64
            names = source.spec.in_memory
            for layer in source.layers:
                router = modules[names.router.format(layer=layer)]
                assert torch.equal(read(source, source.router(layer)), router.double())
                bias = source.selection_bias(layer)
                assert (bias is None) == (names.selection_bias is None)
                if bias and names.selection_bias:
                    held = modules[names.selection_bias.format(layer=layer)]
                    assert torch.equal(read(source, bias), held.double())
                both = modules[names.experts["gate"].format(layer=layer)].double()
                down = modules[names.experts["down"].format(layer=layer)].double()
                for expert in range(4):
                    gate, up = both[expert].chunk(2)
                    for projection, matrix in zip(PROJECTIONS, (gate, up, down[expert]), strict=True):
                        assert torch.equal(read(source, source.expert(layer, expert, projection)), matrix)
                assert {source.shared(layer, p) is not None for p in PROJECTIONS} == {bool(_shared(source, layer))}
                for projection, matrix in _shared(source, layer).items():
                    info = source.shared(layer, projection)
                    assert info is not None
                    assert torch.equal(read(source, info), matrix)


def _shared(source: MoESource, layer: int) -> dict[str, torch.Tensor]:
    """The shared expert's matrices as whole tensors have them, gate above up where they share one."""
    spec = source.spec.shared
    if spec is None or spec.tensors["gate"].format(layer=layer) not in source.tensors:
        return {}
    whole = {p: read(source, source.tensors[spec.tensors[p].format(layer=layer)]) for p in PROJECTIONS}
    if spec.tensors["gate"] == spec.tensors["up"]:
        whole["gate"], whole["up"] = whole["gate"].chunk(2)
    return whole


def test_similarity_is_the_same_in_both_layouts(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    assert tiny.in_process("upcycle", llama, tmp_path / "moe", "--num-experts", 4)[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    model.save_pretrained(tmp_path / "modules", save_original_format=False)
    for name in ("moetool.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "modules" / name).write_bytes((tmp_path / "moe" / name).read_bytes())
    reports = []
    for name in ("moe", "modules"):
        command = ("analyze-routing", tmp_path / name, "--data", f"a={jsonl}", "--out", tmp_path / "report", "--json")
        code, out, err = tiny.in_process(*command)
        assert code == 0, err
        reports.append(json.loads(out)["upcycling"])
    assert reports[0] == reports[1]
    assert reports[0]["layers"]


def test_the_keys_of_a_published_config_are_read(tmp_path: Path) -> None:
    """A Qwen3-MoE has `num_experts`; transformers 5 writes `num_local_experts`."""
    dense = tiny.save_dense("qwen3", tmp_path / "dense")
    assert tiny.in_process("upcycle", dense, tmp_path / "moe", "--num-experts", 4, "--target", "qwen3_moe")[0] == 0
    path = tmp_path / "moe" / "config.json"
    config = json.loads(path.read_text())
    del config["num_local_experts"]
    path.write_text(json.dumps(config))
    code, out, err = tiny.in_process("inspect", tmp_path / "moe", "--json")
    assert code == 0, err
    assert json.loads(out)["num_experts"] == 4


def test_experts_of_another_shape_are_refused(mixtral: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(mixtral).save_pretrained(tmp_path, save_original_format=False)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_local_experts": 8}))
    with CheckpointReader(tmp_path) as reader:
        source = moe_source(reader)
        assert source is not None
        with pytest.raises(CheckpointError, match=r"layer 1: the files do not hold 1\.mlp\.experts\.down_proj"):
            source.expert(1, 3, "down")
