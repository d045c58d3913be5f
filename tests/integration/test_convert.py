"""`moetool convert`: the same model in another form, proven, resumed, and read by `upcycle`."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from moetool import registry
from moetool.arch.forms import FLAT
from moetool.checkpoint.model import load_model
from moetool.checkpoint.reader import CheckpointReader
from moetool.routing.origin import read_origin
from tests import tiny
from tests.integration.test_upcycle_forms import MULTIMODAL

SOURCE_OF = {  # target family -> a dense one that fits it
    "mixtral": "llama", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3", "flex_olmo": "olmo2", "granitemoe": "granite",
    "qwen3_5_moe_text": "qwen3_5_text", "granitemoehybrid": "granitemoehybrid", "granitemoe_swa": "granite_swa",
    "ernie4_5_moe": "ernie4_5", "cohere2_moe": "cohere2", "lfm2_moe": "lfm2", "hunyuan_v1_moe": "hunyuan_v1_dense",
    "glm4_moe": "llama", "dots1": "qwen3", "solar_open": "llama",
}  # fmt: skip


def convert(*arguments: object) -> dict[str, Any]:
    return tiny.result("convert", *arguments)


def fails(*arguments: object) -> str:
    return tiny.refusal("convert", *arguments)


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return load_model(folder).eval()(torch.arange(1, 25)[None]).logits  # type: ignore[no-any-return]


def test_a_copy_has_the_same_tensors_in_other_files(llama: Path, tmp_path: Path) -> None:
    document = convert(llama, tmp_path / "a", "--max-shard-size", "40KB", "--workers", 3)
    assert document["num_shards"] > 3
    assert same(weights(tmp_path / "a"), weights(llama))
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    for command in ("verify", "inspect"):
        code, out, err = tiny.in_process(command, tmp_path / "a")
        assert code == 0, err
    assert f"convert of {llama} (llama)" in " ".join(out.split())
    code, out, _ = tiny.in_process("convert", llama, tmp_path / "a", "--max-shard-size", "40KB", "--json")
    assert json.loads(out)["already_finished"]
    code, _, err = tiny.in_process("convert", llama, tmp_path / "a", "--dtype", "bf16")
    assert code == 1
    assert "dtype auto -> BF16" in err


def test_a_dtype_is_rounded_once_and_config_json_says_it(llama: Path, tmp_path: Path) -> None:
    document = convert(llama, tmp_path / "a", "--dtype", "bf16")
    assert list(document["dtypes"]) == ["BF16"]
    assert same(weights(tmp_path / "a"), {name: tensor.bfloat16() for name, tensor in weights(llama).items()})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config == json.loads((llama / "config.json").read_text()) | dict.fromkeys(
        ("dtype", "torch_dtype"), "bfloat16"
    )


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    dense = tiny.save_llama(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    assert "choose another --dtype" in fails(dense, tmp_path / "a", "--dtype", "fp16")
    assert not (tmp_path / "a").exists()


def test_integers_scalars_and_empty_tensors_of_an_unknown_family_are_copied(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "unknown", "auto_map": {"AutoModel": "code.Model"}}))
    tensors = {
        "ids": torch.arange(7), "flags": torch.tensor([True, False]), "scalar": torch.tensor(2.5),
        "wide": torch.randn(3, 5, dtype=torch.float64), "none": torch.zeros(0, 4), "cube": torch.randn(2, 3, 4),
        "layer.e_score_correction_bias": torch.randn(4),
    }  # fmt: skip
    save_file(tensors, source / "model.safetensors")
    convert(source, tmp_path / "a")
    assert same(weights(tmp_path / "a"), tensors)
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == {"model_type": "unknown"}  # code is left behind
    convert(source, tmp_path / "b", "--dtype", "bf16")
    halves = {"scalar", "wide", "none", "cube"}
    wanted = {name: tensor.bfloat16() if name in halves else tensor for name, tensor in tensors.items()}
    assert same(weights(tmp_path / "b"), wanted)
    assert "does not know how a unknown stores experts" in fails(source, tmp_path / "c", "--layout", "fused")


@pytest.mark.parametrize("family", registry.names("target"))
def test_every_family_reads_the_layouts_that_are_written(family: str, tmp_path: Path) -> None:
    spec = registry.load("target", family)
    dense, moe = tiny.save_dense(SOURCE_OF[family], tmp_path / "dense"), tmp_path / "moe"
    assert tiny.in_process("upcycle", dense, moe, "--target", family, "--num-experts", 4, "--verify", "none")[0] == 0
    if spec.fused:
        assert "from one tensor per layer only" in fails(moe, tmp_path / "a", "--layout", "per-expert")
        assert convert(moe, tmp_path / "b", "--layout", "fused")["layout"] == {"source": "fused", "result": "fused"}
        assert same(weights(moe), weights(tmp_path / "b"))
        return
    fused, back = tmp_path / "fused", tmp_path / "back"
    assert convert(moe, fused, "--layout", "fused")["layout"] == {"source": "per-expert", "result": "fused"}
    assert spec.in_memory.experts["up"].format(layer=1) in weights(fused)
    before, after = (load_model(folder).state_dict() for folder in (moe, fused))  # as transformers holds them
    assert same(before, after)
    convert(fused, back, "--layout", "per-expert", "--max-shard-size", "40KB")
    assert same(weights(moe), weights(back))
    told = [json.loads(tiny.in_process("inspect", folder, "--json")[1]) for folder in (moe, fused)]
    assert told[0]["parameters"] == told[1]["parameters"]
    assert "clients" not in told[1]  # only those of the usual layout have been measured
    assert [entry["command"] for entry in told[1]["lineage"]] == ["upcycle", "convert"]
    origin = read_origin(back)  # what was redrawn is still known
    assert origin is not None
    assert tiny.in_process("verify", back)[0] == 0


def test_experts_that_are_not_all_there_are_one_line(mixtral: Path, tmp_path: Path) -> None:
    expert = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    for change, message in ((None, f"{expert} is missing"), (torch.ones(3, 3), "shapes of")):
        source = Path(shutil.copytree(mixtral, tmp_path / message))
        tensors = load_file(source / "model.safetensors")
        tensors = {name: tensor for name, tensor in tensors.items() if name != expert}
        tensors |= {expert: change} if change is not None else {}
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        assert message in fails(source, tmp_path / "out", "--layout", "fused")
    assert "inside it" in fails(mixtral, mixtral / "out", "--layout", "fused")
    config = json.loads((mixtral / "config.json").read_text()) | {"num_local_experts": 5}
    fused = tmp_path / "fused"
    convert(mixtral, fused, "--layout", "fused")
    (fused / "config.json").write_text(json.dumps(config))
    assert "config.json says 5 experts" in fails(fused, tmp_path / "out", "--layout", "per-expert")


@pytest.mark.parametrize("family", MULTIMODAL)
def test_the_text_model_of_a_multimodal_model(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family](**MULTIMODAL[family][0])).eval()
    whole, text = tmp_path / "whole", tmp_path / "text"
    model.save_pretrained(whole)
    if family in FLAT:
        config = json.loads((whole / "config.json").read_text())
        inner = config.pop("text_config")
        inner.pop("model_type")
        (whole / "config.json").write_text(json.dumps(inner | config))
    assert convert(whole, text)["text_model_of"] == family
    tokens = torch.arange(1, 25)[None]
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
    assert float((logits(text) - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    one, two = tmp_path / "moe-1", tmp_path / "moe-2"
    for source, out in ((whole, one), (text, two)):
        assert tiny.in_process("upcycle", source, out, "--verify", "none")[0] == 0
    assert same(weights(one), weights(two))  # the same model, whichever way
    entry = json.loads((two / "moetool.json").read_text())["lineage"][0]
    assert entry["source"]["lineage"][0]["command"] == "convert"


def test_pickled_weights_are_read_only_when_it_is_asked_for(llama: Path, tmp_path: Path) -> None:
    source = tiny.save_pickled(llama, tmp_path / "bin")
    assert "--unpickle" in fails(source, tmp_path / "a")
    code, _, err = tiny.in_process("upcycle", source, tmp_path / "a")
    assert code == 1
    assert "moetool convert --unpickle reads them" in err
    code, _, err = tiny.in_process("convert", source, tmp_path / "a", "--unpickle", "--verify", "full")
    assert code == 0, err
    assert "restricted unpickler" in err
    assert same(weights(tmp_path / "a"), weights(llama))
    assert "--unpickle" in tiny.in_process("verify", tmp_path / "a")[2]
    assert tiny.in_process("verify", tmp_path / "a", "--unpickle")[0] == 0
    assert tiny.in_process("upcycle", tmp_path / "a", tmp_path / "moe")[0] == 0


def test_several_pickled_files_and_tied_weights(tmp_path: Path) -> None:
    dense = tiny.save_llama(tmp_path / "dense", tie_word_embeddings=True, dtype=torch.bfloat16)
    source, tensors = tmp_path / "bin", weights(dense)
    shutil.copytree(dense, source, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # as torch.save keeps them: the same bytes
    names = sorted(tensors)
    files: dict[str, str] = {}
    for number, part in enumerate((names[:9], names[9:])):
        file = f"pytorch_model-0000{number + 1}-of-00002.bin"
        files |= dict.fromkeys(part, file)
        torch.save({name: tensors[name] for name in part}, source / file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    convert(source, tmp_path / "a", "--unpickle")
    assert same(weights(tmp_path / "a"), weights(dense))
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "pytorch_model.bin.index.json").unlink()
    convert(source, tmp_path / "b", "--unpickle")
    assert same(weights(tmp_path / "b"), weights(dense))


def test_unpickle_without_a_pickle_is_refused(llama: Path, tmp_path: Path) -> None:
    assert "--unpickle has no effect, because" in fails(llama, tmp_path / "a", "--unpickle", "--plan")


class Runs:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_a_hostile_pickle_is_one_line(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tiny.save_pickled(llama, tmp_path / "bin") / "pytorch_model.bin"
    whole = path.read_bytes()

    def tried(data: bytes | None = None) -> str:
        if data is not None:
            path.write_bytes(data)
        return fails(tmp_path / "bin", tmp_path / "out", "--unpickle")

    torch.save({"a": torch.ones(2), "b": Runs()}, path)
    refused = tried()
    assert "restricted unpickler refuses it (Trying to load unsupported GLOBAL" in refused
    assert "weights_only" not in refused  # no advice how to run it
    assert "not an archive of torch 1.6" in tried(pickle.dumps({"a": Runs()}))
    assert "not an archive" in tried(whole[: len(whole) // 2])
    torch.save({"a": torch.ones(2), "b": torch.randn(4, 3).t()}, path)
    assert "'b' is not a plain tensor" in tried()
    line = torch.arange(10.0)
    torch.save({"a": line[:6], "b": line[4:]}, path)
    assert "shares some of its bytes" in tried()
    torch.save([torch.ones(2)], path)
    assert "it holds a list" in tried()
    torch.save({"a": {"b": torch.ones(2)}}, path)
    assert "'a' is not a tensor" in tried()
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert "is compressed" in tried(packed.getvalue())
    assert not (tmp_path / "ran").exists()


def test_a_killed_conversion_is_finished_by_the_same_command(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 3000}
    source, out = tiny.save_llama(tmp_path / "source", **sizes), tmp_path / "out"
    command = ("convert", source, out, "--dtype", "bf16", "--max-shard-size", "1MB", "--verify", "none", "--workers", 1)
    convert(source, tmp_path / "whole", "--dtype", "bf16", "--max-shard-size", "1MB")
    complete = tiny.killed_while_writing(out, *command)
    code, _, err = tiny.in_process("inspect", out)
    assert code == 1
    assert "unfinished conversion" in err
    assert "dtype BF16 -> auto" in fails(source, out, "--max-shard-size", "1MB")
    assert tiny.in_process(*command)[0] == 0
    assert {name: (out / name).stat().st_ino for name in complete} == complete  # what was complete was kept
    assert same(weights(out), weights(tmp_path / "whole"))
    assert tiny.in_process("verify", out)[0] == 0


def test_verify_finds_a_changed_weight_a_changed_source_and_another_command(llama: Path, tmp_path: Path) -> None:
    source, out = Path(shutil.copytree(llama, tmp_path / "source")), tmp_path / "out"
    convert(source, out, "--dtype", "bf16")
    path, info = out / "model.safetensors", CheckpointReader(out).tensors["model.norm.weight"]
    whole = path.read_bytes()
    path.write_bytes(whole[: info.start] + b"\x01" + whole[info.start + 1 :])
    assert "should be a copy" in tiny.in_process("verify", out)[2]
    path.write_bytes(whole)
    assert tiny.in_process("verify", out)[0] == 0
    (out / "more.safetensors").write_bytes(b"")
    assert "was not written by convert" in tiny.in_process("verify", out)[2]
    (out / "more.safetensors").unlink()
    lineage = json.loads((out / "moetool.json").read_text())
    for change, message in (
        ({"recipe": {}}, "recipe cannot be read"),
        ({"recipe": lineage["lineage"][0]["recipe"] | {"adapter": True}}, "records 2 sources but names 1"),
        ({"command": "cpt"}, "has no moetool.json that says"),
    ):
        (out / "moetool.json").write_text(json.dumps(lineage | {"lineage": [lineage["lineage"][0] | change]}))
        assert message in tiny.in_process("verify", out)[2]
    trained = [*lineage["lineage"], {"command": "cpt"}]
    (out / "moetool.json").write_text(json.dumps(lineage | {"lineage": trained}))
    assert "was changed after it was converted (cpt)" in tiny.in_process("verify", out)[2]
    (out / "moetool.json").write_text(json.dumps(lineage))
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (source / "model.safetensors").write_bytes(data)
    assert "is not the file that was converted" in tiny.in_process("verify", out)[2]


def test_a_plan_writes_nothing_and_a_quantised_source_is_refused(llama: Path, tmp_path: Path) -> None:
    code, out, _ = tiny.in_process("convert", llama, tmp_path / "a", "--dtype", "bf16", "--plan", "--json")
    assert code == 0
    assert json.loads(out)["recipe"]["dtype"] == "BF16"
    assert not (tmp_path / "a").exists()
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "quantised" in fails(source, tmp_path / "a")
