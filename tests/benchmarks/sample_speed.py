"""`moetool sample` against plain `generate`, one sample at a time and in batches of the same size.

    python -m tests.benchmarks.sample_speed [--seq-len 256] [--batch-size 32] [--batches 2] [--rounds 3]

A random byte-level Llama of 1.8 million parameters, on one core. Plain `generate` makes token ids in memory. moetool
does what grows with the text as well: it decodes, writes and fsyncs each batch. Nothing ends a sample before
`--seq-len`, so each side makes the same number of tokens. Rounds are interleaved; the ratios are medians of the
rounds' ratios, by processor time, which varies less than the clock when other programs run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from moetool.sample.options import SampleOptions
from moetool.sample.output import Unfinished, hidden
from moetool.sample.prompts import open_prompts
from moetool.sample.run import sample

NEVER = 256  # the end-of-text token, which the head never gives


class Bytes:
    """A tokenizer of bytes."""

    def decode(self, ids: list[int], **asked: Any) -> str:
        return bytes(ids).decode("utf-8", "replace")


def build() -> Any:
    """The model; its head gives every byte and nothing else."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head = torch.nn.Linear(192, 257, bias=True)
    with torch.no_grad():
        model.lm_head.bias.zero_()[NEVER] = -1e9
    return model


def main() -> None:
    """Print tokens per second of each side, and moetool's ratio to the others."""
    parser = argparse.ArgumentParser()
    for name, default in (("seq-len", 256), ("batch-size", 32), ("batches", 2), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = build()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, torch {torch.__version__}")

    def plain(batch_size: int, batches: int) -> int:
        ids = torch.zeros(batch_size, 1, dtype=torch.long)
        config = GenerationConfig(
            do_sample=True, top_k=0, top_p=1.0, max_new_tokens=asked.seq_len, eos_token_id=NEVER, pad_token_id=NEVER
        )
        for _ in range(batches):
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return batch_size * batches * int(asked.seq_len)

    def ours() -> int:
        total = int(asked.batch_size * asked.batches * asked.seq_len)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "o.jsonl")
            hidden(out).mkdir()
            options = SampleOptions("", out, total, batch_size=asked.batch_size)
            prompts = open_prompts(0, {}, 0, asked.seq_len, 0)
            sample(model, Bytes(), prompts, options, asked.seq_len, NEVER, Unfinished(out, {}, False))
        return total

    sides: dict[str, Callable[[], int]] = {
        "generate, one sample at a time": lambda: plain(1, 2),
        f"generate, {asked.batch_size} at a time": lambda: plain(asked.batch_size, asked.batches),
        f"moetool sample, {asked.batch_size} at a time": ours,
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(asked.rounds):
        for name, side in sides.items():
            began = time.process_time()
            speeds[name].append(side() / (time.process_time() - began))
    own = list(speeds.values())[-1]
    for name, found in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(own, found, strict=True))
        print(
            f"{name:<34} {statistics.median(found):8.0f} tokens per second of processor time, moetool {ratio:.2f} times"
        )


if __name__ == "__main__":
    main()
