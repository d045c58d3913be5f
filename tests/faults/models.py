"""The models and texts that faults are done to."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests import tiny


def main() -> None:
    """Make them in the folder that the command line names."""
    folder = Path(sys.argv[1])
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    tiny.save_llama(folder / "dense", dtype=torch.bfloat16, **sizes)
    tiny.save_llama(folder / "donor", 1, dtype=torch.bfloat16, **sizes)
    large = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    tiny.save_llama(folder / "large", dtype=torch.bfloat16, **large)
    tiny.save_llama(folder / "large-2", 1, dtype=torch.bfloat16, **large)
    tiny.save_llama(folder / "shards", dtype=torch.bfloat16, **sizes)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype="auto")
    (folder / "shards" / "model.safetensors").unlink()
    model.save_pretrained(folder / "shards", max_shard_size="100KB")
    tiny.save_jsonl(folder / "text.jsonl", repeat=60)
    for source, out in (("shards", "moe"), ("large", "large-moe")):
        words = ("--num-experts", 4, "--workers", 1, *(("--max-shard-size", "200KB") if out == "moe" else ()))
        code, _, err = tiny.in_process("upcycle", folder / source, folder / out, *words)
        assert code == 0, err
