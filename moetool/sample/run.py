"""The loop: batch after batch of samples, each from its own seed, up to the number of tokens."""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from typing import Any

import torch

from moetool.checkpoint.model import tokenizer_sha256
from moetool.checkpoint.reader import content_fingerprint
from moetool.data.mixture import key
from moetool.errors import DataError
from moetool.progress import Progress, silent
from moetool.sample.generate import generate
from moetool.sample.options import SampleOptions
from moetool.sample.output import Done, Unfinished
from moetool.sample.prompts import Prompts

_CUT = "\ufffd"  # what a character of which some bytes are missing is decoded as


def fingerprint(folder: Path) -> str:
    """A digest of the model and of its tokenizer."""
    return hashlib.sha256(f"{content_fingerprint(folder)} {tokenizer_sha256(folder)}".encode()).hexdigest()


def begin_and_end(tokenizer: Any, folder: Path) -> tuple[int, int]:
    """The token before a document, and the one that ends it.

    A document begins with the tokenizer's beginning-of-text token. Where it has none, it follows the end of another
    one, as in the windows that `cpt` reads.

    Raises:
        DataError: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of {folder} has no end-of-text token, at which a sample would end; set eos_token in its"
            " tokenizer_config.json"
        )
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return int(begin), int(tokenizer.eos_token_id)


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    options: SampleOptions,
    seq_len: int,
    end: int,
    unfinished: Unfinished,
    progress: Progress = silent,
) -> None:
    """Generate the samples that are not done yet, and write them.

    A batch is a pure function of the options and of how much is done before it, so it does not matter where a run was
    interrupted.

    Args:
        model: a causal language model of transformers.
        tokenizer: of the model.
        prompts: what samples begin with.
        options: of the command.
        seq_len: the longest sample, with its prompt.
        end: the end-of-text token.
        unfinished: the text so far.
        progress: of the tokens.

    Raises:
        CheckpointError: the model gives no probabilities.
        DataError: it knows fewer tokens than its tokenizer, or writes nothing.
    """
    room = seq_len - prompts.num_tokens
    began, before = time.monotonic(), unfinished.done.num_tokens

    def tell(tokens: int) -> None:
        done = min(unfinished.done.num_tokens + tokens, options.max_tokens)
        speed = (done - before) / max(time.monotonic() - began, 1e-9)
        progress("sample", done, options.max_tokens, f"{speed:.0f} tokens/s")

    tell(0)
    while (done := unfinished.done).num_tokens < options.max_tokens:
        numbers = range(done.num_samples, done.num_samples + _rows(done, options, room))
        rows = [prompts.tokens(n) for n in numbers]
        new = generate(
            model,
            torch.tensor([[prompts.begin, *row] for row in rows]),
            length=min(room, options.max_tokens - done.num_tokens),
            end=end,
            temperature=options.temperature,
            seed=key(options.seed, "sample", done.num_batches),
            tell=tell,
        )
        _write(unfinished, tokenizer, prompts, numbers, rows, new, options.max_tokens, end)
        tell(0)
    if unfinished.done.num_empty == unfinished.done.num_samples:
        unfinished.discard()
        raise DataError(
            "the model ends every text at once, so there is nothing to write; give prompts: --prompts NAME=PATH"
        )


def _rows(done: Done, options: SampleOptions, room: int) -> int:
    """Samples of the next batch: few where the tokens that are left need few, by the mean length so far."""
    left = options.max_tokens - done.num_tokens
    mean = done.num_tokens / done.num_samples if done.num_samples else room
    return min(options.batch_size, math.ceil(left / mean))


def _write(
    unfinished: Unfinished,
    tokenizer: Any,
    prompts: Prompts,
    numbers: range,
    rows: list[list[int]],
    new: list[list[int]],
    max_tokens: int,
    end: int,
) -> None:
    """Write a batch as text. Its last sample is cut where the tokens are reached, and those behind it are left out."""
    left = max_tokens - unfinished.done.num_tokens
    lines = []
    counts = dict.fromkeys(("num_samples", "num_empty", "num_ended", "num_tokens", "num_prompt_tokens"), 0)
    for n, prompt, tokens in zip(numbers, rows, new, strict=True):
        if not left:
            break
        tokens = tokens[:left]
        left -= len(tokens)
        ended = tokens[-1] == end
        text = tokenizer.decode(prompt + tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = text if ended else text.rstrip(_CUT)
        empty = not text or text.isspace()
        counts["num_samples"] += 1
        counts["num_empty"] += empty
        counts["num_ended"] += ended
        counts["num_tokens"] += len(tokens)
        counts["num_prompt_tokens"] += len(prompt)
        if not empty:
            name = prompts.name(n)
            lines.append(
                {"text": text, **({"prompt": name} if name else {}), "num_tokens": len(tokens), "ended": ended}
            )
    unfinished.add(lines, num_batches=1, **counts)
