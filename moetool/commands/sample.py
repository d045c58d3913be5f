"""`moetool sample`: text that a model writes itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moetool.commands.console import Console, count, escape, size
from moetool.commands.memory_estimate import estimated, tell_weights
from moetool.commands.options import Output, options_text
from moetool.sample.options import SampleOptions

if TYPE_CHECKING:
    from moetool.sample.output import Unfinished
    from moetool.sample.prompts import Prompts


def sample(context: typer.Context, asked: SampleOptions, output: Output) -> dict[str, Any]:
    """Generate text with a model, to replay if its own training text is not public.

    Each line of OUT.jsonl is a sample, drawn from the model's distribution, for cpt --replay self=OUT.jsonl. The
    file appears once it is complete. The same command continues a killed run and, on the same machine, gives the
    same text.
    """
    from moetool.checkpoint.folder import FolderLock
    from moetool.checkpoint.hub import resolve_model
    from moetool.checkpoint.model import load_tokenizer, skeleton
    from moetool.data.text import TextSource
    from moetool.data.tokens import tokenized
    from moetool.routing.text_pass import window
    from moetool.sample.output import Unfinished, finished, hidden
    from moetool.sample.prompts import open_prompts
    from moetool.sample.run import begin_and_end, fingerprint

    console = Console(context, output.json, output.quiet)
    out, started = asked.out, time.monotonic()
    folder = resolve_model(asked.model)
    with FolderLock(hidden(out)):
        tokenizer = load_tokenizer(folder)
        begin, end = begin_and_end(tokenizer, folder)
        with console.progress() as progress:
            texts = {
                name: tokenized(TextSource(path, asked.text_field, asked.document), folder, progress)
                for name, path in asked.prompts.items()
            }
        seq_len = window(skeleton(folder), asked.seq_len)
        prompts = open_prompts(begin, texts, asked.prompt_tokens, seq_len, asked.seed)
        digests = {name: str(text.manifest["sha256"]) for name, text in texts.items()}
        unfinished = Unfinished(out, asked.identity(seq_len, fingerprint(folder), digests), asked.overwrite)
        done = None if asked.overwrite or unfinished.begun else finished(out, unfinished.identity)
        speed = None
        if done is None:
            speed = _generate(console, folder, tokenizer, prompts, asked, seq_len, end, unfinished)
            unfinished.finish(options_text(context))
            done = unfinished.done
        unfinished.discard()
    document = {
        "out": str(out),
        "already_finished": speed is None,
        "num_tokens": done.num_tokens,
        "num_samples": done.num_samples - done.num_empty,
        "num_ended": done.num_ended,
        "num_empty": done.num_empty,
        "num_prompt_tokens": done.num_prompt_tokens,
        "num_bytes": done.num_bytes,
        "tokens_per_second": speed,
        "seconds": round(time.monotonic() - started, 3),
    }
    console.result(document, closing(document))
    return document


def _generate(
    console: Console,
    folder: Path,
    tokenizer: Any,
    prompts: Prompts,
    asked: SampleOptions,
    seq_len: int,
    end: int,
    unfinished: Unfinished,
) -> float:
    """Load the model and write what is not done yet; returns tokens per second."""
    from moetool.checkpoint.model import load_model, pick_device
    from moetool.sample.run import sample as run

    console.say("[dim]vLLM is faster on a GPU, and cpt reads its text as well (docs/sample.md)[/dim]")
    before = unfinished.done.num_tokens
    if before:
        console.say(f"[dim]continues after {count(before)} of {count(asked.max_tokens)} tokens[/dim]")
    device = pick_device(asked.device)
    estimate = tell_weights(console, [folder], asked.dtype, device, asked.device_map)
    with console.progress() as progress, estimated(estimate):
        progress("load the model", 0, 1)
        model = load_model(folder, asked.dtype, None if asked.device_map else device, asked.device_map).eval()
        progress("load the model", 1, 1)
        began = time.monotonic()
        try:
            run(model, tokenizer, prompts, asked, seq_len, end, unfinished, progress)
        except (KeyboardInterrupt, SystemExit):
            console.warn(
                f"stopped after {unfinished.done.num_tokens} of {asked.max_tokens} tokens; the same command continues"
                " from there"
            )
            raise
    return round((unfinished.done.num_tokens - before) / (time.monotonic() - began), 1)


def closing(document: dict[str, Any]) -> str:
    """The result for people."""
    speed, samples = document["tokens_per_second"], document["num_samples"]
    return (
        f"{escape(document['out'])} holds {count(samples)} samples, {count(document['num_tokens'])} generated tokens"
        f" ({size(document['num_bytes'])}; {count(document['num_ended'])} samples ended by the model, the others cut); "
        + ("already made with the same options" if speed is None else f"{count(speed)} tokens/s")
        + f"; to replay it: --replay self={escape(document['out'])}"
    )
