"""One flat stream of tokens on disk, read through a memory map.

A tokenised folder holds `tokens.bin` (uint16 or uint32, little-endian: the documents one after another, each ended by
the end-of-text token), `offsets.bin` (int64: the start of each document, then the end) and `manifest.json`, written
last.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from moetool.errors import ConfigError, DataError
from moetool.outside import fits, read_json
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
