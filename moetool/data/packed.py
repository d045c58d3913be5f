"""Files that may be compressed, opened with their content decompressed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from moetool.errors import DataError, in_one_line

NOT_READ = {".zip", ".tar", ".tgz", ".7z"}  # of several files


def _zstd(raw: IO[bytes]) -> Any:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))


# Compression by extension: its name, and what reads it.
PACKED: dict[str, tuple[str, Callable[[IO[bytes]], Any]]] = {
    ".gz": ("gzip", lambda raw: gzip.GzipFile(fileobj=raw)),
    ".bz2": ("bzip2", bz2.BZ2File),
    ".xz": ("xz", lzma.LZMAFile),
    ".zst": ("zstd", _zstd),
}


@contextmanager
def open_packed(file: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file that may be compressed; returns it and the raw file, whose position gives the progress."""
    name, unpack = PACKED.get(file.suffix.lower(), ("", lambda raw: raw))
    with file.open("rb") as raw:
        try:
            yield cast(IO[bytes], unpack(raw)), raw
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if not name or (isinstance(error, OSError) and error.errno):
                raise
            raise DataError(f"{file}: not a valid {name} file ({in_one_line(error)})") from None
