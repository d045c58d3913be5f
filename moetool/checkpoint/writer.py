"""Write a safetensors folder whose layout is known before the first byte.

A shard's header is written first, its tensors are then filled at their offsets, in any order, from
any thread. The folder cannot be loaded until it is complete: shards are written under a name that
does not end in `.safetensors`, fsynced and renamed; the index and config.json come last. While
`moetool.partial.json` lies in the folder, it is unfinished, and the same plan can go on with it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetool.checkpoint.folder import PARTIAL, UNFINISHED, create, naming, sync_folder, write_file
from moetool.checkpoint.reader import INDEX, ITEM_SIZE, MAX_OPEN, SINGLE, read_header
from moetool.errors import CheckpointError
from moetool.outside import read_json
from moetool.recipe import read_lineage

# What `--overwrite` may delete: names of a checkpoint's layout and of moetool's own files.
KNOWN_FILES = {
    "config.json", "generation_config.json", INDEX, SINGLE, PARTIAL, "moetool.json", "moetool.yaml",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "tekken.json",
    "tokenizer.model.v3", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md",
}  # fmt: skip
# Beside the weights, what makes a checkpoint usable; code (`auto_map`, *.py) is never carried over.
COMPANIONS = sorted(KNOWN_FILES - {"config.json", INDEX, SINGLE, PARTIAL, "moetool.json", "moetool.yaml"})


@dataclass(frozen=True)
class TensorLayout:
    """A tensor to be written: dtype as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        size = ITEM_SIZE[self.dtype]
        for n in self.shape:
            size *= n
        return size


@dataclass(frozen=True)
class Shard:
    """A file to be written: its header's bytes and where each tensor starts in the file."""

    name: str
    header: bytes
    starts: Mapping[str, int]
    size: int


def layout_shards(tensors: Sequence[TensorLayout], max_shard_size: int) -> list[Shard]:
    """Cut tensors, in the given order, into files of at most `max_shard_size` bytes of tensor data.

    A tensor larger than that gets a file of its own. One file is called model.safetensors, several
    model-00001-of-0000N.safetensors, as transformers does.
    """
    groups: list[list[TensorLayout]] = []
    filled = 0
    for tensor in tensors:
        if not groups or (filled and filled + tensor.size > max_shard_size):
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.size
    shards = []
    for number, group in enumerate(groups, start=1):
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset, offsets = 0, {}
        for tensor in group:
            entries[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.size],
            }
            offsets[tensor.name] = offset
            offset += tensor.size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        name = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        starts = {tensor: len(header) + start for tensor, start in offsets.items()}
        shards.append(Shard(name, header, starts, len(header) + offset))
    return shards


def index_file(shards: Sequence[Shard]) -> dict[str, bytes]:
    """The index by its name; none where there is one shard."""
    if len(shards) == 1:
        return {}
    weight_map = {tensor: shard.name for shard in shards for tensor in shard.starts}
    total = sum(shard.size - len(shard.header) for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX: json.dumps(index, indent=2).encode() + b"\n"}


def foreign_files(folder: Path) -> list[str]:
    """Names in a folder that neither moetool nor a checkpoint's layout knows."""

    def known(name: str) -> bool:
        name = name.removesuffix(UNFINISHED)
        return name in KNOWN_FILES or (name.startswith("model-") and name.endswith(".safetensors"))

    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() or not known(entry.name))


def clear(folder: Path) -> None:
    """Delete a checkpoint (`--overwrite`): what makes it loadable first, then the rest of its files.

    Raises:
        CheckpointError: the folder holds anything else; nothing is deleted then.
    """
    foreign = foreign_files(folder)
    if foreign:
        raise CheckpointError(
            f"{folder} also holds {', '.join(foreign[:3])}{' and more' if len(foreign) > 3 else ''};"
            " --overwrite deletes only a checkpoint's own files: move the others away or choose another folder"
        )
    for name in ("config.json", INDEX):
        (folder / name).unlink(missing_ok=True)
    sync_folder(folder)
    # moetool.partial.json last: until then the folder says that it is not a checkpoint.
    for entry in sorted(folder.iterdir(), key=lambda e: e.name == PARTIAL):
        entry.unlink()


def prepare(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
    """Make sure that a folder may be written: empty, or left unfinished by the same plan.

    Called inside the FolderLock that the writing happens in: what another process puts there between
    the look and the lock would be taken for this plan's own.

    Raises:
        CheckpointError: it holds something else and `overwrite` is not given, or holds files that
            no checkpoint has.
    """
    # A run killed while it wrote its very first file leaves that under its temporary name.
    if all(entry.name == PARTIAL + UNFINISHED for entry in folder.iterdir()):
        return
    if overwrite:
        clear(folder)
        return
    if not (folder / PARTIAL).is_file():
        what = "is not empty"
        if (folder / "config.json").is_file():
            lineage = (read_lineage(folder) or {}).get("lineage") or []
            recipes = [entry["recipe"] for entry in lineage if "recipe" in entry] or [None]
            what = "is a finished checkpoint of something else" + _changes(recipes[-1], identity)
        raise CheckpointError(f"{folder} {what}; choose another folder, or replace a checkpoint with --overwrite")
    left = read_json(folder / PARTIAL)
    # Through JSON and back, so that both sides have the same types.
    wanted = json.loads(json.dumps(identity))
    differing = [key for key in wanted if left.get(key) != wanted[key]]
    if differing:
        how = _changes(left.get("recipe"), wanted) if "recipe" in differing else f" ({', '.join(differing)})"
        raise CheckpointError(
            f"{folder} holds an unfinished conversion that differs{how};"
            " finish it with its own command, choose another folder, or give --overwrite"
        )


def _changes(old: Any, identity: Mapping[str, Any]) -> str:
    """A clause on what a recipe asks for otherwise than an earlier one: ` (drop_ratio 0.25 -> 0.5)`."""
    new = json.loads(json.dumps(identity)).get("recipe")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return ""
    changes = [f"{key} {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key]]
    return f" ({', '.join(changes)})" if changes else " (the same recipe, of another source or changed since)"


class CheckpointWriter:
    """Fills the shards of one folder; used inside a FolderLock.

    `identity` says what is being written (recipe, source). A folder left by a killed run is gone on
    with when its identity is equal: shards that it completed, and whose digest it noted, are kept.

    Attributes:
        complete: shards that an earlier run left complete -> the digest it noted of each.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.shards = list(shards)
        noted = read_json(folder / PARTIAL).get("complete", {}) if (folder / PARTIAL).is_file() else {}
        self.complete: dict[str, str] = {s.name: noted[s.name] for s in shards if s.name in noted and self._is_there(s)}
        self._where = {tensor: shard for shard in shards for tensor in shard.starts}
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self._note = {
            **identity,
            "writer": {"process": os.getpid(), "host": socket.gethostname()},
            "complete": dict(self.complete),
        }
        self._write_note()

    def _write_note(self) -> None:
        write_file(self.folder / PARTIAL, json.dumps(self._note, indent=2).encode())

    def _is_there(self, shard: Shard) -> bool:
        path = self.folder / shard.name
        if not path.is_file() or path.stat().st_size != shard.size:
            return False
        with path.open("rb") as file:
            return file.read(len(shard.header)) == shard.header

    def open(self, shard: Shard) -> None:
        """Create a shard at its full size (so that a full disk shows now) and write its header."""
        path = self.folder / (shard.name + UNFINISHED)
        descriptor = create(path)
        self._files[shard.name] = descriptor
        with naming(path):
            os.posix_fallocate(descriptor, 0, shard.size)
        _write_all(descriptor, memoryview(shard.header), 0, path)

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor at `offset` within it; its shard must be open. Any process."""
        shard = self._where[tensor]
        if shard.name not in self._files:  # this is a worker, forked before the shard was opened
            if len(self._files) >= MAX_OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            path = self.folder / (shard.name + UNFINISHED)
            self._files[shard.name] = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        _write_all(self._files[shard.name], data, shard.starts[tensor] + offset, self.folder / shard.name)

    def close(self, shard: Shard, digest: str) -> None:
        """Make a filled shard durable, give it its name, and note a digest of what was written. Any thread."""
        descriptor = self._files.pop(shard.name)
        try:
            with naming(self.folder / shard.name):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(self.folder / (shard.name + UNFINISHED), self.folder / shard.name)
        sync_folder(self.folder)
        with self._lock:
            self._note["complete"][shard.name] = digest
            self._write_note()

    def abandon(self) -> None:
        """Close and delete the shards that are not complete; the folder can be gone on with."""
        for name, descriptor in self._files.items():
            os.close(descriptor)
            (self.folder / (name + UNFINISHED)).unlink(missing_ok=True)
        self._files.clear()

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Write the small files, config.json last, and take the partial mark away.

        Raises:
            CheckpointError: someone else has deleted or changed a shard meanwhile.
        """
        for shard in self.shards:
            if not self._is_there(shard):
                raise CheckpointError(
                    f"{self.folder / shard.name} was deleted or changed by someone else while it was in use;"
                    " run the same command again"
                )
        for name in sorted(files, key=lambda name: name == "config.json"):
            write_file(self.folder / name, files[name])
        (self.folder / PARTIAL).unlink()
        sync_folder(self.folder)


def _write_all(descriptor: int, data: memoryview, position: int, path: Path) -> None:
    with naming(path):
        while data:
            count = os.pwrite(descriptor, data, position)
            position += count
            data = data[count:]


def check_written(folder: Path, shards: Sequence[Shard]) -> None:
    """Re-read every header of a finished folder and hold it against the layout.

    Raises:
        CheckpointError: a shard is absent, damaged or differs.
    """
    for shard in shards:
        tensors, length = read_header(folder / shard.name)
        planned = json.loads(shard.header[8:])
        planned.pop("__metadata__")
        found = {
            name: {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": [info.start - length, info.start - length + info.size],
            }
            for name, info in tensors.items()
        }
        if found != planned or length != len(shard.header):
            shapes = [{name: (entry["dtype"], entry["shape"]) for name, entry in e.items()} for e in (found, planned)]
            what = (
                "holds the planned tensors in another layout, so another program has saved it again"
                if shapes[0] == shapes[1]
                else "does not hold the tensors that were planned"
            )
            raise CheckpointError(f"{folder / shard.name} {what}")
