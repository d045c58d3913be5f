"""What analysing routes costs: time of the pass of `analyze-routing` against a bare forward over the same tokens.

    python -m tests.benchmarks.routing_overhead [--tokens 204800] [--hidden 512] [--layers 4] [--device cpu]

A random Mixtral that `moetool upcycle` makes is sent the same batches bare and with what the command counts; batches
alternate between the variants, so that a busy machine slows all. The ratio of `unit use` is of the whole pass: it looks
at the first 8192 tokens of a text only, and what it costs there is spread over the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moetool.checkpoint.model import load_model
from moetool.cli import run as moetool
from moetool.routing.capture import RouterCapture
from moetool.routing.comparison import RouteFile
from moetool.routing.origin import read_origin
from moetool.routing.shape import probe
from moetool.routing.text_pass import Batch, Observer, measure
from moetool.routing.unit_use import SAMPLE, UnitUse
from moetool.routing.vocabulary import TokenCounts

SEQ_LEN, BATCH_SIZE, VOCABULARY = 512, 4, 8000
STEP = SEQ_LEN * BATCH_SIZE


class Text:
    """Random tokens."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens
        self.num_tokens = len(tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length]


def upcycled(folder: Path, options: argparse.Namespace) -> Path:
    """A random dense model, upcycled with half of its units redrawn."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(options.hidden // 64, 2),
        num_key_value_heads=max(options.hidden // 128, 1),
    )
    LlamaForCausalLM(config).save_pretrained(folder / "dense")
    shape = ("--num-experts", str(options.experts), "--top-k", str(options.top_k))
    with contextlib.redirect_stdout(io.StringIO()):
        assert moetool(["upcycle", str(folder / "dense"), str(folder / "moe"), *shape, "--quiet"]) == 0
    return folder / "moe"


def seconds(run: Callable[[], Any], device: str) -> float:
    """Wall time of a call, the device's work included."""
    began = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def at(start: int, observer: Observer) -> Observer:
    """An observer that is told where a batch that is measured by itself lies in the text."""

    def observe(name: str, route: Any, batch: Batch) -> None:
        observer(name, route, Batch(start, batch.tokens_N, batch.next_N, batch.ids_BS, batch.mask_T))

    return observe


def main() -> None:
    """Print one line a variant."""
    parser = argparse.ArgumentParser()
    defaults = {"tokens": 204_800, "hidden": 512, "layers": 4, "experts": 8, "top-k": 2}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure_all(upcycled(Path(temporary), options), options)


@torch.inference_mode()
def measure_all(moe: Path, options: argparse.Namespace) -> None:
    """Time every batch in every variant."""
    model = load_model(moe, device=options.device)
    origin = read_origin(moe)
    assert origin
    whole = {"text": Text(np.random.default_rng(0).integers(0, VOCABULARY, options.tokens // STEP * STEP))}
    capture = RouterCapture(model)
    empty = probe(model, capture)
    counts = TokenCounts(whole, options.tokens, empty, empty.layers)
    routes = RouteFile(moe.parent, whole, options.tokens, empty)
    use = UnitUse(model, origin)
    assert use.note is None, use.note
    variants: dict[str, list[Observer]] = {
        "routes": [],
        "routes and tokens by expert": [counts.observe],
        "routes, tokens and the choices that --compare keeps": [counts.observe, routes.write],
        "routes, tokens and unit use": [counts.observe, use.observe],
    }
    settings: dict[str, Any] = {"seq_len": SEQ_LEN, "batch_size": BATCH_SIZE, "max_tokens": STEP}
    times: dict[str, list[float]] = {name: [] for name in ("bare", *variants)}
    for start in range(0, whole["text"].num_tokens, STEP):
        part = Text(whole["text"].tokens[start : start + STEP])
        ids = torch.from_numpy(part.tokens).view(BATCH_SIZE, SEQ_LEN).to(options.device)
        runs: dict[str, Callable[[], Any]] = {"bare": partial(model.base_model, input_ids=ids, use_cache=False)}
        if not start:
            seconds(runs["bare"], options.device)  # warm
        for name, observers in variants.items():
            placed = [at(start, observer) for observer in observers]
            runs[name] = partial(measure, model, capture, {"text": part}, **settings, observers=placed)
        turn = start // STEP % len(runs)  # none is always the first
        for name in [*runs, *runs][turn : turn + len(runs)]:
            times[name].append(seconds(runs[name], options.device))
    bare, looked_at = statistics.median(times["bare"]), -(-SAMPLE // STEP)
    print(
        f"bare forward: {STEP / bare:.0f} tokens/s; {whole['text'].num_tokens} tokens, hidden {options.hidden},"
        f" {options.layers} layers, {options.experts} experts, top-{options.top_k}, {options.device}"
    )
    for name in list(variants)[:3]:
        print(f"{name}: time x {statistics.median(times[name]) / bare:.3f}")
    # Batches that are looked at and those that are not have times of their own: a median of each.
    used = times["routes, tokens and unit use"]
    inside = statistics.median(used[:looked_at])
    outside = statistics.median(used[looked_at:]) if len(used) > looked_at else inside
    total = (inside * looked_at + outside * (len(used) - looked_at)) / len(used)
    print(f"routes, tokens and unit use, where units are looked at: time x {inside / bare:.3f}")
    print(f"routes, tokens and unit use, the whole pass: time x {total / bare:.3f}")


if __name__ == "__main__":
    main()
