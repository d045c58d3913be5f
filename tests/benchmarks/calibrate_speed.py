"""How long fitting routers takes, against one bare forward over the same text, of the dense model and of the result.

python -m tests.benchmarks.calibrate_speed [--tokens 16384] [--method copy --method drop] [--rounds 1]
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from moetool.checkpoint.model import load_model
from moetool.recipe import UpcycleRecipe
from moetool.surgery.sources import open_sources
from moetool.upcycle.plan import plan_upcycling
from moetool.upcycle.router_pass import fit_routers
from moetool.upcycle.texts import TextOptions
from tests import tiny

SIZE: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}  # fmt: skip
SEQ_LEN, BATCH = 512, 4


class Noise:
    """Random tokens."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._tokens = np.random.default_rng(0).integers(1, SIZE["vocab_size"], num_tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        return self._tokens[start : start + length]


def seconds(work: Callable[[], Any]) -> float:
    """The processor's, of one call: other processes of the machine change it less."""
    gc.collect()
    began = time.process_time()
    work()
    return time.process_time() - began


@torch.inference_mode()
def bare(folder: Path, text: Noise) -> float:
    """The model's own forward, without its head; loading is left out."""
    model: Any = load_model(folder, "float32").eval()

    def run() -> None:
        for start in range(0, text.num_tokens, SEQ_LEN * BATCH):
            ids = torch.from_numpy(text.read(start, SEQ_LEN * BATCH)).reshape(-1, SEQ_LEN)
            model.base_model(input_ids=ids, use_cache=False)

    return seconds(run)


def main() -> None:
    """Print a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--method", action="append", help="default: copy and drop")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=SIZE["num_hidden_layers"])
    asked = parser.parse_args()
    text = Noise(asked.tokens)
    run = TextOptions(seq_len=SEQ_LEN, batch_size=BATCH, max_tokens=asked.tokens)
    print(f"{asked.tokens} tokens, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| method | router | dense forward s | result's forward s | fitting processor s | / dense | / result |")
    print("|---|---|---|---|---|---|---|")
    with TemporaryDirectory() as name:
        dense = tiny.save_llama(Path(name) / "dense", **SIZE | {"num_hidden_layers": asked.layers})
        for method in asked.method or ["copy", "drop"]:
            out = Path(name) / method
            code, _, err = tiny.in_process("upcycle", dense, out, "--method", method, "--verify", "none")
            assert code == 0, err
            with open_sources([str(dense)], out) as sources:
                recipe = UpcycleRecipe(method=method, router="balanced").settled(1)
                upcycling = plan_upcycling(sources.readers, recipe, 10**10)
                rounds = []
                for _ in range(asked.rounds):
                    fitting = seconds(partial(fit_routers, upcycling, sources.readers, {"noise": text}, run))
                    rounds.append((bare(dense, text), bare(out, text), fitting))
            middle = [median(row) for row in zip(*rounds, strict=True)]
            ratios = [median(row[2] / row[n] for row in rounds) for n in (0, 1)]
            cells = [*(f"{one:.1f}" for one in middle), *(f"{one:.2f}" for one in ratios)]
            print(f"| {method} | balanced | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
