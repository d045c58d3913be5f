"""transformers 4 in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from common import work
from transformers import AutoModelForCausalLM


@torch.no_grad()
def run(folder: Path, tokens: np.ndarray, number: int) -> tuple[np.ndarray, list[int]]:
    """Logits, and tokens."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder / "moe", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(f"missing {info['missing_keys']}, of another shape {info['mismatched_keys']}")
    found = tokens.tolist()
    for _ in range(number):
        found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return model(torch.from_numpy(tokens)[None]).logits[0].numpy(), found[len(tokens) :]


work("transformers-4", run)
