"""Documents -> one flat stream of tokens on disk, read through a memory map.

A tokenised folder holds `tokens.bin` (uint16 or uint32, little-endian: the documents one after another, each ended by
the end-of-text token), `offsets.bin` (int64: the start of each document, then the end) and `manifest.json`, written
last.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from moetool.checkpoint.folder import cache_root, sync_folder
from moetool.checkpoint.model import load_tokenizer, tokenizer_sha256
from moetool.data.encode import encode
from moetool.data.folder import durable, unfinished_beside
from moetool.data.text import TextSource, content_sha256, read_documents
from moetool.errors import ConfigError, DataError
from moetool.outside import fits, read_json
from moetool.progress import Progress, silent
from moetool.values import exact_fraction

FORMAT, FORMAT_VERSION = "moetool-tokens", 1
FILES = ("tokens.bin", "offsets.bin", "manifest.json", "moetool.yaml")


@dataclass(frozen=True)
class TokenStream:
    """A flat stream of tokens with its documents; `documents` returns some of them as a stream.

    Attributes:
        manifest: of its folder.
        starts: (D,) int64, the start of each document in `memory`.
        offsets: (D + 1,) int64, the start of each document in this stream, then the end.
        memory: the tokens of the folder, memory-mapped.
    """

    manifest: dict[str, Any]
    starts: np.ndarray
    offsets: np.ndarray
    memory: np.ndarray

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_documents(self) -> int:
        return len(self.starts)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens `start` to `start + length` of the stream, int64 of shape (length,).

        Raises:
            IndexError: some are not in the stream.
            DataError: one is not in the tokenizer's vocabulary.
        """
        those, edges = self._documents_of(start, length)
        shift = self.starts[those] - self.offsets[those]
        places = np.arange(start, start + length) + np.repeat(shift, np.diff(edges))
        tokens: np.ndarray = self.memory[places].astype(np.int64)
        known = self.manifest.get("vocab_size", np.inf)
        if tokens.max(initial=0) >= known:  # a model would read beyond its embedding
            raise DataError(
                f"tokens.bin of {self.manifest.get('sources')} holds token {tokens.max()}, but its tokenizer has"
                f" {known}; make the tokens again with moetool tokenize --overwrite"
            )
        return tokens

    def positions(self, start: int, length: int) -> np.ndarray:
        """Each token's position in its document, from 0 at the start of the document or window; int64 (length,).

        Raises:
            IndexError: some tokens are not in the stream.
        """
        _, edges = self._documents_of(start, length)
        places: np.ndarray = np.arange(start, start + length) - np.repeat(edges[:-1], np.diff(edges))
        return places

    def _documents_of(self, start: int, length: int) -> tuple[slice, np.ndarray]:
        """The documents of some tokens, and where each begins in the stream, clipped to these; then the end."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"tokens {start} to {start + length} of a stream of {self.num_tokens}")
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        last = int(np.searchsorted(self.offsets, start + length, side="left"))
        return slice(first, last), np.clip(self.offsets[first : last + 1], start, start + length)

    def part(self, start: int, stop: int) -> TokenStream:
        """Tokens `start` to `stop` of the only document, as a document of its own; they are not copied."""
        return TokenStream(self.manifest, self.starts + start, np.array([0, stop - start], np.int64), self.memory)

    @property
    def is_part(self) -> bool:
        """Whether this is a part of the only document of its folder."""
        return bool(self.manifest["num_documents"] == 1 and self.num_tokens < self.manifest["num_tokens"])

    @property
    def is_sound(self) -> bool:
        """Whether the tokens of the folder are those that were written."""
        return bool(hashlib.sha256(self.memory.data).hexdigest() == self.manifest["sha256"])

    def documents(self, indices: np.ndarray) -> TokenStream:
        """The stream of some documents, in the order of `indices`; the tokens are not copied."""
        lengths = np.diff(self.offsets)[indices]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        return TokenStream(self.manifest, self.starts[indices], offsets, self.memory)

    def beginning(self, first: int) -> TokenStream:
        """As many whole documents of a folder as hold more tokens than that: all of a folder made with `first`."""
        if self.num_tokens <= first:
            return self
        count = int(np.searchsorted(self.offsets, first, side="right"))
        tokens = int(self.offsets[count])
        digest = hashlib.sha256(self.memory[:tokens].data).hexdigest()
        manifest = self.manifest | {"num_tokens": tokens, "num_documents": count, "sha256": digest}
        return TokenStream(manifest, self.starts[:count], self.offsets[: count + 1], self.memory)


def open_tokens(folder: Path) -> TokenStream:
    """Open a tokenised folder.

    Raises:
        DataError: it is not one, is unfinished, has another format, or its files do not match its manifest.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder} holds no finished tokens (manifest.json); make them with moetool tokenize")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{folder}: the tokens have format {manifest.get('format_version')}, but this moetool reads"
            f" {FORMAT_VERSION}; make them again with moetool tokenize --overwrite"
        )
    again = "make them again with moetool tokenize --overwrite"
    for key, kind in _MANIFEST.items():
        if not fits(manifest.get(key), kind) or (kind is int and manifest[key] < 1):
            raise DataError(f"{folder}: manifest.json is damaged ({key} is {str(manifest.get(key))[:60]!r}); {again}")
    num_tokens, num_documents = manifest["num_tokens"], manifest["num_documents"]
    dtype = {"uint16": "<u2", "uint32": "<u4"}.get(manifest["dtype"])
    if dtype is None:
        raise DataError(f"{folder}: manifest.json is damaged (dtype is {manifest['dtype'][:60]!r}); {again}")
    for name, size in (("tokens.bin", num_tokens * int(dtype[-1])), ("offsets.bin", (num_documents + 1) * 8)):
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise DataError(f"{folder}: {name} {what}; {again}")
    # np.asarray: plain arrays over the maps, so that slices are not memmap objects.
    memory = np.asarray(np.memmap(folder / "tokens.bin", dtype, "r"))
    offsets = np.asarray(np.memmap(folder / "offsets.bin", "<i8", "r"))
    if offsets[0] != 0 or offsets[-1] != num_tokens or not _ascending(offsets):
        raise DataError(f"{folder}: offsets.bin does not match tokens.bin; {again}")
    return TokenStream(manifest, offsets[:-1], offsets, memory)


# The keys of every manifest; numbers are above 0.
_MANIFEST = {"num_tokens": int, "num_documents": int, "num_bytes": int, "vocab_size": int, "dtype": str, "sha256": str}


def _ascending(offsets: np.ndarray) -> bool:
    """Whether every document has a token, checked in pieces: there may be billions."""
    pieces = (offsets[i : i + 2**20 + 1] for i in range(0, len(offsets) - 1, 2**20))
    return all(bool((piece[1:] > piece[:-1]).all()) for piece in pieces)  # a difference could overflow


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a tokenised folder; None for any other folder."""
    try:
        manifest = read_json(folder / "manifest.json", DataError)
    except DataError:
        return None
    return manifest if manifest.get("format") == FORMAT else None


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


def split_validation(
    stream: TokenStream, fraction: Fraction | Decimal | float | str, seed: int
) -> tuple[TokenStream, TokenStream]:
    """Split a stream by document into training and validation; a stream of one document by tokens.

    The documents with the smallest hashes of (seed, index) are held out: round(fraction x D) of them, at
    least one. They come from the whole text, not only from its end. Of a single document the last
    round(fraction x T) tokens are held out, at least two.

    Args:
        stream: of D documents, or of T tokens.
        fraction: share of the documents or tokens, above 0 and below 1.
        seed: for the choice.

    Raises:
        ConfigError: the fraction is not in (0, 1).
        DataError: there are fewer than four tokens in a single document.
    """
    share = exact_fraction("--val-fraction", fraction)
    if not 0 < share < 1:
        raise ConfigError(f"--val-fraction {fraction}: give a share above 0 and below 1")
    total = stream.num_documents
    if total < 2:
        if stream.num_tokens < 4:
            where = ", ".join(map(str, stream.manifest.get("sources") or ["the text"]))
            raise DataError(
                f"{where}: {stream.num_tokens} tokens in one document, too few to set some aside for validation; give"
                " more text, or skip validation (--val-fraction 0)"
            )
        last = stream.num_tokens - min(max(round(share * stream.num_tokens), 2), stream.num_tokens - 2)
        return stream.part(0, last), stream.part(last, stream.num_tokens)
    chosen = np.zeros(total, bool)
    chosen[np.argsort(_hashes(total, seed), kind="stable")[: min(max(round(share * total), 1), total - 1)]] = True
    return stream.documents(np.flatnonzero(~chosen)), stream.documents(np.flatnonzero(chosen))


def _hashes(count: int, seed: int) -> np.ndarray:
    """A hash of (seed, i) for i < count, uint64: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    start = int.from_bytes(hashlib.blake2b(f"validation {seed}".encode(), digest_size=8).digest(), "little")
    x = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


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
