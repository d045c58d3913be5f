"""What a kept result belongs to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from moetool.checkpoint.reader import sha256_file
from moetool.evaluate.cache import checkpoint_identity


def test_a_clock_that_went_back_does_not_hide_that_a_shard_was_replaced(tmp_path: Path, llama: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    shard = model / "model.safetensors"
    shards = {shard.name: sha256_file(shard)}
    (model / "moetool.json").write_text(json.dumps({"format": 1, "lineage": [], "shards": shards}))
    before = checkpoint_identity(model)
    save_file({name: 1.5 * value for name, value in load_file(shard).items()}, shard, metadata={"format": "pt"})
    os.utime(shard, (1, 1))  # by the clock, it is older than moetool.json
    assert checkpoint_identity(model) != before
