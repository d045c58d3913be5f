"""`moetool tokenize` against the bare tokenizer, on one core and on two.

    python -m tests.benchmarks.tokenize_speed --text FILE [--text FILE ...] [--megabytes 1000] [--rounds 3]
        [--cores 1 --cores 2] [--tokenizer gpt2] [--format text.jsonl] [--folder DIR]

The text is what is in the files (1 MB or more each), repeated in random order up to `--megabytes`: as JSONL of
documents of 10 to 60,000 characters (1100 in the median), and as plain text with each line a document. Two
tokenizers are trained on the files, byte-level BPEs of 32,000 entries: one splits words as GPT-2 does, one by
Llama 3's regular expression.

The bare tokenizer gets documents that are in memory, in batches of 8 million characters, and its ids become a NumPy
array: nothing is read, hashed or written. moetool does all of the command that grows with the text: it hashes, reads,
tokenizes, writes and fsyncs. Both run in one process, which is pinned to the cores. Rounds are interleaved;
ratios are medians of the rounds' ratios. "busy" is the share of the cores in use on an idle machine: threads that
run or wait for a core, counted every 10 ms and at most one per core. It and processor time vary less than
seconds when other programs run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetool.checkpoint.model import load_tokenizer
from moetool.data.make_tokens import write_tokens
from moetool.data.text import TextSource, content_sha256, read_documents

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZERS, FORMATS = ("gpt2", "llama3"), ("text.jsonl", "text.txt")
BATCH = 2**23  # characters


class Run(NamedTuple):
    """What one side needed: the clock when it began and ended, seconds of processor time, and its tokens."""

    side: str
    began: float
    ended: float
    processor: float
    tokens: int

    @property
    def wall(self) -> float:
        return self.ended - self.began


def train(folder: Path, name: str, texts: list[str]) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    tokenizer.pre_tokenizer = {
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "llama3": pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
    }[name]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines(True)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder / name)


def write_text(folder: Path, texts: list[str], size: int) -> None:
    chance, written = random.Random(0), 0
    with (folder / "text.jsonl").open("w") as file:
        while written < size:
            text = chance.choice(texts)
            length = min(10 + int(chance.lognormvariate(7, 1.2)), 60_000, len(text))
            start = chance.randrange(len(text) - length + 1)
            row = json.dumps({"text": text[start : start + length], "id": written}, ensure_ascii=False) + "\n"
            file.write(row)
            written += len(row.encode())
    lines, written = [line for text in texts for line in text.splitlines()], 0
    with (folder / "text.txt").open("w") as file:
        while written < size:
            line = chance.choice(lines) + "\n"
            file.write(line)
            written += len(line.encode())


def bare(encoder: Any, documents: list[str]) -> int:
    tokens, start = 0, 0
    while start < len(documents):
        batch, size = [], 0
        while start < len(documents) and size < BATCH:
            batch.append(documents[start])
            size += len(documents[start])
            start += 1
        ids = array("I")
        for encoding in encoder.encode_batch_fast(batch, add_special_tokens=False):
            ids.fromlist(encoding.ids)
        tokens += len(np.frombuffer(ids, np.uint32).astype(np.uint16)) + len(batch)
    return tokens


def moetool(folder: Path, tokenizer: Any, text: Path, begin: Callable[[], None]) -> int:
    """All that the command does and that grows with the text: hash it, read it, tokenize it, write it."""
    source = TextSource(str(text), document="line")

    def documents() -> Iterator[str]:
        begin()
        content_sha256(source)
        yield from read_documents(source)

    return write_tokens(documents(), tokenizer, folder / "out", overwrite=True).num_tokens


def work(folder: Path, tokenizer: str, text: str, rounds: int) -> None:
    """Run in a process of its own, on the cores to measure: prints a line of JSON per run."""
    loaded = load_tokenizer(folder / tokenizer)
    rows = (folder / text).read_text().splitlines()
    documents = [str(json.loads(row)["text"]) if text.endswith(".jsonl") else row for row in rows]
    documents = [document for document in documents if document and not document.isspace()]
    began = processor = 0.0

    def begin() -> None:
        nonlocal began, processor
        began, processor = time.monotonic(), time.process_time()

    for number in range(rounds):
        for side in ("bare", "moetool") if number % 2 == 0 else ("moetool", "bare"):
            if side == "bare":
                begin()
                tokens = bare(loaded.backend_tokenizer, documents)
            else:
                tokens = moetool(folder, loaded, folder / text, begin)
            run = Run(side, began, time.monotonic(), time.process_time() - processor, tokens)
            print(json.dumps(run), flush=True)


def states(process: int) -> int:
    """Threads of a process that run or wait for a core."""
    running = 0
    for path in Path(f"/proc/{process}/task").glob("*/stat"):
        try:
            running += path.read_text().rpartition(")")[2].split()[0] == "R"
        except OSError:  # the thread has just ended
            continue
    return running


def compare(folder: Path, tokenizer: str, text: str, cores: int, rounds: int) -> str:
    """Measure one case; gives a row of the table."""
    used = sorted(os.sched_getaffinity(0))[:cores]
    command = ["taskset", "-c", ",".join(map(str, used)), sys.executable, "-m", "tests.benchmarks.tokenize_speed"]
    command += ["--work", tokenizer, "--text", text, "--rounds", str(rounds), "--folder", str(folder)]
    samples: list[tuple[float, float]] = []
    with (folder / "runs").open("w") as file:
        process = subprocess.Popen(command, stdout=file)
        while process.poll() is None:
            samples.append((time.monotonic(), min(states(process.pid), cores) / cores))
            time.sleep(0.01)
    assert process.returncode == 0
    runs = [Run(*json.loads(line)) for line in (folder / "runs").read_text().splitlines()]
    assert len({run.tokens for run in runs}) == 1
    ours, theirs = ([run for run in runs if run.side == side] for side in ("moetool", "bare"))
    busy = [
        statistics.fmean(share for moment, share in samples for run in side if run.began < moment < run.ended)
        for side in (theirs, ours)
    ]
    cells = [f"{tokenizer}, {text[5:]}", str(cores)]
    for side in (theirs, ours):
        wall, processor = (statistics.median(getattr(run, name) for run in side) for name in ("wall", "processor"))
        cells.append(f"{wall:.1f} ({processor:.1f})")
    for name in ("wall", "processor"):
        pairs = zip(ours, theirs, strict=True)
        cells.append(f"{statistics.median(getattr(mine, name) / getattr(bare, name) for mine, bare in pairs):.2f}")
    cells += [f"{100 * share:.0f} %" for share in busy]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, action="append")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, action="append")
    parser.add_argument("--format", choices=FORMATS, action="append")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--work", choices=TOKENIZERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.folder, arguments.work, arguments.text[0], arguments.rounds)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder, texts = Path(name), [Path(path).read_text() for path in arguments.text]
        write_text(folder, texts, arguments.megabytes * 10**6)
        print(f"{arguments.megabytes} MB, {os.cpu_count()} cores, tokenizers {version('tokenizers')}")
        print("| tokenizer, text | cores | bare s (processor s) | moetool s (processor s) | moetool / bare |", end="")
        print(" processor time | bare busy | moetool busy |\n|---|---|---|---|---|---|---|---|")
        tokenizers = arguments.tokenizer or TOKENIZERS
        for tokenizer in tokenizers:
            train(folder, tokenizer, texts)
        for cores in arguments.cores or (1, 2):
            for tokenizer, text in product(tokenizers, arguments.format or FORMATS):
                print(compare(folder, tokenizer, text, cores, arguments.rounds), flush=True)
        print("load average at the end:", *os.getloadavg())


if __name__ == "__main__":
    main()
