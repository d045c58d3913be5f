"""The checkpoints that an operation reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from moetool.checkpoint.hub import fetch_headers, resolve_model
from moetool.checkpoint.reader import AdapterReader, CheckpointReader
from moetool.errors import CheckpointError


@dataclass(frozen=True)
class Sources:
    """Opened checkpoints.

    Attributes:
        names: as the user gave them.
        readers: in the same order.
    """

    names: tuple[str, ...]
    readers: tuple[CheckpointReader, ...]

    @property
    def recorded_names(self) -> list[str]:
        """For the lineage: a folder by its absolute path, a model of the hub by its name."""
        paths = [Path(name).expanduser() for name in self.names]
        return [
            str(path.absolute()) if path == reader.folder else name
            for name, path, reader in zip(self.names, paths, self.readers, strict=True)
        ]

    def repeated(self) -> list[str]:
        """The names after the first that are the first checkpoint again."""
        first, *others = (os.path.realpath(reader.folder) for reader in self.readers)
        return [name for name, folder in zip(self.names[1:], others, strict=True) if folder == first]


@contextmanager
def open_sources(
    names: Sequence[str],
    out: Path,
    headers_only: bool = False,
    unpickle: bool = False,
    adapter: str | None = None,
    reader: type[CheckpointReader] = CheckpointReader,
) -> Iterator[Sources]:
    """Find checkpoints, here or on the hub, and open them.

    Args:
        names: folders, or `owner/name[@revision]`.
        out: the folder to be written, which may not be one of them or lie inside one.
        headers_only: fetch no weights from the hub, only what a plan needs.
        unpickle: whether pickled weights are read where there are no safetensors.
        adapter: a LoRA folder or name, which becomes the last source.
        reader: opens all but the adapter.

    Raises:
        CheckpointError: one is not there or not readable, or OUT lies inside it.
    """
    with ExitStack() as stack:
        if headers_only and not unpickle:
            headers = Path(stack.enter_context(TemporaryDirectory()))
            folders = [fetch_headers(name, headers) for name in names]
        else:
            folders = [resolve_model(name, unpickle=unpickle) for name in names]
        if adapter is not None:
            names = [*names, adapter]
            folders.append(resolve_model(adapter, unpickle=unpickle))
        real = Path(os.path.realpath(out))  # a loop of links is no error here
        for folder in folders:
            if Path(os.path.realpath(folder)) in (real, *real.parents):
                raise CheckpointError(
                    f"{out} is the source or inside it; a source is never modified; choose another folder"
                )
        readers = open_readers(folders, unpickle, adapter is not None, reader)
        yield Sources(tuple(names), tuple(stack.enter_context(reader) for reader in readers))


def open_readers(
    folders: Sequence[Path], unpickle: bool, adapter: bool, reader: type[CheckpointReader] = CheckpointReader
) -> list[CheckpointReader]:
    """Open folders; `adapter` says whether the last one is an adapter, `reader` opens the others."""
    number = len(folders) - adapter
    return [
        *(reader(folder, unpickle) for folder in folders[:number]),
        *(AdapterReader(folder, unpickle) for folder in folders[number:]),
    ]
