"""Text on disk or on the hub -> documents, one after another; memory does not grow with the corpus."""

from __future__ import annotations

import difflib
import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from moetool.errors import DataError
from moetool.progress import Progress, silent

DOCUMENT_RULES = ("file", "line", "paragraph")

_LONGEST_LINE = 2**30  # bytes; a longer "line" is a file without line breaks, and would fill the memory
_REPORT_EVERY = 2**20  # bytes between two calls of `progress`
_NOT_READ = {".zst", ".bz2", ".xz", ".zip", ".tar", ".7z"}
_OWN_FILES = {"moetool.yaml", "moetool.json"}
_HUB = re.compile(
    r"hf:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^#]+))?(#(?P<config>[^/]*)(/(?P<split>.+))?)?", re.ASCII
)


@dataclass(frozen=True)
class TextSource:
    """Where text is and how it falls into documents.

    Attributes:
        path: a file, a folder, a glob, or `hf:owner/name[@revision][#config/split]` (split: train).
        text_field: the field (JSONL), column (Parquet, datasets) that holds the text.
        document: what one document of a plain-text file is: the `file`, a `line` or a `paragraph`
            (paragraphs end at blank lines). In JSONL, Parquet and datasets it is always a row.
    """

    path: str
    text_field: str = "text"
    document: str = "file"


def read_documents(source: TextSource, progress: Progress = silent) -> Iterator[str]:
    """Read the documents of a source in a fixed order; those of white space only are left out.

    Args:
        source: what to read.
        progress: told the bytes read (rows, for a hub dataset).

    Raises:
        DataError: nothing is there, or it cannot be read as what it claims to be; names file and line.
    """
    task = f"tokenize {Path(source.path).name or source.path}"
    if source.path.startswith("hf:"):
        for row, text in enumerate(_hub_rows(source), 1):
            if row % 1000 == 0:
                progress(task, row, row + 1, "rows")
            if text and not text.isspace():
                yield text
        progress(task, 1, 1)
        return
    files = find_files(source.path)
    total = sum(file.stat().st_size for file in files)
    done = reported = 0
    for file in files:
        for position, text in _reader(file)(file, source):
            if done + position - reported >= _REPORT_EVERY:
                reported = done + position
                progress(task, reported, max(total, reported + 1))
            if text and not text.isspace():
                yield text
        done += file.stat().st_size
    progress(task, total, total)


def find_files(path: str) -> list[Path]:
    """The files of a path, sorted.

    Of a folder these are all files below it but hidden ones and moetool's own; of a folder made by
    `datasets`' save_to_disk its Arrow files.

    Args:
        path: a file, a folder or a glob (`**` crosses folders).

    Raises:
        DataError: nothing is there, or a saved dataset has several splits.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        files = _walk(place)
        if not files:
            raise DataError(
                f"{path}: the folder holds no files; give a text, JSONL or Parquet file or a folder of them"
            )
        return files
    if place.exists():
        return [place]
    if glob.has_magic(path):
        matches = [Path(match) for match in sorted(glob.glob(str(place), recursive=True))]
        files = [file for match in matches for file in (_walk(match) if match.is_dir() else [match])]
        if not files:
            raise DataError(f"no file matches {path}; check the pattern (quote it, so that the shell leaves it alone)")
        return sorted(set(files))
    raise DataError(_nothing_at(path, place))


def content_sha256(source: TextSource, progress: Progress = silent) -> str:
    """A digest of what `read_documents` would read: the files' bytes, or the hub's commit.

    Raises:
        DataError: nothing is there, or the hub does not answer.
    """
    digest = hashlib.sha256()
    if source.path.startswith("hf:"):
        digest.update(f"{source.path} {_hub_commit(source.path)}".encode())
        return digest.hexdigest()
    files = find_files(source.path)
    for number, file in enumerate(files):
        progress(f"hash {Path(source.path).name or source.path}", number, len(files), file.name)
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{_format(file)} {content}\n".encode())
    progress(f"hash {Path(source.path).name or source.path}", len(files), len(files))
    return digest.hexdigest()


def _walk(folder: Path) -> list[Path]:
    """Files below a folder in a fixed order."""
    files: list[Path] = []
    for where, folders, names in os.walk(folder):
        if {"tokens.bin", "manifest.json"} <= set(names):
            raise DataError(f"{where} holds tokens (made by moetool tokenize), not text; give the text itself")
        if "dataset_dict.json" in names and len(folders) > 1:
            raise DataError(f"{where} is a dataset of the splits {', '.join(sorted(folders))}; give one: {where}/SPLIT")
        saved = {"dataset_info.json", "state.json"} <= set(names)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [
            Path(where, name)
            for name in names
            if not name.startswith(".")
            and name not in _OWN_FILES
            and name != "dataset_dict.json"
            and (not saved or name.endswith(".arrow"))
        ]
    return sorted(files)


def _nothing_at(path: str, place: Path) -> str:
    parent = place.parent
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@.+|#.+)?", path) and not parent.is_dir():
        return f"no file or folder {path}; a dataset of the hub is written hf:{path}"
    if not parent.is_dir():
        return f"no file or folder {path} (there is no folder {parent}); check the path"
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(place.name, names, n=1)
    if near:
        return f"no file or folder {path}, did you mean {parent / near[0]}?"
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
    return f"no file or folder {path}; {parent} holds {listed}"


# Readers: each yields (bytes of the file read so far, text of a document).


def _format(file: Path) -> str:
    """The extension that decides how a file is read, without `.gz`."""
    name = file.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _reader(file: Path) -> Any:
    if file.suffix.lower() in _NOT_READ:
        raise DataError(f"{file}: unpack it first; of compressed files only .gz is read")
    return _READERS.get(_format(file), _plain_text)


def _plain_text(file: Path, source: TextSource) -> Iterator[tuple[int, str]]:
    if source.document not in DOCUMENT_RULES:
        raise DataError(f"document rule '{source.document}': choose from {', '.join(DOCUMENT_RULES)}")
    if source.document == "file":
        with _open(file) as (opened, _):
            data = opened.read()
        yield file.stat().st_size, _decode(data, file, 0).removeprefix("\ufeff")
        return
    offset = position = 0
    paragraph: list[str] = []
    for _, position, line in _lines(file):
        text = _decode(line, file, offset).rstrip("\r\n")
        text = text.removeprefix("\ufeff") if offset == 0 else text
        offset += len(line)
        if source.document == "line":
            yield position, text
        elif text.strip():
            paragraph.append(text)
        elif paragraph:
            yield position, "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield position, "\n".join(paragraph)


def _json_lines(file: Path, source: TextSource) -> Iterator[tuple[int, str]]:
    for number, position, line in _lines(file):
        if line.isspace():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where}: not UTF-8 (byte 0x{line[error.start]:02x}); convert it, e.g. with iconv"
            ) from None
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too large a value"
            raise DataError(f"{where}: not JSON ({reason}); expected one object a line") from None
        if not isinstance(row, dict):
            raise DataError(
                f'{where}: a {type(row).__name__}; expected one object a line, such as {{"{source.text_field}": "..."}}'
            )
        if source.text_field not in row:
            raise DataError(f"{where}: {_no_field(source.text_field, list(row))}")
        # JSON may hold half a surrogate pair, which no UTF-8 can: it becomes U+FFFD as in any decoder.
        text = _text(row[source.text_field], source.text_field, where)
        yield position, text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _parquet(file: Path, source: TextSource) -> Iterator[tuple[int, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            _check_column(file, source.text_field, opened.schema_arrow.names)
            batches = opened.iter_batches(batch_size=1024, columns=[source.text_field])
            yield from _arrow_rows(batches, file, source.text_field, max(opened.metadata.num_rows, 1))
    except pa.ArrowException as error:
        raise DataError(f"{file}: not a sound Parquet file ({_one_line(error)})") from None


def _arrow(file: Path, source: TextSource) -> Iterator[tuple[int, str]]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as opened:
            _check_column(file, source.text_field, opened.schema.names)
            batches = (batch.select([source.text_field]) for batch in opened)
            yield from _arrow_rows(batches, file, source.text_field, None)
    except pa.ArrowException as error:
        raise DataError(f"{file}: not a sound Arrow file of datasets ({_one_line(error)})") from None


def _arrow_rows(batches: Iterator[Any], file: Path, field: str, num_rows: int | None) -> Iterator[tuple[int, str]]:
    size, row = file.stat().st_size, 0
    for batch in batches:
        try:
            values = batch.column(0).to_pylist()
        except UnicodeDecodeError:
            raise DataError(
                f"{file}, rows {row + 1} to {row + len(batch)}: '{field}' holds text not in UTF-8"
            ) from None
        for value in values:
            row += 1
            yield size * row // num_rows if num_rows else 0, _text(value, field, f"{file}, row {row}")


_READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


@contextmanager
def _open(file: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file that may be gzipped; gives it and the raw file, whose position tells the progress."""
    with file.open("rb") as raw:
        try:
            yield (cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if file.suffix.lower() == ".gz" else raw), raw
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{file}: not a sound gzip file ({_one_line(error)})") from None


def _lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, bytes of the file read so far, the line with its line break)."""
    with _open(file) as (opened, raw):
        number = 0
        while line := opened.readline(_LONGEST_LINE):
            number += 1
            if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                raise DataError(f"{file}, line {number}: longer than {_LONGEST_LINE} bytes; break it into documents")
            yield number, raw.tell(), line


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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# The hub, through `datasets` streaming.


def _hub_name(path: str) -> dict[str, str | None]:
    match = _HUB.fullmatch(path)
    if not match:
        raise DataError(f"{path}: a dataset of the hub is written hf:owner/name[@revision][#config/split]")
    return match.groupdict()


def _hub_failed(path: str, error: Exception) -> DataError:
    return DataError(
        f"{path}: the hub did not give it ({type(error).__name__}: {_one_line(error)});"
        " check the spelling, or the network and `hf auth login`"
    )


def _hub_rows(source: TextSource) -> Iterator[str]:
    import datasets

    name = _hub_name(source.path)
    try:
        rows = datasets.load_dataset(
            name["name"],
            name=name["config"] or None,
            revision=name["revision"],
            split=name["split"] or "train",
            streaming=True,
        )
        if rows.column_names is not None:
            _check_column(source.path, source.text_field, rows.column_names)
            rows = rows.select_columns([source.text_field])
        for number, row in enumerate(rows, 1):
            where = f"{source.path}, row {number}"
            if source.text_field not in row:
                raise DataError(f"{where}: {_no_field(source.text_field, list(row))}")
            yield _text(row[source.text_field], source.text_field, where)
    except DataError:
        raise
    except Exception as error:  # the client's errors have no common base: network, HTTP, builder, cache
        raise _hub_failed(source.path, error) from None


def _hub_commit(path: str) -> str:
    """The commit that a dataset's revision stands for now."""
    name = _hub_name(path)
    if name["revision"] and re.fullmatch(r"[0-9a-f]{40}", name["revision"]):
        return name["revision"]
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(str(name["name"]), revision=name["revision"]).sha)
    except Exception as error:
        raise _hub_failed(path, error) from None
