"""`moetool tokenize` from end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moetool.data.tokens import open_tokens
from tests.tiny import cli, in_process


def test_a_folder_of_tokens_is_made_and_then_found_again(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    out = tmp_path / "tokens"
    first = cli("tokenize", jsonl, "--out", out, "--tokenizer", llama, "--json")
    assert (first.returncode, first.stderr) == (0, "")
    document = json.loads(first.stdout)
    stream = open_tokens(out)
    assert document["num_tokens"] == stream.num_tokens
    assert document["num_documents"] == 80
    assert document["bytes_per_token"] == pytest.approx(stream.manifest["num_bytes"] / stream.num_tokens, abs=1e-4)
    assert document["already_there"] is False
    assert {file.name for file in out.iterdir()} == {"tokens.bin", "offsets.bin", "manifest.json", "moetool.yaml"}

    code, stdout, _ = in_process("tokenize", jsonl, "--out", out, "--tokenizer", llama)
    assert code == 0
    assert "already made from the same text and tokenizer" in stdout


def test_the_recorded_options_are_a_configuration(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    in_process("tokenize", jsonl, "--out", tmp_path / "a", "--tokenizer", llama, "--document", "line")
    code, _, err = in_process("tokenize", "--config", tmp_path / "a" / "moetool.yaml", "--out", tmp_path / "b")
    assert (code, err) == (0, "")
    assert (tmp_path / "a" / "tokens.bin").read_bytes() == (tmp_path / "b" / "tokens.bin").read_bytes()
    assert open_tokens(tmp_path / "a").manifest == open_tokens(tmp_path / "b").manifest


def test_inputs_make_one_stream_in_the_order_given(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "b.txt").write_text("first\nsecond\n")
    (tmp_path / "a.txt").write_text("third\n")
    for out, order in (("ba", "ba"), ("ab", "ab")):
        inputs = [tmp_path / f"{name}.txt" for name in order]
        code, stdout, _ = in_process(
            "tokenize", *inputs, "--out", tmp_path / out, "--tokenizer", llama, "--document", "line", "--json"
        )
        assert (code, json.loads(stdout)["num_documents"]) == (0, 3)
    ba, ab = (open_tokens(tmp_path / out) for out in ("ba", "ab"))
    assert ba.documents(np.array([2, 0, 1])).read(0, ba.num_tokens).tolist() == ab.read(0, ab.num_tokens).tolist()


def test_other_tokens_are_replaced_only_on_demand(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    out = tmp_path / "tokens"
    in_process("tokenize", jsonl, "--out", out, "--tokenizer", llama)
    other = tmp_path / "other.txt"
    other.write_text("something else")
    code, _, err = in_process("tokenize", other, "--out", out, "--tokenizer", llama)
    assert code == 1
    assert "holds other tokens" in err
    assert "--overwrite" in err
    assert open_tokens(out).num_documents == 80
    assert in_process("tokenize", other, "--out", out, "--tokenizer", llama, "--overwrite")[0] == 0
    assert open_tokens(out).num_documents == 1
    (out / "notes.txt").write_text("mine")
    code, _, err = in_process("tokenize", jsonl, "--out", out, "--tokenizer", llama, "--overwrite")
    assert code == 1
    assert "holds other files (notes.txt)" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing.txt"], 1, "no file or folder missing.txt"),
        (["{jsonl}", "--text-field", "body"], 1, "line 1: no field 'body'; fields are: text (use --text-field)"),
        (["{jsonl}", "--document", "page"], 2, "--document"),
        ([], 2, "INPUT"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, llama: Path, jsonl: Path, arguments: list[str], code: int, message: str
) -> None:
    out = tmp_path / "tokens"
    filled = [argument.format(jsonl=jsonl) for argument in arguments]
    found, _, err = in_process("tokenize", *filled, "--out", out, "--tokenizer", llama)
    assert found == code
    assert message in err
    assert err.count("\n") == 1
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path, jsonl: Path) -> None:
    code, _, err = in_process("tokenize", jsonl, "--out", tmp_path / "tokens", "--tokenizer", tmp_path)
    assert code == 1
    assert "holds no tokenizer" in err


def test_sigterm_leaves_nothing_behind(tmp_path: Path, llama: Path) -> None:
    text, out = tmp_path / "long.txt", tmp_path / "out" / "tokens"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 2_000_000)
    command = [sys.executable, "-m", "moetool", "tokenize", text, "--out", out, "--tokenizer", llama]
    running = subprocess.Popen([*map(str, command), "--document", "line"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(out.parent.glob(".tokens.*.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 143
    assert err == "moetool: terminated\n"
    assert list(out.parent.iterdir()) == []
