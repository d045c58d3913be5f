"""Training speed of `moetool cpt` against a bare loop and the Hugging Face Trainer, in one run.

    python -m tests.benchmarks.cpt_speed [--rounds 5] [--steps 12] [--folder DIR] [--precision bf16] [--processor-time]

A random Mixtral (8 layers, hidden 512, intermediate 1024, 8 experts top-2, vocabulary 8192), 2048 tokens a
step in sequences of 512, AdamW fused, gradients clipped at 1, the same windows of tokens. Sides:

* cpt: `moetool cpt` with its default balance losses and metrics.
* bare: transformers' model and AdamW in a loop, no balance loss, no metrics but the loss.
* trainer: the Hugging Face Trainer with the model's own pooled balance loss.

Each round runs every side in a process of its own, in turn; of each the median step counts, the first
quarter of the steps left out; then the medians over the rounds. bf16, the default on a GPU, is autocast on the sides
other than cpt. On a CPU that others use, --processor-time counts the seconds of all threads of a side, and not those
that it waits; OMP_NUM_THREADS=1 then keeps threads from waiting for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

SIDES = ("cpt", "bare", "trainer")
Clock = Callable[[], float]
SEQ_LEN, BATCH = 512, 4
VOCABULARY, LR = 8192, 3e-4


def prepare(folder: Path, steps: int) -> None:
    """Write the model and a text; its tokens are in the cache after the first side."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from tests import tiny

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=SEQ_LEN,
        bos_token_id=0,
        eos_token_id=0,
    )
    MixtralForCausalLM(config).save_pretrained(folder / "model")
    tiny.save_tokenizer(folder / "model")
    words = (f"{i} {i * i} {i % 7} {' '.join(tiny.TEXT)}\n" for i in range(steps * 2048 // 40 + 200))
    (folder / "text.txt").write_text("".join(words))


def training(folder: Path, steps: int, precision: Any) -> tuple[Any, Any]:
    """The run's resolved configuration and its mixture of tokens, as `moetool cpt` makes them."""
    import torch

    from moetool.train.batches import mix, open_corpus
    from moetool.train.config import TrainConfig

    config = TrainConfig(
        model=folder / "model",
        out=folder / "out",
        train={"text": str(folder / "text.txt")},
        val_fraction=0,
        document="line",
        max_steps=steps,
        seq_len=SEQ_LEN,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        lr=LR,
        save_every=steps,
        precision=precision,
    ).resolve(SEQ_LEN, {"aux": 0.01, "z-loss": 0.001}, torch.cuda.is_available())
    return config, mix(open_corpus(config, VOCABULARY), config)


def cpt(folder: Path, steps: int, precision: Any, clock: Clock) -> list[float]:
    """Seconds of each step of the real command."""
    from moetool.cli import run

    out = folder / "out"
    options = [
        "--train", f"text={folder / 'text.txt'}", "--val-fraction", 0, "--document", "line", "--max-steps", steps,
        "--seq-len", SEQ_LEN, "--global-batch-size", BATCH, "--micro-batch-size", BATCH, "--lr", LR,
        "--save-every", steps, "--no-resume", "--quiet", *(["--precision", precision] if precision else []),
    ]  # fmt: skip
    with patch("moetool.train.loop.time", SimpleNamespace(perf_counter=clock)):
        if code := run([str(argument) for argument in ("cpt", folder / "model", out, *options)]):
            raise SystemExit(code)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [SEQ_LEN * BATCH / row["tokens_per_second"] for row in rows]


def load(folder: Path) -> Any:
    import torch
    from transformers import MixtralForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return MixtralForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).to(device)


def bare(folder: Path, steps: int, precision: Any, clock: Clock) -> list[float]:
    """Seconds of each step of a loop that does no more than it must."""
    import torch
    from torch.nn import functional as F

    config, mixture = training(folder, steps, precision)
    model = load(folder).train()
    device = model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    seconds = []
    for step in range(steps):
        began = clock()
        tokens = torch.stack([torch.from_numpy(mixture.tokens(n)) for n in mixture.batch(step)]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # as every loop that shows its loss
        seconds.append(clock() - began)
    return seconds


def trainer(folder: Path, steps: int, precision: Any, clock: Clock) -> list[float]:
    """Seconds of each step of the Hugging Face Trainer with the model's own balance loss."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    config, mixture = training(folder, steps, precision)
    model = load(folder)
    model.config.output_router_logits = True
    model.config.router_aux_loss_coef = 0.01

    class Windows(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return steps * BATCH

        def __getitem__(self, n: int) -> dict[str, Any]:
            tokens = torch.from_numpy(mixture.tokens(n))[:-1]
            return {"input_ids": tokens, "labels": tokens}

    seconds: list[float] = []

    class Times(TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(clock() - self.began)

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=config.precision == "bf16",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=Windows(), callbacks=[Times()]).train()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=None)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        clock = time.process_time if arguments.processor_time else time.perf_counter
        measure = {"cpt": cpt, "bare": bare, "trainer": trainer}[arguments.side]
        print(json.dumps(measure(arguments.folder, arguments.steps, arguments.precision, clock)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        os.environ["MOETOOL_CACHE"] = str(folder / "cache")
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as moetool sets it; without it a busy core slows threads
        prepare(folder, arguments.steps)
        speeds: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(arguments.rounds):
            for side in SIDES[number % 3 :] + SIDES[: number % 3]:
                command = [sys.executable, "-m", "tests.benchmarks.cpt_speed", "--side", side, "--folder", name]
                command += ["--steps", str(arguments.steps)]
                command += ["--precision", arguments.precision] if arguments.precision else []
                command += ["--processor-time"] if arguments.processor_time else []
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                seconds = json.loads(done.stdout.splitlines()[-1])[arguments.steps // 4 :]
                speeds[side].append(SEQ_LEN * BATCH / statistics.median(seconds))
                print(f"round {number + 1} {side:8}{speeds[side][-1]:10.0f} tokens/s", flush=True)
    median = {side: statistics.median(values) for side, values in speeds.items()}
    for side in SIDES:
        print(f"{side:8}{median[side]:10.0f} tokens/s  ({', '.join(f'{value:.0f}' for value in speeds[side])})")
    print(f"cpt / bare    {median['cpt'] / median['bare']:.3f}  (at least 1 is asked for)")
    print(f"cpt / trainer {median['cpt'] / median['trainer']:.3f}")
    print(f"{os.cpu_count()} cores, torch {version('torch')}, transformers {version('transformers')}")


if __name__ == "__main__":
    main()
