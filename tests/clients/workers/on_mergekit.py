"""mergekit: half of a checkpoint and half of the same one, which is it again; then transformers in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from common import work
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM


@torch.no_grad()
def run(folder: Path, tokens: np.ndarray, number: int) -> tuple[np.ndarray, list[int]]:
    """Logits; no tokens."""
    again = folder / "again"  # it refuses the same folder twice
    if not again.is_symlink():
        again.symlink_to("moe")
    halves = [{"model": str(model), "parameters": {"weight": 0.5}} for model in (folder / "moe", again)]
    merge = {"merge_method": "linear", "dtype": "float32", "models": halves}
    run_merge(
        MergeConfiguration.model_validate(merge), str(folder / "merged"), options=MergeOptions(copy_tokenizer=False)
    )
    model, info = AutoModelForCausalLM.from_pretrained(
        folder / "merged", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(f"missing {info['missing_keys']}, of another shape {info['mismatched_keys']}")
    return model(torch.from_numpy(tokens)[None]).logits[0].numpy(), []


work("mergekit", run)
