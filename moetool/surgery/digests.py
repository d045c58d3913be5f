"""Digests of written files: XXH3-128 over blocks, so that blocks can be written and hashed in any order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import xxhash

from moetool.checkpoint.shard import Shard
from moetool.surgery.fill import Place


class BlockDigest(NamedTuple):
    """The digest of a block of a tensor that begins with some element of it."""

    tensor: str
    element: int
    digest: str


def block_digest(place: Place, element: int, raw: memoryview) -> BlockDigest:
    """The digest of a block's bytes; the block lies `element` elements into a place."""
    return BlockDigest(place.tensor, place.start + element, xxhash.xxh3_128_hexdigest(raw))


class Digests:
    """Digests of blocks as they come."""

    def __init__(self) -> None:
        self._blocks: dict[str, dict[int, str]] = {}  # tensor -> first element of a block -> its digest

    def add(self, blocks: Iterable[BlockDigest]) -> None:
        """Note the digests of some blocks."""
        for tensor, element, digest in blocks:
            self._blocks.setdefault(tensor, {})[element] = digest

    def of(self, shard: Shard) -> str:
        """The digest of a shard, over its tensors' names and digests; all its blocks must be noted."""
        return shard_digest((name, tensor_digest(self._blocks.get(name, {}))) for name in shard.starts)


def tensor_digest(blocks: Mapping[int, str]) -> str:
    """XXH3-128 over the digests of a tensor's blocks."""
    return xxhash.xxh3_128_hexdigest("".join(blocks[element] for element in sorted(blocks)).encode())


def shard_digest(tensors: Iterable[tuple[str, str]]) -> str:
    """XXH3-128 over (name, digest) of a shard's tensors: what moetool.json records of each shard."""
    return xxhash.xxh3_128_hexdigest("".join(f"{name}:{digest};" for name, digest in tensors).encode())
