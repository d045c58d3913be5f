"""`moetool tokenize`: text to a folder of tokens that later runs open instantly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import typer

from moetool.commands.console import Console, count, escape, size
from moetool.commands.options import Output, options_text
from moetool.option import document_option, option, text_field_option


@dataclass(frozen=True)
class TokenizeOptions:
    """The options of `moetool tokenize`."""

    inputs: Sequence[str] = option(
        "Text, JSONL or Parquet: a file, folder, glob, or hf:owner/name\\[@revision]\\[#config/split].",
        positional=True, metavar="INPUT",
    )  # fmt: skip
    out: Path = option("Output folder.", metavar="DIR")
    tokenizer: str = option("Model with the tokenizer to use: a folder, or owner/name\\[@revision].", metavar="MODEL")
    text_field: str = text_field_option()
    document: Literal["file", "line", "paragraph"] = document_option()
    overwrite: bool = option("Replace existing tokens in DIR.", False, flag="--overwrite", recorded=False)


def tokenize(context: typer.Context, options: TokenizeOptions, output: Output) -> dict[str, Any]:
    """Tokenize text into a folder that cpt and analyze-routing open instantly.

    The inputs form one stream, in the order given. Each document ends with the end-of-text token.
    """
    from moetool.checkpoint.folder import FolderLock
    from moetool.checkpoint.hub import resolve_model
    from moetool.checkpoint.model import load_tokenizer
    from moetool.data.make_tokens import describe, write_tokens
    from moetool.data.text import TextSource, read_documents
    from moetool.data.tokens import open_tokens, read_manifest

    out = options.out
    console = Console(context, output.json, output.quiet)
    began = time.monotonic()
    folder = resolve_model(options.tokenizer, weights=False)
    loaded = load_tokenizer(folder)
    sources = [TextSource(path, options.text_field, options.document) for path in options.inputs]
    with FolderLock(out), console.progress() as progress:
        about = describe(sources, folder, loaded, progress)
        found = read_manifest(out)
        there = found is not None and found.get("key") == about["key"] and not options.overwrite
        if there:
            stream = open_tokens(out)
        else:
            documents = chain.from_iterable(read_documents(source, progress) for source in sources)
            files = {"moetool.yaml": options_text(context).encode()}
            stream = write_tokens(documents, loaded, out, about, options.overwrite, files)
    manifest = stream.manifest
    result = {
        "out": str(out),
        "num_tokens": stream.num_tokens,
        "num_documents": stream.num_documents,
        "num_bytes": manifest["num_bytes"],
        "bytes_per_token": round(manifest["num_bytes"] / stream.num_tokens, 4),
        "dtype": manifest["dtype"],
        "already_there": there,
        "seconds": round(time.monotonic() - began, 3),
    }
    console.result(
        result,
        f"{escape(str(out))} holds {count(stream.num_tokens)} tokens of {count(stream.num_documents)} documents"
        f" ({size(manifest['num_bytes'])} of text, {result['bytes_per_token']:.2f} bytes per token,"
        f" {manifest['dtype']}); "
        + ("already made from the same text and tokenizer" if there else f"{result['seconds']:.1f} s"),
    )
    return result
