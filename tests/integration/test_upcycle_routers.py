"""Routers that are fitted on text: what is predicted is what the written model does, in every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moetool import registry
from moetool.calibration.parts import HELD_OUT
from moetool.checkpoint.model import load_model
from moetool.data.text import TextSource
from moetool.data.tokens import tokenized
from moetool.recipe import read_lineage
from moetool.routing.capture import RouterCapture
from tests import tiny
from tests.integration.test_convert import SOURCE_OF

SEQ_LEN = 16
RUN = ("--seq-len", SEQ_LEN, "--batch-size", 3)
WORDS = {"a": "The quick brown fox jumps over the lazy dog", "b": "def add(a, b): return a + b[0] * 42"}


def text(folder: Path, name: str) -> Path:
    draw = np.random.default_rng(sum(name.encode()))
    words = WORDS[name].split()
    documents = [" ".join(draw.choice(words, 30)) for _ in range(40)]
    return tiny.save_jsonl(folder / f"{name}.jsonl", documents, repeat=1)


def upcycle(*arguments: object) -> dict[str, Any]:
    return tiny.result("upcycle", *arguments)


def fails(*arguments: object) -> str:
    return tiny.refusal("upcycle", *arguments)


def counted(folder: Path, paths: dict[str, Path]) -> dict[int, dict[str, torch.Tensor]]:
    """Layer -> text -> load of each expert, on every fourth window, by transformers alone."""
    model = load_model(folder).eval()
    capture = RouterCapture(model)
    found: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in capture.layers}
    for name, path in paths.items():
        tokens = tokenized(TextSource(str(path)), folder)
        ids = torch.from_numpy(np.asarray(tokens.read(0, tokens.num_tokens)).astype(np.int64))
        windows = [ids[start : start + SEQ_LEN] for start in range(0, len(ids), SEQ_LEN)]
        counts = {layer: torch.zeros(model.config.num_hidden_layers * 0 + 64) for layer in capture.layers}
        for number, window in enumerate(windows):
            if number % HELD_OUT == HELD_OUT - 1:
                with torch.no_grad(), capture.collect() as routes:
                    model(window[None])
                for route in routes:
                    counts[route.layer] += torch.bincount(route.indices_TK.flatten(), minlength=64)
        for layer, one in counts.items():
            found[layer][name] = one / one.sum()
    return found


def dense_of(family: str, folder: Path, **changes: Any) -> Path:
    dense = tiny.save_dense(SOURCE_OF[family], folder, **changes)
    tiny.save_tokenizer(dense)
    return dense


def check_loads(document: dict[str, Any], found: dict[int, dict[str, torch.Tensor]]) -> None:
    assert [row["layer"] for row in document["fitted"]["layers"]] == sorted(found)
    for row in document["fitted"]["layers"]:
        for name, load in row["load"].items():
            measured = found[row["layer"]][name][: len(load)]
            assert float(measured.sum()) == pytest.approx(1)
            assert torch.tensor(load).sub(measured).abs().max() < 0.005, (row["layer"], name)


@pytest.mark.parametrize("family", registry.names("target"))
def test_balanced_is_as_predicted_in_every_family(family: str, tmp_path: Path) -> None:
    dense = dense_of(family, tmp_path / "dense")
    paths = {name: text(tmp_path, name) for name in WORDS}
    data = [word for name, path in paths.items() for word in ("--calibrate", f"{name}={path}")]
    options = ("--target", family, "--num-experts", 8, *RUN, *data)
    normal = upcycle(dense, tmp_path / "normal", "--target", family, "--num-experts", 8)
    assert normal["fitted"] is None
    out = tmp_path / "moe"
    document = upcycle(dense, out, *options, "--router", "balanced", "--max-shard-size", "50KB")
    check_loads(document, counted(out, paths))
    largest = {
        name: max(float(sum(load.values()).max()) / 2 for load in counted(folder, paths).values())
        for name, folder in (("normal", tmp_path / "normal"), ("balanced", out))
    }
    assert largest["balanced"] < largest["normal"]
    assert largest["balanced"] < 0.125 * 1.5
    plan = json.loads(tiny.in_process("upcycle", dense, tmp_path / "none", *options, "--router", "balanced", "--plan",
                                      "--json")[1])  # fmt: skip
    assert plan["fitted"] == document["fitted"]
    assert tiny.in_process("verify", out)[0] == 0
    again = upcycle(dense, out, *options, "--router", "balanced", "--max-shard-size", "50KB")
    assert again["already_finished"]
