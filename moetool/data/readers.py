"""Formats of text: each reader yields (bytes of the file read so far, text of a document)."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from moetool.errors import DataError, in_one_line

DOCUMENT_RULES = ("file", "line", "paragraph")

# Bytes of the longest line, and of the largest file that is one document. A tokenizer takes about 110 bytes of
# memory per byte of one document: 30 GB, or this machine's memory. Beyond that the process dies without a message.
_LARGEST_DOCUMENT = min(2**28, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 128)
_BLOCK = 2**20  # bytes of text read at once
_NOT_READ = {".zst", ".bz2", ".xz", ".zip", ".tar", ".7z"}
_HUB = re.compile(
    r"hf:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^#]+))?(#(?P<config>[^/]*)(/(?P<split>.+))?)?", re.ASCII
)
Rows = Iterator[tuple[int, str]]


def format_of(file: Path) -> str:
    """The extension that determines how a file is read, without `.gz`."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def read_file(file: Path, field: str, document: str) -> Rows:
    """Read a file by its extension: JSONL, Parquet, Arrow, otherwise plain text.

    Args:
        file: may be gzipped (JSONL and plain text).
        field: the field or column that holds the text.
        document: the unit of plain text that is one document: file, line or paragraph.

    Yields:
        (bytes of the file read so far, text of a document; it may be empty).

    Raises:
        DataError: it cannot be read; names the file and the line, row or byte.
    """
    if file.suffix.lower() in _NOT_READ:
        raise DataError(f"{file}: unpack it first; .gz is the only compression that can be read")
    reader = _READERS.get(format_of(file))
    return reader(file, field) if reader else _plain_text(file, document)


def _plain_text(file: Path, document: str) -> Rows:
    if document not in DOCUMENT_RULES:
        raise DataError(f"document rule '{document}': choose from {', '.join(DOCUMENT_RULES)}")
    if document == "file":
        with _open(file) as (opened, _):
            data = opened.read(_LARGEST_DOCUMENT + 1)
        if len(data) > _LARGEST_DOCUMENT:
            raise DataError(
                f"{file}: larger than {_LARGEST_DOCUMENT} bytes, too large for one document;"
                " make each line or paragraph a document (--document line)"
            )
        yield file.stat().st_size, _decode(data, file, 0).removeprefix("\ufeff")
        return
    offset = position = 0
    paragraph: list[str] = []
    for position, block in _blocks(file):
        text = _decode(block, file, offset)
        text = text.removeprefix("\ufeff") if offset == 0 else text
        offset += len(block) + 1
        for line in text.split("\n"):
            line = line.rstrip("\r")
            if document == "line":
                yield position, line
            elif line.strip():
                paragraph.append(line)
            elif paragraph:
                yield position, "\n".join(paragraph)
                paragraph = []
    if paragraph:
        yield position, "\n".join(paragraph)


def _json_lines(file: Path, field: str) -> Rows:
    for number, position, line in _lines(file):
        if not line or line.isspace():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where}: not UTF-8 (byte 0x{line[error.start]:02x}); convert it, e.g. with iconv"
            ) from None
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "a value is too deep or too large"
            raise DataError(f"{where}: not JSON ({reason}); expected one object per line") from None
        if not isinstance(row, dict):
            raise DataError(
                f'{where}: a {type(row).__name__}; expected one object per line, such as {{"{field}": "..."}}'
            )
        if field not in row:
            raise DataError(f"{where}: {_no_field(field, list(row))}")
        # JSON may hold half a surrogate pair, which UTF-8 cannot: it becomes U+FFFD, as in any decoder.
        text = _text(row[field], field, where)
        yield position, text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _parquet(file: Path, field: str) -> Rows:
    import pyarrow.parquet as pq

    with _sound(file, "Parquet file"), pq.ParquetFile(file) as opened:
        _check_column(file, field, opened.schema_arrow.names)
        batches = opened.iter_batches(batch_size=1024, columns=[field])
        yield from _arrow_rows(batches, file, field, max(opened.metadata.num_rows, 1))


def _arrow(file: Path, field: str) -> Rows:
    import pyarrow as pa

    sound = _sound(file, "Arrow file of datasets")
    with sound, pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as opened:
        _check_column(file, field, opened.schema.names)
        batches = (batch.select([field]) for batch in opened)
        yield from _arrow_rows(batches, file, field, None)


@contextmanager
def _sound(file: Path, what: str) -> Iterator[None]:
    """Turn pyarrow's errors about a damaged file into one line; some are OSErrors that do not come from the system."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{file}: not a valid {what} ({in_one_line(error)})") from None


def _arrow_rows(batches: Iterator[Any], file: Path, field: str, num_rows: int | None) -> Rows:
    size, row = file.stat().st_size, 0
    for batch in batches:
        # pyarrow trusts string offsets: in a damaged file they may point anywhere in memory.
        batch.validate(full=True)
        for value in batch.column(0):
            row += 1
            yield size * row // num_rows if num_rows else 0, _text(value.as_py(), field, f"{file}, row {row}")


_READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


@contextmanager
def _open(file: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file that may be gzipped; returns it and the raw file, whose position gives the progress."""
    with file.open("rb") as raw:
        try:
            yield (cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if file.suffix.lower() == ".gz" else raw), raw
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{file}: not a valid gzip file ({in_one_line(error)})") from None


def _lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, bytes of the file read so far, the line without its line break)."""
    number = 0
    for position, block in _blocks(file):
        for line in block.split(b"\n"):
            number += 1
            yield number, position, line


def _blocks(file: Path) -> Iterator[tuple[int, bytes]]:
    """(bytes of the file read so far, whole lines without the last break): work on a block costs less than on lines."""
    with _open(file) as (opened, raw):
        number, begun = 1, bytearray()
        while block := opened.read(min(_BLOCK, _LARGEST_DOCUMENT)):
            begun += block
            end = begun.rfind(b"\n", -len(block))
            if len(begun) > _LARGEST_DOCUMENT and begun.find(b"\n", 0, _LARGEST_DOCUMENT) < 0:
                raise DataError(
                    f"{file}, line {number}: longer than {_LARGEST_DOCUMENT} bytes; split it into documents"
                )
            if end >= 0:
                number += begun.count(b"\n")
                yield raw.tell(), bytes(begun[:end])
                del begun[: end + 1]
        if begun:
            yield raw.tell(), bytes(begun)


def _decode(data: bytes, file: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at offset {offset + error.start}"
        raise DataError(
            f"{file}: not UTF-8 ({where}); convert it, e.g. with iconv, or leave it out with a glob such as '*.txt'"
        ) from None


def _text(value: object, field: str, where: str) -> str:
    """The text of a row; a null is an empty document."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: field '{field}' holds a {type(value).__name__}, not text (use --text-field)")
    return value


def _check_column(file: Path | str, field: str, names: list[str]) -> None:
    if field not in names:
        raise DataError(f"{file}: {_no_field(field, names)}")


def _no_field(field: str, names: list[str]) -> str:
    return f"no field '{field}'; fields are: {', '.join(names[:12]) or 'none'} (use --text-field)"


# The hub, through `datasets` streaming.


def _hub_name(path: str) -> dict[str, str | None]:
    match = _HUB.fullmatch(path)
    if not match:
        raise DataError(f"{path}: write a hub dataset as hf:owner/name[@revision][#config/split]")
    return match.groupdict()


def _hub_failed(path: str, error: Exception) -> DataError:
    return DataError(
        f"{path}: the hub did not provide it ({type(error).__name__}: {in_one_line(error)});"
        " check the spelling and the network, or run `hf auth login`"
    )


def read_hub(path: str, field: str) -> Iterator[str]:
    """Stream the texts of a hub dataset, `hf:owner/name[@revision][#config/split]`.

    Raises:
        DataError: the hub does not provide it, or it has no such column.
    """
    import datasets

    name = _hub_name(path)
    try:
        rows = datasets.load_dataset(
            name["name"],
            name=name["config"] or None,
            revision=name["revision"],
            split=name["split"] or "train",
            streaming=True,
        )
        if rows.column_names is not None:
            _check_column(path, field, rows.column_names)
            rows = rows.select_columns([field])
        for number, row in enumerate(rows, 1):
            where = f"{path}, row {number}"
            if field not in row:
                raise DataError(f"{where}: {_no_field(field, list(row))}")
            yield _text(row[field], field, where)
    except DataError:
        raise
    except Exception as error:  # the client's errors have no common base class: network, HTTP, builder, cache
        raise _hub_failed(path, error) from None


def hub_commit(path: str) -> str:
    """The commit that the revision of a hub dataset currently points to.

    Raises:
        DataError: the hub does not answer.
    """
    name = _hub_name(path)
    if name["revision"] and re.fullmatch(r"[0-9a-f]{40}", name["revision"]):
        return name["revision"]
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(str(name["name"]), revision=name["revision"]).sha)
    except Exception as error:
        raise _hub_failed(path, error) from None
