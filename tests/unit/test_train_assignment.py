"""Who writes what of a step folder, and how a model becomes its family's stock checkpoint part by part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter

from moetool.checkpoint.header import read_header
from moetool.checkpoint.model import load_model
from moetool.cost.parameters import is_selection_bias
from moetool.train import assignment
from moetool.train.assignment import Held, Part, assign, balanced, givers, spread
from moetool.train.export import Layout, lay_out, save_beside
from moetool.train.saving import Saver
from moetool.train.shards import Region, boxes, everything, extent, num_elements
from tests import tiny
from tests.integration.test_routing_families import FAMILIES, SMALL


def split(size: int, parts: int, part: int) -> tuple[tuple[int, int], ...]:
    """The part of a dimension that torch's Shard gives: the first ones are larger."""
    rows = -(-size // parts)
    start, stop = min(size, part * rows), min(size, (part + 1) * rows)
    return ((start, stop),) if stop > start else ()


@st.composite
def held_tensors(draw: st.DrawFn) -> tuple[int, dict[str, Held]]:
    """Tensors that some processes hold: whole, or sharded along a dimension, over all of them or in two replicas."""
    size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    tensors: dict[str, Held] = {}
    for i in range(draw(st.integers(1, 12))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        parts = draw(st.sampled_from([n for n in (1, 2, size) if size % n == 0]))
        dim = draw(st.integers(0, max(0, len(shape) - 1)))
        regions: list[Region] = []
        for rank in range(size):
            region = list(everything(shape))
            if shape and parts > 1:
                region[dim] = split(shape[dim], parts, rank % parts)
            regions.append(tuple(region))
        tensors[f"t{i}"] = Held(draw(st.sampled_from([torch.float32, torch.bfloat16])), shape, tuple(regions))
    return size, tensors


def contents(whole: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    for name, tensor in whole.items():
        yield "model", f"{name}.weight", tensor
        yield "optimizer", f"{name}/exp_avg", tensor.float()


@given(held_tensors())
def test_every_tensor_is_written_once_from_each_element_once(drawn: tuple[int, dict[str, Held]]) -> None:
    size, held = drawn
    plan = assign(held, [(name,) for name in held], contents, size)
    parts = [part for parts in plan.rounds for part in parts]
    assert sorted(name for part in parts for name in part.names) == sorted(held)
    for round_ in plan.rounds:
        assert len({part.writer for part in round_}) == len(round_)
    writer_of = {name: part.writer for part in parts for name in part.names}
    for name, tensor in held.items():
        covered = torch.zeros(tensor.shape, dtype=torch.int64)
        for rank, region in plan.sources[name].items():
            assert region == tensor.regions[rank]
            for there, _ in boxes(region):
                covered[there] += 1
        assert bool((covered == 1).all())
        if num_elements(tensor.regions[writer_of[name]]):
            assert writer_of[name] in plan.sources[name]  # nobody sends what the writer has
    entries = [(file.kind, name) for file in plan.files for name in file.entries]
    assert len(entries) == len(set(entries)) == 2 * len(held)
    for file in plan.files:
        for name in file.entries:
            assert writer_of[name.partition("/")[0].partition(".")[0]] == file.writer
    if size == 1:
        assert {file.path for file in plan.files} == {"model.safetensors", "training_state/optimizer.safetensors"}
        assert plan.sent(0) == 0


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 9))
def test_work_is_shared_evenly(sizes: list[int], size: int) -> None:
    chosen = balanced(sizes, size)
    loads = [sum(work for work, rank in zip(sizes, chosen, strict=True) if rank == r) for r in range(size)]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes, default=0)
    assert chosen == balanced(sizes, size)


def test_the_files_of_a_process_grow_at_the_same_time() -> None:
    weights = [Part((name,), 0, frozenset({"model", "master"})) for name in "ab"]
    moments = [Part((f"{name}/{key}",), 0, frozenset({"optimizer"})) for name in "ab" for key in ("m", "v")]
    order = [part.names[0] for part in spread([weights, moments])]
    assert order == ["a/m", "a", "a/v", "b/m", "b", "b/v"]


@given(st.data())
def test_the_boxes_of_a_region_are_its_elements(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 8), max_size=3)))
    positions = [data.draw(st.lists(st.integers(0, n - 1), unique=True)) if n else [] for n in shape]
    region = tuple(tuple((p, p + 1) for p in chosen) for chosen in positions)  # runs of one, in any order
    true = torch.arange(math.prod(shape)).reshape(shape)
    expected = true
    for dim, chosen in enumerate(positions):
        expected = expected.index_select(dim, torch.tensor(chosen, dtype=torch.int64))
    held = torch.full(extent(region), -1)
    for there, here in boxes(region):
        held[here] = true[there]
    assert torch.equal(held, expected)
    assert num_elements(region) == expected.numel()


def test_a_tensor_of_which_a_piece_is_nowhere_is_refused() -> None:
    half = (((0, 1),), ((0, 3),))
    with pytest.raises(ValueError, match="hold 3 of 6 elements of w"):
        givers("w", Held(torch.float32, (2, 3), (half, half)), 0, 0)


def written(layout: Layout, tensors: Mapping[str, Tensor], folder: Path) -> None:
    with Saver(need=1) as saver:
        saver.save(tensors, layout.units, lambda whole: layout.contents(whole, 1), lambda put: put(folder))
        saver.wait()


def assert_as_transformers_saves(model: Any, folder: Path) -> None:
    layout = lay_out(model, "bfloat16")
    written(layout, model.state_dict() | dict(model.named_parameters()), folder / "ours")
    parameters = {id(parameter) for parameter in model.parameters()}
    cast: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        exact = id(tensor) not in parameters or is_selection_bias(name)
        cast.setdefault(id(tensor), tensor.detach() if exact else tensor.detach().bfloat16())
    state = {name: cast[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()}
    model.save_pretrained(folder / "theirs", state_dict=state, max_shard_size=assignment.MAX_MODEL_FILE)
    theirs = sorted(path.name for path in (folder / "theirs").glob("*.safetensors"))
    assert sorted(path.name for path in (folder / "ours").glob("*.safetensors")) == theirs
    for name in theirs:
        assert (folder / "ours" / name).read_bytes() == (folder / "theirs" / name).read_bytes(), name


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_oss"])
def test_each_parameter_of_an_moe_converts_by_itself(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, **(SMALL | FAMILIES[family][0]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert {len(unit) for unit in lay_out(model, "bfloat16").units} == {1}
    assert_as_transformers_saves(model, tmp_path)


@pytest.mark.parametrize(
    "family", ["qwen3", "phi3", "cohere2"]
)  # tied weights, fused matrices, tied and without biases
def test_a_dense_model_is_written_as_transformers_does(family: str, tmp_path: Path) -> None:
    assert_as_transformers_saves(load_model(tiny.save_dense(family, tmp_path / "model"), "float32"), tmp_path)


def test_parameters_that_lie_in_one_tensor_on_disk_are_one_unit(llama: Path, tmp_path: Path) -> None:
    model = load_model(llama, "float32")
    gate_up = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    model._weight_conversions = [WeightConverter("mlp.gate_up_proj.weight", gate_up, [Chunk(dim=0)])]
    together = [unit for unit in lay_out(model, "bfloat16").units if len(unit) > 1]
    assert together == [tuple(f"model.layers.{i}.{name}" for name in gate_up) for i in (0, 1)]
    assert_as_transformers_saves(model, tmp_path)


def test_a_model_in_several_files_has_the_index_of_transformers(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assignment, "MAX_MODEL_FILE", "20KB")
    model = load_model(llama, "float32")
    assert_as_transformers_saves(model, tmp_path)
    save_beside(lay_out(model, "bfloat16"), tmp_path / "ours", llama, {"command": "cpt"})
    index = "model.safetensors.index.json"
    assert (tmp_path / "ours" / index).read_bytes() == (tmp_path / "theirs" / index).read_bytes()
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2


def test_no_file_of_a_model_is_larger_than_it_may_be(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers' own files are: it counts the experts of a layer as one of them.
    monkeypatch.setattr(assignment, "MAX_MODEL_FILE", "20KB")
    model = load_model(mixtral, "float32")
    layout = lay_out(model, "float32")
    written(layout, dict(model.named_parameters()), tmp_path)
    save_beside(layout, tmp_path, mixtral, {"command": "cpt"})
    headers = [read_header(path) for path in tmp_path.glob("model-*.safetensors")]
    assert len(headers) > 4
    assert all(len(tensors) == 1 or sum(t.size for t in tensors.values()) <= 20_000 for tensors, _ in headers)
    again = load_model(tmp_path)
    assert all(torch.equal(parameter, again.get_parameter(name)) for name, parameter in model.named_parameters())
