"""mlx-lm in fp32, on a CPU."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from common import work
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)


def run(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits."""
    model, _ = load_model(folder / "moe")
    return np.array(model(mx.array(tokens)[None]).astype(mx.float32))[0]


work("mlx", run)
