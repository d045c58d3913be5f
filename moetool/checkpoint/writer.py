"""Write a safetensors folder whose layout (shard.py) is known before the first byte.

A shard's header is written first. Its tensors are then filled at their offsets, in any order, from any thread. The
folder cannot be loaded until it is complete: shards are written under a name that does not end in `.safetensors`,
fsynced and renamed; the index and config.json come last. A folder with `moetool.partial.json` is unfinished, and the
same plan can continue it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moetool.checkpoint.folder import PARTIAL, UNFINISHED, create, naming, remove, sync_folder, write_file
from moetool.checkpoint.reader import INDEX, MAX_OPEN, SINGLE
from moetool.checkpoint.shard import Shard
from moetool.checkpoint.step_folder import STATE, in_state
from moetool.errors import CheckpointError
from moetool.lineage import LINEAGE, last_entry
from moetool.outside import read_json

# Files that `--overwrite` may delete: those of a checkpoint's layout and moetool's own.
KNOWN_FILES = {
    "config.json", "generation_config.json", INDEX, SINGLE, PARTIAL, "moetool.json", "moetool.yaml",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "tekken.json",
    "tokenizer.model.v3", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md",
}  # fmt: skip
# The files besides the weights that make a checkpoint usable; code (`auto_map`, *.py) is never copied.
COMPANIONS = sorted(KNOWN_FILES - {"config.json", INDEX, SINGLE, PARTIAL, "moetool.json", "moetool.yaml"})

_TAKEN = "choose another folder, or replace a checkpoint with --overwrite"


def foreign_files(folder: Path) -> list[str]:
    """Names in a folder that belong neither to moetool nor to a checkpoint's layout."""

    def known(name: str) -> bool:
        name = name.removesuffix(UNFINISHED)
        return name in KNOWN_FILES or (name.startswith("model-") and name.endswith(".safetensors"))

    own = {STATE} if _wrote_state(folder) else set()
    return sorted(e.name for e in folder.iterdir() if e.name not in own and (e.is_dir() or not known(e.name)))


def _wrote_state(folder: Path) -> bool:
    """Whether a folder's training state was, or was going to be, written with its checkpoint; else it is a run's."""
    documents = [read_json(folder / name) for name in (PARTIAL, LINEAGE) if (folder / name).is_file()]
    named = [document.get("shards") for document in documents]
    return any(in_state(name) for shards in named if isinstance(shards, dict) for name in shards)


def clear(folder: Path) -> None:
    """Delete a checkpoint (`--overwrite`): first the files that make it loadable, then the rest.

    Raises:
        CheckpointError: the folder holds other files; nothing is deleted then.
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
    # moetool.partial.json last: until then it marks the folder as unfinished.
    for entry in sorted(folder.iterdir(), key=lambda e: e.name == PARTIAL):
        remove(entry) if entry.name == STATE else entry.unlink()


def prepare(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
    """Make sure that a folder may be written: empty, or left unfinished by the same plan.

    Call it inside the FolderLock used for writing. Otherwise files that another process writes between the
    check and the lock would be taken for this plan's own.

    Raises:
        CheckpointError: it holds something else and `overwrite` is not given, or files that do not
            belong to a checkpoint.
    """
    # A run killed while writing its very first file leaves it under its temporary name.
    if all(entry.name == PARTIAL + UNFINISHED for entry in folder.iterdir()):
        return
    if overwrite:
        clear(folder)
        return
    if not (folder / PARTIAL).is_file():
        what = "is not empty"
        if (folder / "config.json").is_file():
            what = f"is a different finished checkpoint{_changes(last_entry(folder).get('recipe'), identity)}"
        raise CheckpointError(f"{folder} {what}; {_TAKEN}")
    left = read_json(folder / PARTIAL)
    # Through JSON and back, so that both sides have the same types.
    wanted = json.loads(json.dumps(identity))
    differing = [key for key in wanted if left.get(key) != wanted[key]]
    if differing:
        how = _changes(left.get("recipe"), wanted) if "recipe" in differing else f" ({', '.join(differing)})"
        raise CheckpointError(
            f"{folder} holds an unfinished conversion that differs{how};"
            " finish it with the command that started it, choose another folder, or give --overwrite"
        )


def check_out(folder: Path, command: str) -> None:
    """Refuse early what `prepare` will refuse, for commands that work long before they write.

    Args:
        folder: it is empty or absent, left unfinished, or may be what this command wrote before.
        command: its name, as a lineage has it.

    Raises:
        CheckpointError: the folder holds something else.
    """
    if not folder.is_dir() or (folder / PARTIAL).is_file():
        return
    names = {entry.name for entry in folder.iterdir()} - {PARTIAL + UNFINISHED}
    written_by = last_entry(folder).get("command")
    if names and ("config.json" not in names or written_by != command):
        what = "is a different finished checkpoint" if "config.json" in names else "is not empty"
        raise CheckpointError(f"{folder} {what}; {_TAKEN}")


def _changes(old: Any, identity: Mapping[str, Any]) -> str:
    """A clause on the differences of a recipe from an earlier one: ` (drop_ratio 0.25 -> 0.5)`."""
    new = json.loads(json.dumps(identity)).get("recipe")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return ""
    if not (old.keys() <= new.keys() or new.keys() <= old.keys()):  # of another operation
        return ""
    both = [*new, *(key for key in old if key not in new)]  # some fields are left out where they have their default
    pairs = {key: (old.get(key, "default"), new.get(key, "default")) for key in both}
    values = {key: (str(a), str(b)) for key, (a, b) in pairs.items() if a != b}
    # Tables of experts are too long to be printed.
    changes = [f"{key} {a} -> {b}" if len(a + b) < 80 else f"other {key}" for key, (a, b) in values.items()]
    if changes:
        return f" ({', '.join(changes)})"
    measured = ", or other numbers measured on the text" if identity.get("measured") else ""
    return f" (same recipe, but another or changed source{measured})"


class CheckpointWriter:
    """Fills the shards of one folder; used inside a FolderLock.

    `identity` identifies the output (recipe, source). A folder left by a killed run is continued if its
    identity is equal: shards that the run completed and recorded with a digest are kept.

    Attributes:
        complete: shards that an earlier run completed -> the recorded digest of each.
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
        """Create a shard at its full size (so that a full disk fails now) and write its header."""
        path = self.folder / (shard.name + UNFINISHED)
        path.parent.mkdir(exist_ok=True)
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
        """Make a filled shard durable, rename it, and record a digest of its content. Any thread."""
        descriptor = self._files.pop(shard.name)
        try:
            with naming(self.folder / shard.name):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(self.folder / (shard.name + UNFINISHED), self.folder / shard.name)
        sync_folder((self.folder / shard.name).parent)
        with self._lock:
            self._note["complete"][shard.name] = digest
            self._write_note()

    def abandon(self) -> None:
        """Close and delete the incomplete shards; the folder can still be continued."""
        for name, descriptor in self._files.items():
            os.close(descriptor)
            (self.folder / (name + UNFINISHED)).unlink(missing_ok=True)
        self._files.clear()

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Write the small files, config.json last, and remove moetool.partial.json.

        Raises:
            CheckpointError: another process has deleted or changed a shard.
        """
        for shard in self.shards:
            if not self._is_there(shard):
                raise CheckpointError(
                    f"{self.folder / shard.name} was deleted or changed by another program while it was in use;"
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
