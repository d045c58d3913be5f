"""Documents -> a tokenised folder (see tokens.py): `moetool tokenize`, and the kept tokens of other commands' texts."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np

from moetool.checkpoint.folder import cache_root, sync_folder
from moetool.checkpoint.model import load_tokenizer, tokenizer_sha256
from moetool.data.encode import encode
from moetool.data.folder import durable, unfinished_beside
from moetool.data.text import TextSource, content_sha256, read_documents
from moetool.data.tokens import FILES, FORMAT, FORMAT_VERSION, TokenStream, open_tokens, read_manifest
from moetool.errors import DataError
from moetool.progress import Progress, silent


def write_tokens(
    documents: Iterable[str],
    tokenizer: Any,
    folder: Path,
    about: dict[str, Any] | None = None,
    overwrite: bool = False,
    files: Mapping[str, bytes] | None = None,
    first: int | None = None,
) -> TokenStream:
    """Tokenize documents into a folder, which appears only when it is complete.

    Args:
        documents: each is tokenized without special tokens and ended by the end-of-text token.
        tokenizer: a fast transformers tokenizer (with tokenizer.json).
        folder: the folder to make.
        about: more manifest entries, such as the source of the text.
        overwrite: replace a tokenised folder, which stays until the new one is complete.
        files: small files to put beside the tokens.
        first: only as many whole documents as hold more tokens than that; the rest is not read. None: all.

    Raises:
        DataError: there are no documents, the tokenizer has no end-of-text token, or `folder`
            exists and may not be replaced.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path} has no end-of-text token, which must end each document;"
            " set eos_token in its tokenizer_config.json"
        )
    # The tokenizer's own encoder: the same as `tokenizer(text, add_special_tokens=False)`, a third faster.
    encoder = tokenizer.backend_tokenizer
    encoder.no_truncation()
    encoder.no_padding()
    folder = Path(os.path.realpath(folder))  # a link stays a link; no folder can be renamed onto it
    _check_free(folder, overwrite)
    if folder.is_mount() or folder == Path.cwd():
        raise DataError(
            f"{folder} is a mount point or the current folder, so it cannot be replaced; give one inside it"
        )
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    gc.collect()  # a Ctrl-C while tokenizers works would be lost in a Python finalizer of this garbage
    digest = hashlib.sha256()
    num_documents = num_tokens = num_bytes = 0
    with unfinished_beside(folder) as unfinished, closing(encode(documents, encoder, eos)) as encoded:
        with durable(unfinished / "tokens.bin") as tokens_file, durable(unfinished / "offsets.bin") as offsets_file:
            offsets_file.write(np.zeros(1, "<i8").tobytes())
            for tokens, ends, size in encoded:
                last = None
                if first is not None and num_tokens + len(tokens) > first:
                    last = int(np.searchsorted(ends, first - num_tokens, side="right"))
                    tokens, ends = tokens[: ends[last]], ends[: last + 1]  # however much a batch holds
                data = tokens.astype("<u2" if dtype == "uint16" else "<u4").tobytes()
                digest.update(data)
                tokens_file.write(data)
                offsets_file.write(np.add(ends, num_tokens).astype("<i8").tobytes())
                num_tokens, num_documents = num_tokens + len(tokens), num_documents + len(ends)
                num_bytes += size
                if last is not None:
                    break
        if not num_documents:
            raise DataError(f"no text in {', '.join((about or {}).get('sources', ['the input']))}; give other files")
        manifest = (about or {}) | {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dtype": dtype,
            "num_tokens": num_tokens,
            "num_documents": num_documents,
            "num_bytes": num_bytes,
            "vocab_size": vocab_size,
            "eos_token_id": eos,
            "sha256": digest.hexdigest(),
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        for name, data in {**(files or {}), "manifest.json": text.encode()}.items():
            with durable(unfinished / name) as file:
                file.write(data)
        sync_folder(unfinished)
        _check_free(folder, overwrite)
        for name in reversed(FILES):  # the manifest before the tokens
            (folder / name).unlink(missing_ok=True)
        try:
            os.rename(unfinished, folder)  # the target is absent or an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise DataError(f"{folder}: another process has just written it; run the same command again") from None
        sync_folder(folder.parent)
    return open_tokens(folder)


def tokenized(
    source: TextSource,
    tokenizer_folder: Path,
    progress: Progress = silent,
    first: int | None = None,
    recorded: str = "",
) -> TokenStream:
    """The tokens of a source: opened if it is a tokenised folder, otherwise made once and cached.

    The cache is `tokens/` in `$MOETOOL_CACHE` or `~/.cache/moetool`, with one folder per digest of the
    content, the tokenizer, the field and the document rule.

    Args:
        source: text, or a folder made by `moetool tokenize`.
        tokenizer_folder: a folder that holds a tokenizer, such as a checkpoint.
        progress: called with the bytes read.
        first: tokens that are needed from the beginning, and the one after them; only the documents that hold these
            are tokenized, or taken from a tokenised folder. None: all.
        recorded: a document with digests of texts, of the run that is to be continued. Where one of them is that of all
            tokens, which earlier versions made and may still be in the cache, it is these.

    Raises:
        DataError: the text or the tokenizer cannot be read, or the tokens are of another tokenizer.
    """
    folder = Path(source.path).expanduser()
    if read_manifest(folder) is not None:
        stream = open_tokens(folder)
        tokenizer = load_tokenizer(tokenizer_folder)
        made_with = (stream.manifest.get("tokenizer_sha256"), stream.manifest.get("eos_token_id"))
        if made_with != (tokenizer_sha256(tokenizer_folder), tokenizer.eos_token_id):
            raise DataError(
                f"{folder} was tokenized with another tokenizer, not that of {tokenizer_folder}; give the text itself,"
                f" or tokenize it into a new folder with moetool tokenize --tokenizer {tokenizer_folder}"
            )
        return stream if first is None or stream.manifest["sha256"] in recorded else stream.beginning(first)
    tokenizer = load_tokenizer(tokenizer_folder)
    about = describe([source], tokenizer_folder, tokenizer, progress)
    cache = cache_root() / "tokens"
    if recorded:
        with suppress(DataError):
            every = open_tokens(cache / about["key"])
            if every.manifest["sha256"] in recorded:
                return every
    if first is not None:
        about |= {"first": first, "key": hashlib.sha256(f"{about['key']} {first}".encode()).hexdigest()}
    cache /= about["key"]
    try:
        stream = open_tokens(cache)
        if first is None or stream.is_sound:  # a whole corpus takes minutes to hash
            return stream
        damaged = True
    except DataError:  # absent, or damaged and to be replaced
        damaged = cache.exists()
    try:
        return write_tokens(read_documents(source, progress), tokenizer, cache, about, overwrite=damaged, first=first)
    except DataError as error:
        with suppress(DataError):
            return open_tokens(cache)  # another process has made the same folder in the meantime
        raise error


def describe(
    sources: Sequence[TextSource], tokenizer_folder: Path, tokenizer: Any, progress: Progress = silent
) -> dict[str, Any]:
    """Everything that determines the tokens of some sources, for the manifest; `key` is a digest of it.

    Raises:
        DataError: nothing is at a source, or the tokenizer's files cannot be read.
    """
    about = {
        "text_field": sources[0].text_field,
        "document": sources[0].document,
        "tokenizer_sha256": tokenizer_sha256(tokenizer_folder),
    }
    content = [content_sha256(source, progress) for source in sources]
    parts = [FORMAT_VERSION, about, tokenizer.eos_token_id, content]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return {"sources": [source.path for source in sources]} | about | {"key": key}


def _check_free(folder: Path, overwrite: bool) -> None:
    """Raise DataError unless `folder` is absent, empty, or tokens that may be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; give a new folder")
    names = {entry.name for entry in folder.iterdir()}
    foreign = sorted(names - set(FILES))
    if foreign:
        raise DataError(f"{folder} holds other files ({', '.join(foreign[:3])}); give a new folder")
    if names and not overwrite:
        raise DataError(f"{folder} holds other tokens; give a new folder, or replace them with --overwrite")
