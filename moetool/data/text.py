"""Text on disk or on the hub -> a stream of documents; memory does not grow with the corpus."""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moetool.data.hub import hub_commit, read_hub
from moetool.data.readers import format_of, read_file
from moetool.errors import DataError
from moetool.progress import Progress, silent

_REPORT_EVERY = 2**20  # bytes between two calls of `progress`
_BLOCK = 2**24  # bytes hashed at once
_OWN_FILES = ("moetool.yaml", "moetool.json")


@dataclass(frozen=True)
class TextSource:
    """The location of text and its division into documents.

    Attributes:
        path: a file, a folder, a glob, or `hf:owner/name[@revision][#config/split]` (split: train).
        text_field: the field (JSON), column (CSV, Parquet, datasets) that holds the text.
        document: the unit of a plain-text file that is one document: the `file`, a `line` or a `paragraph`
            (paragraphs end at blank lines). In other formats it is always a row.
    """

    path: str
    text_field: str = "text"
    document: str = "file"


def read_documents(source: TextSource, progress: Progress = silent) -> Iterator[str]:
    """Read the documents of a source in a fixed order, except those of only white space.

    Args:
        source: the text to read.
        progress: called with the bytes read (rows, for a hub dataset).

    Raises:
        DataError: nothing is there, or it cannot be read in its format; names file and line.
    """
    task = f"read {_short(source)}"
    if source.path.startswith("hf:"):
        row = 0
        for row, text in enumerate(read_hub(source.path, source.text_field), 1):
            if row % 1000 == 0:
                progress(task, row, row + 1, "rows")
            if text and not text.isspace():
                yield text
        progress(task, row, row, "rows")
        return
    files = find_files(source.path)
    total = sum(file.stat().st_size for file in files)
    done = reported = 0
    for file in files:
        for position, text in read_file(file, source.text_field, source.document):
            if done + position - reported >= _REPORT_EVERY:
                reported = done + position
                progress(task, reported, max(total, reported + 1))
            if text and not text.isspace():
                yield text
        done += file.stat().st_size
    progress(task, total, total)


def find_files(path: str) -> list[Path]:
    """The files of a path, sorted.

    For a folder these are all files below it except hidden files and moetool's own; for a folder made by
    `datasets`' save_to_disk, its Arrow files.

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
    if place.is_file():
        return [place]
    if place.exists():
        raise DataError(f"{path} is neither a file nor a folder; save its output to a file")
    if glob.has_magic(path):
        matches = [Path(match) for match in sorted(glob.glob(str(place), recursive=True))]
        files = [file for match in matches for file in (_walk(match) if match.is_dir() else [match])]
        if not files:
            raise DataError(f"no file matches {path}; check the pattern (quote it, so that no shell expands it)")
        return sorted(set(files))
    raise DataError(_nothing_at(path, place))


def content_sha256(source: TextSource, progress: Progress = silent) -> str:
    """A digest of the input of `read_documents`: the files' bytes, or the hub's commit.

    Raises:
        DataError: nothing is there, or the hub does not answer.
    """
    digest = hashlib.sha256()
    if source.path.startswith("hf:"):
        digest.update(f"{source.path} {hub_commit(source.path)}".encode())
        return digest.hexdigest()
    files = find_files(source.path)
    task, total, done = f"hash {_short(source)}", sum(file.stat().st_size for file in files), 0
    for file in files:
        content = hashlib.sha256()
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK):
                content.update(block)
                done += len(block)
                progress(task, done, max(total, done))
        digest.update(f"{_read_as(file)} {content.hexdigest()}\n".encode())
    return digest.hexdigest()


def _read_as(file: Path) -> str:
    """The format a file is read as. Earlier versions read CSV as prose, and the cache may still hold its tokens."""
    extension = format_of(file)
    return f"{extension} by column" if extension in (".csv", ".tsv") else extension


def _short(source: TextSource) -> str:
    return Path(source.path).name or source.path


def _walk(folder: Path) -> list[Path]:
    """Files below a folder in a fixed order."""
    files: list[Path] = []
    for where, folders, names in os.walk(folder):
        if {"tokens.bin", "manifest.json"} <= set(names):
            raise DataError(f"{where} holds tokens (made by moetool tokenize), not text; give the text itself")
        if "dataset_dict.json" in names and len(folders) > 1:
            raise DataError(f"{where} is a dataset with splits {', '.join(sorted(folders))}; give one: {where}/SPLIT")
        saved = {"dataset_info.json", "state.json"} <= set(names)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [
            Path(where, name)
            for name in names
            if not name.startswith(".")
            and name not in _OWN_FILES
            and not name.endswith(tuple(f".{own}" for own in _OWN_FILES))  # of one file, as sample leaves them
            and name != "dataset_dict.json"
            and (not saved or name.endswith(".arrow"))
        ]
    for file in files:
        if file.exists() and not file.is_file():  # a pipe blocks, a device never ends
            raise DataError(f"{file} is neither a file nor a folder; remove it from {folder}")
    return sorted(files)


def _nothing_at(path: str, place: Path) -> str:
    parent = place.parent
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@.+|#.+)?", path) and not parent.is_dir():
        return f"no file or folder {path}; write a hub dataset as hf:{path}"
    if not parent.is_dir():
        return f"no file or folder {path} (there is no folder {parent}); check the path"
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(place.name, names, n=1)
    if near:
        return f"no file or folder {path}, did you mean {parent / near[0]}?"
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
    return f"no file or folder {path}; {parent} holds {listed}"
