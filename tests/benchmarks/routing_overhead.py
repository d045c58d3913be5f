"""What counting routes costs: tokens a second of `measure` against a bare forward over the same tokens.

    python -m tests.benchmarks.routing_overhead [--tokens 200000] [--hidden 512] [--layers 4] [--device cpu]

Batches alternate between the two, so that a busy machine slows both; the ratio is of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moetool.routing.capture import RouterCapture
from moetool.routing.comparison import RouteFile
from moetool.routing.measure import measure, probe
from moetool.routing.vocabulary import TokenCounts

SEQ_LEN, BATCH_SIZE, VOCABULARY = 512, 4, 8000


class Text:
    """Random tokens."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens
        self.num_tokens = len(tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length]


def seconds(run: Callable[[], Any], device: str) -> float:
    """Wall time of a call, the device's work included."""
    began = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.inference_mode()
def main() -> None:
    """Print one line a variant."""
    parser = argparse.ArgumentParser()
    for name, default in {"tokens": 200_000, "hidden": 512, "layers": 4, "experts": 8, "top-k": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 128,
        num_local_experts=options.experts,
        num_experts_per_tok=options.top_k,
    )
    model = MixtralForCausalLM(config).to(options.device).eval()
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, options.tokens)
    whole = {"text": Text(tokens)}
    capture = RouterCapture(model)
    empty = probe(model, capture)
    counts = TokenCounts(whole, options.tokens, empty, empty.layers)
    routes = RouteFile(Path(tempfile.mkdtemp()), whole, options.tokens, empty)
    settings: dict[str, Any] = {"seq_len": SEQ_LEN, "batch_size": BATCH_SIZE, "max_tokens": options.tokens}
    variants: dict[str, list[Any]] = {
        "counts": [],
        "counts and tokens": [counts.observe],
        "counts, tokens and comparison": [counts.observe, routes.write],
    }
    times: dict[str, list[float]] = {name: [] for name in ("bare", *variants)}
    step = SEQ_LEN * BATCH_SIZE
    for start in range(0, options.tokens - step, step):
        part = Text(tokens[start : start + step])
        ids = torch.from_numpy(part.tokens).view(BATCH_SIZE, SEQ_LEN).to(options.device)
        runs: dict[str, Callable[[], Any]] = {"bare": partial(model.base_model, input_ids=ids, use_cache=False)}
        for name, observers in variants.items():
            runs[name] = partial(measure, model, capture, {"text": part}, **settings, observers=observers)
        turn = start // step % len(runs)  # none is always the first
        for name in [*runs, *runs][turn : turn + len(runs)]:
            times[name].append(seconds(runs[name], options.device))
    bare = statistics.median(times["bare"][1:])
    print(
        f"bare forward: {step / bare:.0f} tokens/s, {options.tokens} tokens, hidden {options.hidden}, {options.device}"
    )
    for name in variants:
        print(f"{name}: time x {statistics.median(times[name][1:]) / bare:.3f}")


if __name__ == "__main__":
    main()
