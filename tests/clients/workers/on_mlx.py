"""mlx-lm in fp32, on a CPU."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from common import work
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)


def run(folder: Path, tokens: np.ndarray, number: int) -> tuple[np.ndarray, list[int]]:
    """Logits, and tokens."""
    model, _ = load_model(folder / "moe")
    found = tokens.tolist()
    for _ in range(number):
        found.append(int(mx.argmax(model(mx.array(found)[None])[0, -1])))
    return np.array(model(mx.array(tokens)[None]).astype(mx.float32))[0], found[len(tokens) :]


work("mlx", run)
