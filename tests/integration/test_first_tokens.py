"""Of a long text, only what `--max-tokens` needs is tokenized: with the same results, and runs of before continue."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from moetool.data import make_tokens, tokens
from tests import tiny


@contextmanager
def earlier(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As earlier versions did: all of a text."""

    def whole(source: Any, folder: Path, progress: Any, *more: Any) -> tokens.TokenStream:
        return make_tokens.tokenized(source, folder, progress)

    with monkeypatch.context() as patch:
        patch.setattr("moetool.calibration.measure.tokenized", whole)
        yield


def test_a_pruned_model_is_the_same_and_one_of_before_is_finished(
    mixtral: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETOOL_CACHE", str(tmp_path / "cache"))
    size = ("--keep-experts", 3, "--data", f"t={jsonl}", "--max-tokens", 200, "--seq-len", 16, "--device", "cpu")
    with earlier(monkeypatch):
        tiny.result("prune", mixtral, tmp_path / "before", *size)
    tiny.result("prune", mixtral, tmp_path / "now", *size)
    found = [load_file(tmp_path / name / "model.safetensors") for name in ("before", "now")]
    assert found[0].keys() == found[1].keys()
    assert all(bool((tensor == found[1][name]).all()) for name, tensor in found[0].items())
    for name in ("before", "now"):
        assert tiny.result("prune", mixtral, tmp_path / name, *size)["already_finished"]
    sizes = {json.loads(path.read_text())["num_tokens"] for path in (tmp_path / "cache").glob("tokens/*/manifest.json")}
    assert len(sizes) == 2
    assert 200 < min(sizes) < 260


def test_loads_that_were_recorded_with_all_of_a_text_are_proven(
    llama: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETOOL_CACHE", str(tmp_path / "cache"))
    text = ("--calibrate", f"t={jsonl}")
    with earlier(monkeypatch):
        size = ("--router", "balanced", "--max-tokens", 200, "--seq-len", 16)
        tiny.result("upcycle", llama, tmp_path / "moe", *size, *text)
    shutil.rmtree(tmp_path / "cache")
    code, _, err = tiny.in_process("verify", tmp_path / "moe", *text, "--device", "cpu")
    assert code == 0, err


def test_a_tokenised_folder_counts_as_the_text_that_it_was_made_from(
    llama: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETOOL_CACHE", str(tmp_path / "cache"))
    assert not tiny.in_process("tokenize", jsonl, "--out", tmp_path / "tokens", "--tokenizer", llama)[0]
    forms = {"text": f"t={jsonl}", "folder": f"t={tmp_path / 'tokens'}"}
    size = ("--router", "balanced", "--max-tokens", 200, "--seq-len", 16)
    tiny.result("upcycle", llama, tmp_path / "moe", *size, "--calibrate", forms["text"])
    assert tiny.result("upcycle", llama, tmp_path / "moe", *size, "--calibrate", forms["folder"])["already_finished"]
    for form in forms.values():
        code, _, err = tiny.in_process("verify", tmp_path / "moe", "--calibrate", form, "--device", "cpu")
        assert code == 0, err


def test_a_run_of_before_with_a_tokenised_folder_continues(
    llama: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETOOL_CACHE", str(tmp_path / "cache"))
    assert not tiny.in_process("tokenize", jsonl, "--out", tmp_path / "tokens", "--tokenizer", llama)[0]
    text = ("--calibrate", f"t={tmp_path / 'tokens'}")
    size = ("--router", "balanced", "--max-tokens", 200, "--seq-len", 16)
    with earlier(monkeypatch):
        tiny.result("upcycle", llama, tmp_path / "moe", *size, *text)
    assert tiny.result("upcycle", llama, tmp_path / "moe", *size, *text)["already_finished"]
    code, _, err = tiny.in_process("verify", tmp_path / "moe", *text, "--device", "cpu")
    assert code == 0, err
