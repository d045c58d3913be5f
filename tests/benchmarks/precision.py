"""What bf16 and smaller moments cost in loss, against fp32 and against autocast, on several seeds.

    python -m tests.benchmarks.precision --text FILE [--seeds 3] [--steps 200] [--folder DIR] [--json FILE]

A small Llama (2 layers, hidden 128, intermediate 128, vocabulary 1024) is trained on the text in fp32, then upcycled
to 4 experts top-2 by `moetool upcycle`. Each seed draws other units and another order of the text. From there every way
trains on the same batches, on one thread: 512 tokens a step in two micro-batches, default balance losses, a
cosine from 1e-3. All are runs of `moetool cpt`, but `autocast`: fp32 weights, and transformers' own forward in
torch.autocast, in the same loop. `fp32, other kernels` computes the experts one by one: what rounding alone does.

For speed alone, on a CPU without instructions for bf16: products of bf16 matrices are taken in fp32 and rounded once,
as tensor cores do, and torchao's update is not compiled. torchao is taken from where `make` puts it.

A difference is that of a seed, against the same seed. Finished runs in --folder are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

Losses = dict[str, list[dict[str, float]]]  # of each way and seed: the mean of all steps, the last validation
VOCABULARY, SEQ_LEN, BATCH, MICRO_BATCH, LR = 1024, 128, 4, 2, 1e-3
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp32, other kernels": {"precision": "fp32"},
    "autocast": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16, moments bf16": {"precision": "bf16", "moments": "bf16"},
    "bf16, moments 8bit": {"precision": "bf16", "moments": "8bit"},
    "bf16, no masters": {"precision": "bf16", "master_weights": False},
    "bf16, moments 8bit, no masters": {"precision": "bf16", "moments": "8bit", "master_weights": False},
}


def save_dense(folder: Path, text: Path) -> None:
    """A random Llama, with a byte-level BPE of the text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQ_LEN,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


def take_products_in_fp32() -> Any:
    """Let bf16 matrices be multiplied in fp32 and rounded once; fp32 ones as before, bit for bit.

    Returns:
        What has to be kept as long as that shall hold.
    """
    import torch
    from torch import Tensor

    def product(one: Tensor, two: Tensor) -> Tensor:
        return torch.addmm(torch.zeros(()), one.float(), two.float(), beta=0).to(one.dtype)

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm", product, "CPU")
    library.impl("mm.out", lambda one, two, out: out.copy_(product(one, two)), "CPU")
    return library


def train(model: Path, out: Path, text: Path, steps: int, seed: int, way: str) -> None:
    """`moetool cpt`, or the same with transformers' forward under autocast; nothing if OUT holds the finished run."""
    import torch

    from moetool.train.build import build_run
    from moetool.train.config import TrainConfig
    from moetool.train.loss import whole_loss
    from moetool.train.open import open_run

    config = TrainConfig(
        model=model,
        out=out,
        train={"text": str(text)},
        document="line",
        max_steps=steps,
        seq_len=SEQ_LEN,
        global_batch_size=BATCH,
        micro_batch_size=MICRO_BATCH,
        lr=LR,
        eval_every=steps,
        save_every=steps,
        keep_checkpoints=1,
        seed=seed,
        **WAYS[way],
    )

    def under_autocast(*arguments: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return whole_loss(*arguments)

    with open_run(config) as opened, patch("torch.compile", lambda function, **how: function):
        if opened.plan:
            run = build_run(opened.plan)
            if way == "autocast":
                run.language_loss = under_autocast
            if way in ("autocast", "fp32, other kernels"):
                run.core.set_experts_implementation("eager")  # autocast does not know grouped products
            run.claim()
            run.train()
            run.finish({})


def measure(folder: Path, text: Path, steps: int, seeds: int, ways: Sequence[str]) -> Losses:
    """Train in each way with each seed."""
    from moetool.cli import run

    if not (folder / "random").exists():
        save_dense(folder / "random", text)
    train(folder / "random", folder / "dense", text, 2 * steps, 0, "fp32")
    found: Losses = {}
    for seed in range(seeds):
        moe = folder / f"moe-{seed}"
        if run(["upcycle", str(folder / "dense"), str(moe), "--num-experts", "4", "--seed", str(seed), "--quiet"]):
            raise SystemExit("moetool upcycle failed")
        for way in ways:
            out = folder / f"{way.replace(', ', '-').replace(' ', '-')}-{seed}"
            train(moe, out, text, steps, seed, way)
            rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            entry = {
                "mean": statistics.fmean(row["loss"] for row in rows if "loss" in row),
                "validation": rows[-1]["val"]["text"],
            }
            found.setdefault(way, []).append(entry)
            print(f"seed {seed} {way:32}{entry['mean']:9.5f}{entry['validation']:9.5f}", file=sys.stderr, flush=True)
    return found


def difference(found: Losses, way: str, base: str, what: str) -> list[float]:
    """Percent of a way's loss above that of another, of each seed."""
    return [100 * (one[what] / other[what] - 1) for one, other in zip(found[way], found[base], strict=True)]


def table(found: Losses, what: str) -> str:
    """Markdown: a loss's mean over seeds, and differences as mean (lowest to highest of the seeds)."""
    bases = [way for way in ("fp32", "autocast", "bf16") if way in found]
    lines = [f"| {what} loss | | {' | '.join(f'against {base}' for base in bases)} |", "|---" * (2 + len(bases)) + "|"]
    for way, seeds in found.items():
        cells = [way, f"{statistics.fmean(entry[what] for entry in seeds):.4f}"]
        for base in bases:
            parts = difference(found, way, base, what)
            low_high = f"{statistics.fmean(parts):+.3f} % ({min(parts):+.3f} to {max(parts):+.3f})"
            cells.append("" if way == base else low_high)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="plain text, a document a line")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="for models and runs; by default a temporary one")
    parser.add_argument("--json", type=Path, help="where the figures are written")
    parser.add_argument("--only", action="append", choices=WAYS, help="(repeatable) these ways instead of all")
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    sys.path.append(str(Path(sys.prefix) / "optional"))
    kept = take_products_in_fp32()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["MOETOOL_CACHE"] = str(folder / "cache")
        found = measure(folder, arguments.text, arguments.steps, arguments.seeds, arguments.only or list(WAYS))
    del kept
    print(table(found, "mean"), table(found, "validation"), sep="\n\n")
    if arguments.json:
        arguments.json.write_text(json.dumps({"steps": arguments.steps, "ways": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
