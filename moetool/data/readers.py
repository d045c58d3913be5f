"""Formats of text: each reader yields (bytes of the file read so far, text of a document)."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from moetool.data.packed import NOT_READ, PACKED, open_packed
from moetool.errors import DataError, in_one_line

DOCUMENT_RULES = ("file", "line", "paragraph")

# Bytes of the longest line, and of the largest file that is one document. A tokenizer takes about 110 bytes of
# memory per byte of one document: 30 GB, or this machine's memory. Beyond that the process dies without a message.
_LARGEST_DOCUMENT = min(2**28, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 128)
_BLOCK = 2**20  # bytes of text read at once
_MARK = b"\xef\xbb\xbf"  # a byte order mark
Rows = Iterator[tuple[int, str]]


def format_of(file: Path) -> str:
    """The extension that determines how a file is read, without that of its compression."""
    name = Path(file.name.lower())
    return name.with_suffix("").suffix if name.suffix in PACKED else name.suffix


def read_file(file: Path, field: str, document: str) -> Rows:
    """Read a file by its extension: JSONL, JSON, CSV, Parquet, Arrow, otherwise plain text.

    Args:
        file: may be compressed (not Parquet and Arrow).
        field: the field or column that holds the text.
        document: the unit of plain text that is one document: file, line or paragraph.

    Yields:
        (bytes of the file read so far, text of a document; it may be empty).

    Raises:
        DataError: it cannot be read; names the file and the line, row or byte.
    """
    if NOT_READ & {file.suffix.lower(), format_of(file)}:
        raise DataError(f"{file}: unpack it first; of packed files only {', '.join(PACKED)} of a single file are read")
    reader = _READERS.get(format_of(file))
    return reader(file, field) if reader else _plain_text(file, document)


def _plain_text(file: Path, document: str) -> Rows:
    if document not in DOCUMENT_RULES:
        raise DataError(f"document rule '{document}': choose from {', '.join(DOCUMENT_RULES)}")
    if document == "file":
        with open_packed(file) as (opened, _):
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
        row = _json(line.removeprefix(_MARK) if number == 1 else line, where, "expected one object per line")
        if not isinstance(row, dict):
            raise DataError(
                f'{where}: a {type(row).__name__}; expected one object per line, such as {{"{field}": "..."}}'
            )
        yield position, _json_text(row, field, where)


def _json_list_or_lines(file: Path, field: str) -> Rows:
    """A file that begins with `[` is one list of rows, which are objects or texts."""
    with open_packed(file) as (opened, _):
        begins = opened.read(_BLOCK).removeprefix(_MARK).lstrip()[:1]
    if begins != b"[":
        yield from _json_lines(file, field)
        return
    with open_packed(file) as (opened, _):
        data = opened.read(_LARGEST_DOCUMENT + 1)
    if len(data) > _LARGEST_DOCUMENT:
        raise DataError(
            f"{file}: a list of more than {_LARGEST_DOCUMENT} bytes, which is read at once; make it JSON lines, e.g."
            " with jq -c '.[]'"
        )
    rows = _json(data.removeprefix(_MARK), str(file), "expected a list, or one object per line")
    for number, row in enumerate(rows, 1):
        where = f"{file}, row {number}"
        if isinstance(row, list):
            raise DataError(f'{where}: a list; expected a text or an object, such as {{"{field}": "..."}}')
        text = _json_text(row, field, where) if isinstance(row, dict) else _whole(text_of(row, field, where))
        yield file.stat().st_size * number // len(rows), text


def _json(data: bytes, where: str, expected: str) -> Any:
    """Parse a JSON document."""
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte 0x{data[error.start]:02x}); convert it, e.g. with iconv") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "a value is too deep or too large"
        raise DataError(f"{where}: not JSON ({reason}); {expected}") from None


def _json_text(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(f"{where}: {no_field(field, list(row))}")
    return _whole(text_of(row[field], field, where))


def _whole(text: str) -> str:
    """JSON may hold half a surrogate pair, which UTF-8 cannot: it becomes U+FFFD, as in any decoder."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _columns(file: Path, field: str) -> Rows:
    """CSV or TSV; its first row names the columns."""
    csv.field_size_limit(_LARGEST_DOCUMENT)
    with open_packed(file) as (opened, raw):
        rows = csv.reader(
            _decoded_lines(file, opened), delimiter="\t" if format_of(file) == ".tsv" else ",", strict=True
        )
        column = width = 0
        try:
            for number, row in enumerate(rows):
                if number == 0:
                    check_column(file, field, row)
                    column, width = row.index(field), len(row)
                elif row and len(row) != width:  # an empty line is no row
                    raise DataError(
                        f"{file}, line {rows.line_num}: a row of {len(row)} fields, but the header has {width}; quote"
                        " fields that hold a separator or a line break"
                    )
                elif row:
                    yield raw.tell(), row[column]
        except csv.Error as error:
            raise DataError(
                f"{file}, line {rows.line_num}: not valid {format_of(file)[1:].upper()} ({error})"
            ) from None


def _decoded_lines(file: Path, opened: IO[bytes]) -> Iterator[str]:
    """Lines with their breaks, as the csv module takes them."""
    offset = 0
    while line := opened.readline(_LARGEST_DOCUMENT + 1):
        if len(line) > _LARGEST_DOCUMENT:
            raise DataError(f"{file}: a line longer than {_LARGEST_DOCUMENT} bytes; split it into documents")
        yield _decode(line, file, offset).removeprefix("\ufeff" if offset == 0 else "")
        offset += len(line)


def _parquet(file: Path, field: str) -> Rows:
    import pyarrow.parquet as pq

    with _sound(file, "Parquet file"), pq.ParquetFile(file) as opened:
        check_column(file, field, opened.schema_arrow.names)
        batches = opened.iter_batches(batch_size=1024, columns=[field])
        yield from _arrow_rows(batches, file, field, max(opened.metadata.num_rows, 1))


def _arrow(file: Path, field: str) -> Rows:
    import pyarrow as pa

    sound = _sound(file, "Arrow file of datasets")
    with sound, pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as opened:
        check_column(file, field, opened.schema.names)
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
            yield size * row // num_rows if num_rows else 0, text_of(value.as_py(), field, f"{file}, row {row}")


_READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list_or_lines,
    ".csv": _columns,
    ".tsv": _columns,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


def _lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, bytes of the file read so far, the line without its line break)."""
    number = 0
    for position, block in _blocks(file):
        for line in block.split(b"\n"):
            number += 1
            yield number, position, line


def _blocks(file: Path) -> Iterator[tuple[int, bytes]]:
    """(bytes of the file read so far, whole lines without the last break): work on a block costs less than on lines."""
    with open_packed(file) as (opened, raw):
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


def text_of(value: object, field: str, where: str) -> str:
    """The text of a row; a null is an empty document."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: field '{field}' holds a {type(value).__name__}, not text (use --text-field)")
    return value


def check_column(file: Path | str, field: str, names: list[str]) -> None:
    """Raise DataError unless a table has the column."""
    if field not in names:
        raise DataError(f"{file}: {no_field(field, names)}")


def no_field(field: str, names: list[str]) -> str:
    """The error for a row without the field."""
    return f"no field '{field}'; fields are: {', '.join(names[:12]) or 'none'} (use --text-field)"
