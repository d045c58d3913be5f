"""Each check of the proof finds what it is there for, and says so in its own words."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetool.checkpoint import writer
from moetool.checkpoint.folder import write_file as write_file_of_folder
from moetool.checkpoint.reader import CheckpointReader
from moetool.errors import CheckpointError
from moetool.surgery import examine as examining
from tests import tiny

EXPERT = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
DENSE = "model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("copied", "should be a copy"),
        ("kept", "holds kept units"),
        ("scaled", "standard errors apart"),
        ("restored", "the recipe changes 32"),
        ("nudged", "has changed since it was written"),
        ("config", "rms_norm_eps is 0.5, but this recipe writes 1e-06"),
    ],
)
def test_verify_names_what_was_changed(llama: Path, tmp_path: Path, change: str, message: str) -> None:
    out = tmp_path / "moe"
    assert tiny.in_process("upcycle", llama, out)[0] == 0
    path, config = out / "model.safetensors", out / "config.json"
    whole = path.read_bytes()
    tensors = load_file(path)
    info = CheckpointReader(out).tensors
    name = "model.norm.weight" if change == "copied" else EXPERT
    tensor, dense = tensors[name].clone(), load_file(llama / "model.safetensors")[DENSE]
    if change == "copied":
        tensor[0] += 1
    elif change == "config":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.5}))
    else:
        redrawn = (tensor != dense).any(1)
        first = int(redrawn.nonzero()[0])
        if change == "kept":
            tensor[int((~redrawn).nonzero()[0]), 0] += 1
        elif change == "scaled":
            tensor[redrawn] *= 3
        elif change == "restored":
            tensor[first] = dense[first]
        else:
            tensor[first, 0] += 1e-4
    place = info[name]
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    path.write_bytes(whole[: place.start] + raw + whole[place.start + place.size :])
    code, _, err = tiny.in_process("verify", out)
    assert code == 1
    assert message in err


def test_experts_that_redraw_everything_still_differ(llama: Path, tmp_path: Path) -> None:
    assert tiny.in_process("upcycle", llama, tmp_path / "moe", "--drop-ratio", "1")[0] == 0
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    assert not torch.equal(tensors[EXPERT], tensors[EXPERT.replace("experts.3", "experts.4")])


def test_per_matrix_statistics_are_those_of_the_units_that_are_replaced(tmp_path: Path) -> None:
    dense = tiny.save_llama(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors[DENSE] *= torch.logspace(-3, 3, 64)[:, None]  # other units would have another deviation
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    arguments = ("--drop-index", "per-matrix", "--drop-ratio", "0.1", "--verify", "full")
    code, _, err = tiny.in_process("upcycle", dense, tmp_path / "moe", *arguments)
    assert code == 0, err


def test_config_json_comes_last(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    real = write_file_of_folder

    def write_file(path: Path, data: bytes) -> None:
        written.append(path.name)
        real(path, data)

    monkeypatch.setattr(writer, "write_file", write_file)
    assert tiny.in_process("upcycle", llama, tmp_path / "moe", "--max-shard-size", "60KB")[0] == 0
    assert written[0] == "moetool.partial.json"
    assert written[-1] == "config.json"
    assert "model.safetensors.index.json" in written


def test_a_source_that_has_changed_is_another_source(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "m"))
    before = CheckpointReader(folder).fingerprint()
    os.utime(folder / "model.safetensors", (1, 1))
    after = CheckpointReader(folder).fingerprint()
    assert before != after
    out = tmp_path / "out"
    out.mkdir()
    writer.CheckpointWriter(out, [], {"recipe": {}, "source_fingerprint": before})
    with pytest.raises(CheckpointError, match="source_fingerprint"):
        writer.prepare(out, {"recipe": {}, "source_fingerprint": after}, overwrite=False)


def test_a_source_that_changes_while_it_is_read_is_noticed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = Path(shutil.copytree(llama, tmp_path / "m")), tmp_path / "moe"
    real = examining.examine

    def examine(*arguments: Any) -> Any:
        found = real(*arguments)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        return found

    monkeypatch.setattr("moetool.surgery.write.examine", examine)
    code, _, err = tiny.in_process("upcycle", folder, out, "--verify", "none")
    assert code == 1
    assert "changed while being read" in err
    with pytest.raises(CheckpointError):
        CheckpointReader(out)
    monkeypatch.undo()
    assert tiny.in_process("upcycle", folder, out, "--overwrite", "--verify", "full")[0] == 0


def test_a_model_of_the_hub_is_held_against_the_hash_in_its_name(llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "m"))
    data = (model / "model.safetensors").read_bytes()
    blob = tmp_path / hashlib.sha256(data).hexdigest()
    blob.write_bytes(data)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(blob)
    assert tiny.in_process("upcycle", model, tmp_path / "good")[0] == 0
    blob.write_bytes(data[:-4] + bytes(4))
    code, _, err = tiny.in_process("upcycle", model, tmp_path / "bad")
    assert code == 1
    assert "is not the file that was fetched" in err
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("level", ["quick", "full"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("changed", "tokenizer.json has changed since it was written"),
        ("missing", "tokenizer.json is missing; upcycle wrote it"),
        ("settings", "generation_config.json has changed since it was written"),
        ("index", "model.safetensors.index.json has changed since it was written"),
        ("weights", "other.safetensors was not written by upcycle"),
        ("code", "modeling_mixtral.py was not written by upcycle"),
        ("link", "chat_template.jinja was not written by upcycle"),
        ("templates", "additional_chat_templates was not written by upcycle"),
        ("digests", "moetool.json: files is '[]', expected an object"),
    ],
)
def test_verify_finds_a_changed_a_missing_and_a_foreign_file(
    llama: Path, tmp_path: Path, change: str, message: str, level: str
) -> None:
    out = tmp_path / "moe"
    assert tiny.in_process("upcycle", llama, out, "--max-shard-size", "1MB", "--num-experts", 64)[0] == 0
    (out / "README.md").write_text("a model card")
    (out / ".gitattributes").write_text("")
    (out / "plots").mkdir()
    code, said, err = tiny.in_process("verify", out, "--level", level, "--json")
    assert code == 0, err
    assert json.loads(said)["proof"]["files"] == len(json.loads((out / "moetool.json").read_text())["files"]) > 3
    tokenizer = out / "tokenizer.json"
    if change == "changed":
        tokenizer.write_text("{}")
    elif change == "missing":
        tokenizer.unlink()
    elif change == "settings":
        (out / "generation_config.json").write_text('{"temperature": 9}')
    elif change == "index":
        index = out / "model.safetensors.index.json"
        index.write_text(json.dumps(json.loads(index.read_text())))
    elif change == "link":
        (out / "chat_template.jinja").symlink_to(tmp_path / "nowhere")
    elif change == "templates":
        (out / "additional_chat_templates").mkdir()
    elif change == "digests":
        lineage = json.loads((out / "moetool.json").read_text())
        (out / "moetool.json").write_text(json.dumps(lineage | {"files": []}))
    else:
        (out / {"weights": "other.safetensors", "code": "modeling_mixtral.py"}[change]).write_bytes(b"")
    code, _, err = tiny.in_process("verify", out, "--level", level)
    assert code == 1
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_folder_without_digests_is_still_proved(llama: Path, tmp_path: Path) -> None:
    """Version 0.1 recorded none."""
    out = tmp_path / "moe"
    assert tiny.in_process("upcycle", llama, out)[0] == 0
    lineage = json.loads((out / "moetool.json").read_text())
    del lineage["files"]
    (out / "moetool.json").write_text(json.dumps(lineage))
    code, said, _ = tiny.in_process("verify", out, "--json")
    assert code == 0
    assert json.loads(said)["proof"]["files"] == 0


def test_an_edited_lineage_is_not_blamed_on_torch(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    assert tiny.in_process("upcycle", llama, out)[0] == 0
    lineage = json.loads((out / "moetool.json").read_text())
    for change, message in (({"seed": 7}, "were edited"), ({}, "was written with torch 1.0; this is")):
        entry = lineage["lineage"][0] | ({} if change else {"torch": "1.0"})
        entry["recipe"] = entry["recipe"] | {"seed": 7}
        (out / "moetool.json").write_text(json.dumps(lineage | {"lineage": [entry]}))
        code, _, err = tiny.in_process("verify", out)
        assert code == 1
        assert message in err


def test_a_shard_that_another_program_saved_again_is_named_so(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    assert tiny.in_process("upcycle", llama, out)[0] == 0
    path = out / "model.safetensors"
    save_file(dict(sorted(load_file(path).items(), reverse=True)), path, metadata={"format": "pt"})
    code, _, err = tiny.in_process("verify", out)
    assert code == 1
    assert "holds the planned tensors in another layout" in err


@pytest.mark.parametrize(("std", "splits"), [("0.02", False), ("8", True)])
def test_scores_that_saturate_are_noticed(llama: Path, tmp_path: Path, std: str, splits: bool) -> None:
    """In fp32 the sigmoid of a logit above 17 is 1, so groups of fine-grained experts tie."""
    out = tmp_path / "moe"
    options = ("--target", "glm4_moe", "--granularity", 4, "--num-experts", 64, "--top-k", 8, "--shared-experts", 0)
    code, said, err = tiny.in_process("upcycle", llama, out, *options, "--router-std", std, "--json")
    assert code == 0, err
    assert (json.loads(said)["proof"]["split_groups"] > 0.01) is splits


def test_a_source_is_recorded_where_it_lies(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name such as `models/llama` would else be asked of the hub from another folder."""
    monkeypatch.chdir(llama.parent)
    assert tiny.in_process("upcycle", llama.name, tmp_path / "moe")[0] == 0
    monkeypatch.chdir("/")
    assert tiny.in_process("verify", tmp_path / "moe")[0] == 0
    lineage = json.loads((tmp_path / "moe" / "moetool.json").read_text())
    assert lineage["lineage"][0]["source"]["name"] == str(llama)
    lineage["lineage"][0]["donors"] = "x"
    (tmp_path / "moe" / "moetool.json").write_text(json.dumps(lineage))
    assert "does not name what was upcycled" in tiny.in_process("verify", tmp_path / "moe")[2]
    (tmp_path / "moe" / "moetool.partial.json").write_text("{}")
    assert "is an unfinished conversion" in tiny.in_process("verify", tmp_path / "moe")[2]
