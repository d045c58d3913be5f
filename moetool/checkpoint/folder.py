"""Writing into a folder: atomic files, and a lock against a second writer."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from moetool.errors import CheckpointError
from moetool.outside import read_json

PARTIAL = "moetool.partial.json"  # present while a checkpoint in the folder is unfinished
UNFINISHED = ".unfinished"  # suffix of a file that is being written

PATIENCE = 2.0  # seconds in which the workers of a killed process end

# Errors of file systems that have no such locks, or that lock only files open for writing (NFS).
_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def cache_root() -> Path:
    """Where tokens and calibrations are kept."""
    return Path(os.environ.get("MOETOOL_CACHE") or "~/.cache/moetool").expanduser()


def unfinished(folder: Path) -> str:
    """The message for a folder that holds PARTIAL, and therefore no model."""
    if read_json(folder / PARTIAL).get("command") != "cpt":
        return f"{folder} is an unfinished conversion; run the command that started it again"
    steps = f", or give a step folder ({folder}/checkpoints)" if (folder / "checkpoints").is_dir() else ""
    return f"{folder} holds an unfinished run of moetool cpt; repeat its command to finish it{steps}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add a file name to system errors: a write to a full disk fails without one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def create(path: Path) -> int:
    """A descriptor of a new file. It replaces any file or link of its name; nothing is written through a link."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def remove(folder: Path) -> None:
    """Delete a folder and its contents; for a link to a folder, only the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put files in place, each complete; on a full disk all earlier files stay unchanged.

    Args:
        folder: an existing folder.
        files: name, or path below the folder, -> content.
    """
    unfinished = {folder / name: folder / (name + UNFINISHED) for name in files}
    try:
        for (path, temporary), data in zip(unfinished.items(), files.values(), strict=True):
            with naming(path), open(create(temporary), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in unfinished.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in unfinished.values():
            with suppress(OSError):
                temporary.unlink()
        raise
    for parent in {path.parent for path in unfinished}:
        sync_folder(parent)


def beside(folder: Path) -> frozenset[str]:
    """A checkpoint's contents beside its weights: file names, and its tokenizer's special tokens."""
    names = {path.name for path in folder.iterdir()}
    try:
        added = read_json(folder / "tokenizer.json").get("added_tokens")
    except CheckpointError:  # a tokenizer is copied in any condition
        added = None
    tokens = (
        [token.get("content") for token in added or () if isinstance(token, dict)] if isinstance(added, list) else []
    )
    return frozenset(names | {token for token in tokens if isinstance(token, str)})


def write_file(path: Path, data: bytes) -> None:
    """Write a small file atomically."""
    write_files(path.parent, {path.name: data})


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unnamed_file(folder: Path, size: int) -> IO[bytes]:
    """An unnamed file with all its bytes allocated on disk; it disappears with the process, however that ends.

    Written through a map, a file with holes would kill the process when the disk is full.

    Raises:
        OSError: they do not fit.
    """
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        file.close()
        raise OSError(error.errno, error.strerror, str(folder)) from None
    return file


class FolderLock:
    """Locks a folder (flock), created if needed, against a second writer until it is closed or its process ends.

    A folder that it created and that is still empty is removed on closing.

    Raises:
        CheckpointError: another process holds it (named if possible), or it is a file.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file; give a folder that does not exist yet")
        self._folder, self._made = folder, not folder.exists()
        patient = time.monotonic() + PATIENCE
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._descriptor)
                if not holders(folder) and time.monotonic() < patient:
                    time.sleep(0.01)
                    continue
                raise CheckpointError(
                    f"{folder} is being written by another process{_holder(folder)};"
                    " wait for it or choose another folder"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:  # continue without a lock
                    os.close(self._descriptor)
                    raise
            if self._is_current():
                return
            os.close(self._descriptor)  # its last holder has removed or replaced it in the meantime

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._folder), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):  # the folder is not empty
            if self._made and self._is_current():
                self._folder.rmdir()
        os.close(self._descriptor)


def _holder(folder: Path) -> str:
    """The holder of a folder, if this machine knows it. Nothing is stored, so nothing can be out of date."""
    for process in holders(folder):
        return f" ({_describe(process)})"
    with suppress(OSError, ValueError, KeyError, TypeError):  # the holder is on another machine or in another container
        writer = json.loads((folder / PARTIAL).read_text())["writer"]
        return f" (process {int(writer['process'])} on {str(writer['host'])[:60]})"
    return ""


def holders(folder: Path) -> list[str]:
    """Processes of this machine that have locked a folder and live; a lock outlives one whose workers have it too."""
    with suppress(OSError, ValueError, IndexError):
        status = os.stat(folder)
        # 1: FLOCK  ADVISORY  WRITE 4711 fd:01:1311 0 EOF
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        held = [words[4] for words in locks if words[1] == "FLOCK" and words[5].endswith(f":{status.st_ino}")]
        return [process for process in held if _has_open(process, status)]
    return []


def _has_open(process: str, status: os.stat_result) -> bool:
    try:
        return any(os.path.samestat(entry.stat(), status) for entry in Path(f"/proc/{process}/fd").iterdir())
    except PermissionError:  # another user's process, but the numbers match
        return True


def _describe(process: str) -> str:
    """A process's number, command and start time."""
    said = f"process {process}"
    with suppress(OSError, ValueError, IndexError):
        words = Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")
        at = next((i for i, word in enumerate(words[:4]) if Path(word).name == "moetool"), None)
        command = " ".join(words if at is None else ["moetool", *words[at + 1 :]]).strip()[:120]
        said += f", '{''.join(c if c.isprintable() else ' ' for c in command)}'"
        # Field 22, counted after the name in parentheses, which may contain anything; in ticks since boot.
        ticks = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
        since = datetime.fromtimestamp(int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK"))
        said += f", since {since:%Y-%m-%d %H:%M}"
    return said
