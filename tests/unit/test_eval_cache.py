"""What a kept result belongs to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from moetool.checkpoint.reader import sha256_file
from moetool.evaluate.cache import FOLDER, checkpoint_identity, read, write


def test_a_clock_that_went_back_does_not_hide_that_a_shard_was_replaced(tmp_path: Path, llama: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    shard = model / "model.safetensors"
    shards = {shard.name: sha256_file(shard)}
    (model / "moetool.json").write_text(json.dumps({"format": 1, "lineage": [], "shards": shards}))
    before = checkpoint_identity(model)
    save_file({name: 1.5 * value for name, value in load_file(shard).items()}, shard, metadata={"format": "pt"})
    os.utime(shard, (1, 1))  # by the clock, it is older than moetool.json
    assert checkpoint_identity(model) != before


def test_a_changed_digit_of_a_saved_result_is_found(tmp_path: Path) -> None:
    parts = ("configs", "versions", "n-shot", "n-samples")
    results: dict[str, Any] = {part: {"t": {}} for part in parts} | {
        "results": {"t": {"sample_len": 4, "acc,none": 0.25}}
    }
    sample = {"doc_id": 0, "filter": "none", "metrics": ["acc"], "acc": 1.0}
    entry: dict[str, Any] = {
        "samples": [sample],
        "model_info": {},
        "tokenizer_info": {},
        "date": "2026-12-01",
        "routing": None,
    }
    entry["results"] = results | {"higher_is_better": {"t": {}}}
    write(tmp_path, "k", entry)
    assert read(tmp_path, "k", "t") == entry
    path = tmp_path / FOLDER / "k.json"
    saved = path.read_text()
    path.write_text(saved.replace("0.25", "0.75"))
    assert read(tmp_path, "k", "t") is None
    path.write_text(json.dumps(entry))  # as earlier versions saved it
    assert read(tmp_path, "k", "t") == entry
