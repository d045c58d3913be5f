"""`--stream`: one layer in memory at a time, and the same numbers as with the whole model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetool import registry
from moetool.calibration import hidden, measure, text_pass
from moetool.calibration.by_layer import LayeredModel
from moetool.calibration.experts import layers_with_experts
from moetool.calibration.options import CalibrationOptions
from moetool.calibration.store import cached
from moetool.calibration.sums import Calibration
from moetool.calibration.text_pass import calibrate, calibrate_dense, mean_losses
from moetool.checkpoint.model import load_model
from moetool.cost.memory import hidden_bytes, layer_bytes, weight_bytes
from moetool.data.make_tokens import tokenized
from moetool.data.text import TextSource
from moetool.data.tokens import TokenStream
from moetool.errors import CheckpointError
from moetool.prune.choose import choose
from moetool.routing.text_pass import Windows
from tests import tiny
from tests.integration.test_grow import upcycled

RUN = Windows(seq_len=16, batch_size=2, max_tokens=200)  # 13 windows in 7 batches, the last window filled up
SMALL = ("--seq-len", 16, "--batch-size", 2, "--max-tokens", 200)


def texts(folder: Path, tmp_path: Path) -> dict[str, TokenStream]:
    if not (folder / "tokenizer.json").exists():
        tiny.save_tokenizer(folder)
    other = tiny.save_jsonl(tmp_path / "other.jsonl", ["router token expert layer gate " * 10])
    paths = {"a": tiny.save_jsonl(tmp_path / "text.jsonl"), "b": other}
    return {name: tokenized(TextSource(str(path)), folder) for name, path in paths.items()}


def differing(one: Calibration, other: Calibration) -> list[str]:
    """The tensors that are not the same bit for bit."""
    a, b = one.to_tensors(), other.to_tensors()
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("family", registry.names("target"))
def test_every_family_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    folder = upcycled(family, tmp_path, "--num-experts", 8)
    data = texts(folder, tmp_path)
    whole, layered = load_model(folder).eval(), LayeredModel(folder)
    measured = [calibrate(model, data, RUN, moments=True) for model in (whole, layered)]
    assert not differing(*measured)
    assert float(measured[0].sums[0].tokens) == float(measured[0].inputs[0].tokens) > 250
    assert mean_losses(whole, data, RUN) == mean_losses(layered, data, RUN)
    choices = [choose(layers_with_experts(model), measured[0], "auto", 5) for model in (whole, layered)]
    assert choices[0] == choices[1]


@pytest.mark.parametrize("family", tiny.DENSE)
def test_every_dense_family_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    folder = tiny.save_dense(family, tmp_path / "dense")
    data = texts(folder, tmp_path)
    whole, layered = load_model(folder).eval(), LayeredModel(folder)
    measured = [calibrate_dense(model, data, RUN) for model in (whole, layered)]
    assert not differing(*measured)
    assert measured[0].units[1].square_F.shape == (64,)
    assert mean_losses(whole, data, RUN) == mean_losses(layered, data, RUN)


@pytest.mark.parametrize("save", [tiny.save_glm4_moe, tiny.save_mixtral])  # a dense layer first; bf16
def test_dense_layers_and_bf16(save: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "moe", dtype=torch.bfloat16)
    data = texts(folder, tmp_path)
    for dtype in ("auto", "float32"):
        whole, layered = load_model(folder, dtype).eval(), LayeredModel(folder, dtype)
        assert whole.dtype == layered.core.dtype == (torch.bfloat16 if dtype == "auto" else torch.float32)
        assert not differing(*(calibrate(model, data, RUN) for model in (whole, layered)))
        assert mean_losses(whole, data, RUN) == mean_losses(layered, data, RUN)


def test_a_fused_layout_and_several_shards(tmp_path: Path) -> None:
    folder = upcycled("qwen3_moe", tmp_path)
    for name, options in (("fused", ("--layout", "fused")), ("shards", ("--max-shard-size", "40KB"))):
        assert tiny.in_process("convert", folder, tmp_path / name, *options)[0] == 0
    data = texts(folder, tmp_path)
    found = [calibrate(LayeredModel(tmp_path / name), data, RUN) for name in ("moe", "fused", "shards")]
    assert not differing(found[0], found[1])
    assert not differing(found[0], found[2])


def in_memory(model: LayeredModel) -> Iterator[int]:
    """The layers that have weights."""
    return (n for n, one in enumerate(model.layers) if any(not p.is_meta for p in [*one.parameters(), *one.buffers()]))


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    folder = tiny.save_glm4_moe(tmp_path / "moe", num_hidden_layers=5)
    data, model = texts(folder, tmp_path), LayeredModel(folder)
    assert not list(in_memory(model))
    seen: list[tuple[int, ...]] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda *_: seen.append(tuple(in_memory(model))))
    calibration = calibrate(model, data, RUN)
    # In each of the 14 batches of both texts one layer is there, and a forward ends with it.
    assert seen == [(number,) for number in range(5) for _ in range(14) for _ in range(number + 1)]
    assert not list(in_memory(model))
    found = layers_with_experts(model)
    assert list(found) == [1, 2, 3, 4]
    for number in found:
        assert found[number].experts.gate_up_proj.device.type == "cpu"
        assert list(in_memory(model)) == [number]
    assert choose(found, calibration, "reap", 3).kept.keys() == {1, 2, 3, 4}
    model.free()
    assert not list(in_memory(model))


def test_large_hidden_states_are_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save_mixtral(tmp_path / "moe", dtype=torch.bfloat16)
    data = texts(folder, tmp_path)
    monkeypatch.setenv("MOETOOL_CACHE", str(tmp_path / "cache"))
    wanted = calibrate(LayeredModel(folder), data, RUN), mean_losses(LayeredModel(folder), data, RUN)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(hidden, "IN_MEMORY", 0)
    assert not differing(wanted[0], calibrate(LayeredModel(folder), data, RUN))
    assert wanted[1] == mean_losses(LayeredModel(folder), data, RUN)
    assert not list((tmp_path / "cache" / "calibration").iterdir())  # it has no name


def test_states_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETOOL_CACHE", str(tmp_path))
    monkeypatch.setattr(hidden, "IN_MEMORY", 0)
    drawn = [torch.randn(size).to(dtype) for size, dtype in (((2, 3), torch.float32), ((4, 1, 5), torch.bfloat16))]
    states = hidden.HiddenStates([tensor.nbytes for tensor in drawn])
    for _ in range(2):
        for index, tensor in enumerate(drawn):
            states[index] = tensor
            assert torch.equal(states[index], tensor)
            assert states[index].dtype == tensor.dtype
        drawn = [-tensor for tensor in drawn]


def command(*arguments: object) -> dict[str, Any]:
    document = tiny.result(*arguments, *SMALL)
    return {key: value for key, value in document.items() if key not in ("out", "seconds", "free_disk_bytes", "proof")}


@pytest.mark.parametrize("name", ["prune", "prune --merge ream", "densify"])
def test_the_command_gives_the_same_checkpoint(
    name: str, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = tiny.save_jsonl(tmp_path / "a.jsonl"), tiny.save_jsonl(tmp_path / "b.jsonl", ["expert layer " * 20])
    options = ("--keep-experts", 3, "--data", f"a={a}", "--data", f"b={b}", "--val", f"a={a}", "--val", f"b={b}")
    documents = []
    for out, more in (("whole", ()), ("layers", ("--stream",))):
        monkeypatch.setenv("MOETOOL_CACHE", str(tmp_path / f"cache-{out}"))
        command_name, *how = name.split()
        documents.append(command(command_name, mixtral, tmp_path / out, *how, *options, *more))
    assert documents[0] == documents[1]
    assert documents[0]["val"]["b"]["after"] != documents[0]["val"]["b"]["before"]
    shards = [load_file(tmp_path / out / "model.safetensors") for out in ("whole", "layers")]
    assert all(torch.equal(shards[0][tensor], shards[1][tensor]) for tensor in shards[0])


def test_what_is_kept_serves_both(mixtral: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETOOL_CACHE", str(tmp_path / "cache"))
    arguments = ("prune", mixtral, tmp_path / "out", "--keep-experts", 3, "--data", f"a={jsonl}", "--plan")
    first = command(*arguments, "--stream")
    monkeypatch.setattr(measure, "calibrate", None)
    assert command(*arguments) == first


def test_a_flipped_bit_of_what_is_kept_is_found(mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETOOL_CACHE", str(tmp_path / "cache"))
    made = calibrate(load_model(mixtral).eval(), texts(mixtral, tmp_path), RUN)
    cached(mixtral, {}, {}, lambda: made)
    (path,) = (tmp_path / "cache" / "calibration").glob("*.safetensors")
    whole = path.read_bytes()
    for place in (len(whole) - 1, len(whole) - 5000):  # in numbers: all else of the file still fits
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not differing(cached(mixtral, {}, {}, lambda: made), made)
        assert path.read_bytes()[-6000:] == whole[-6000:]


def test_kept_tensors_begin_where_new_ones_do(mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bits of a product depend on it; in a file tensors begin anywhere."""
    made = calibrate(load_model(mixtral).eval(), texts(mixtral, tmp_path), RUN)
    for padding in range(8):
        monkeypatch.setenv("MOETOOL_CACHE", str(tmp_path / str(padding)))
        found = [cached(mixtral, {}, {"": "x" * 8 * padding}, lambda: made) for _ in range(2)][1]
        assert not differing(found, made)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in found.to_tensors().values())


def test_the_estimate_is_that_of_a_layer(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    options = ("--keep-experts", 3, "--data", f"a={jsonl}", "--plan", "--stream")
    _, out, err = tiny.in_process("prune", mixtral, tmp_path / "out", *options, *SMALL)
    assert "for one layer, embeddings, head and hidden states on" in " ".join((out + err).split())
    # A layer of the Mixtral: 4 experts of three 64 x 32 matrices, q and o 32 x 32, k and v 16 x 32, router 4 x 32, two
    # norms; outside of layers embeddings and head of 300 x 32, and a norm.
    layer = 4 * 3 * 64 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 4 * 32 + 2 * 32
    outside = 2 * 300 * 32 + 32
    assert layer_bytes(mixtral) == 4 * outside + 4 * layer * 5 // 3
    assert weight_bytes(mixtral, "bfloat16") == 2 * (outside + 2 * layer)
    assert layer_bytes(mixtral, "bfloat16") == 2 * outside + 2 * layer * 5 // 3
    assert hidden_bytes(mixtral, "auto", 200) == 200 * 32 * 4 == 2 * hidden_bytes(mixtral, "float16", 200)


def test_what_is_wrong_is_told_as_without(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    options = ("--keep-experts", 3, "--data", f"a={jsonl}", *SMALL, "--stream")
    both = tiny.in_process("prune", mixtral, tmp_path / "out", *options, "--device-map", "auto")
    assert both[0] == 2
    assert "--stream and --device-map exclude each other" in " ".join(both[2].split())
    for number, (name, told) in enumerate(
        (
            ("model.layers.1.self_attn.q_proj.weight", "missing tensors model.layers.1.self_attn.q_proj.weight"),
            ("model.layers.0.block_sparse_moe.gate.weight", "layer"),  # told before: no router
            ("lm_head.weight", "missing tensors lm_head.weight"),
        )
    ):
        folder = tmp_path / f"damaged-{number}"
        shutil.copytree(mixtral, folder)
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        errors = [tiny.refusal("prune", folder, tmp_path / "out", *more) for more in (options, options[:-1])]
        assert errors[0] == errors[1]
        assert told in errors[0]


def test_a_tensor_too_many_or_of_another_shape_is_told(mixtral: Path, tmp_path: Path) -> None:
    for number, (name, tensor) in enumerate(
        (
            ("model.layers.7.self_attn.q_proj.weight", torch.zeros(32, 32)),
            ("model.layers.1.self_attn.q_proj.weight", torch.zeros(32, 16)),
            ("model.layers.1.block_sparse_moe.experts.4.w1.weight", torch.zeros(64, 32)),
        )
    ):
        folder = tmp_path / f"damaged-{number}"
        shutil.copytree(mixtral, folder)
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, name: tensor}, folder / "model.safetensors", metadata={"format": "pt"})
        told = []
        for load in (load_model, LayeredModel):
            with pytest.raises(CheckpointError) as error:
                load(folder)
            told.append(str(error.value))
        assert told[0] == told[1]


def test_a_family_whose_layers_give_more_is_refused(mixtral: Path, tmp_path: Path) -> None:
    data, model = texts(mixtral, tmp_path), LayeredModel(mixtral)
    forward = model._decode
    model.layers[0].forward = lambda *more, **named: forward(0, lambda *_, **__: (more[0], None), *more, **named)
    with pytest.raises(CheckpointError, match="a layer of MixtralForCausalLM returns more than hidden states"):
        calibrate(model, data, RUN)


def by_hand(folder: Path, received: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Sums of |h| and h^2 over tokens, one token at a time, from the files."""
    w = load_file(folder / "model.safetensors")
    gate, up = (w[f"model.layers.{layer}.mlp.{name}_proj.weight"].double() for name in ("gate", "up"))
    absolute_F, square_F = torch.zeros(2, len(gate), dtype=torch.float64)
    for x in received.double():
        z = gate @ x
        h = z / (1 + (-z).exp()) * (up @ x)
        absolute_F, square_F = absolute_F + h.abs(), square_F + h * h
    return absolute_F, square_F


def test_moments_and_units_of_a_dense_model_by_hand(llama: Path, tmp_path: Path) -> None:
    data = {"a": texts(llama, tmp_path)["a"]}
    # 3 windows of 16 tokens (the fourth would be held out), the last not full: 40 tokens.
    found = calibrate_dense(load_model(llama).eval(), data, Windows(16, 2, 40))
    for layer in (0, 1):
        received, sums, units = found.fitted[layer], found.inputs[layer], found.units[layer]
        assert float(sums.tokens) == len(received) == 40
        assert torch.allclose(sums.sum_D, received.double().sum(0), atol=1e-5)
        second = sum(torch.outer(x, x) for x in received.double())
        assert isinstance(second, Tensor)
        assert torch.allclose(sums.second_DD.double(), second, atol=1e-4)
        for one, hand in zip((units.absolute_F, units.square_F), by_hand(llama, received, layer), strict=True):
            assert torch.allclose(one, hand, rtol=1e-4)
    again = Calibration.from_tensors(found.to_tensors())
    assert not differing(found, again)
    assert not again.sums


def test_moments_add_up_over_texts_and_are_kept_apart(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETOOL_CACHE", str(tmp_path / "cache"))
    data, model = texts(llama, tmp_path), load_model(llama).eval()
    options = replace(RUN, max_tokens=48)  # nothing is held out
    both, *apart = (
        calibrate_dense(model, those, options) for those in (data, *({name: one} for name, one in data.items()))
    )
    for layer in (0, 1):
        for name in ("inputs", "units"):
            added = getattr(apart[0], name)[layer] + getattr(apart[1], name)[layer]
            for field, value in vars(getattr(both, name)[layer]).items():
                assert torch.allclose(value, getattr(added, field), rtol=1e-5, atol=1e-5)
    run = CalibrationOptions(data={"a": "unused"}, seq_len=16, max_tokens=48)
    kept = measure.calibration_of(model, llama, data, run, lambda *_: None, moments=True)
    monkeypatch.setattr(text_pass, "_run", None)
    assert not differing(kept, measure.calibration_of(model, llama, data, run, lambda *_: None, moments=True))
    with pytest.raises(CheckpointError, match="is a dense model without a router"):
        measure.calibration_of(model, llama, data, run, lambda *_: None)


def test_experts_have_moments_only_if_asked(mixtral: Path, tmp_path: Path) -> None:
    data, model = {"a": texts(mixtral, tmp_path)["a"]}, load_model(mixtral).eval()
    options = replace(RUN, max_tokens=48)
    assert not calibrate(model, data, options).inputs
    found = calibrate(model, data, options, moments=True)
    assert torch.allclose(found.inputs[1].second_DD, found.fitted[1].T @ found.fitted[1], atol=1e-4)
    assert not found.units
