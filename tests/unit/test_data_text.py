"""Text in its formats becomes documents; what cannot be read is named with file and line."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moetool.data import readers
from moetool.data.text import TextSource, content_sha256, find_files, read_documents
from moetool.errors import DataError


def read(path: object, **settings: str) -> list[str]:
    return list(read_documents(TextSource(str(path), **settings)))


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("file", ["\n  a\nb\r\n\n \n\nc\n"]),
        ("line", ["  a", "b", "c"]),
        ("paragraph", ["  a\nb", "c"]),
    ],
)
def test_plain_text_falls_into_documents_by_the_rule(tmp_path: Path, document: str, expected: list[str]) -> None:
    path = write(tmp_path / "x.txt", "\n  a\nb\r\n\n \n\nc\n")
    assert read(path, document=document) == expected


@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
def test_a_byte_order_mark_and_empty_files_leave_nothing(tmp_path: Path, document: str) -> None:
    assert read(write(tmp_path / "bom.txt", b"\xef\xbb\xbfhello"), document=document) == ["hello"]
    assert read(write(tmp_path / "empty.txt", ""), document=document) == []
    assert read(write(tmp_path / "blank.txt", " \n\t\n"), document=document) == []


def test_structured_rows_are_documents_whatever_the_rule(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "one\n\ntwo", "id": 1}, {"text": " "}, {"text": None}, {"text": "three"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows) + "\n"
    jsonl = write(tmp_path / "a.jsonl", lines)
    zipped = write(tmp_path / "a.jsonl.gz", gzip.compress(lines.encode()))
    table = pa.table({"id": range(4), "text": [row["text"] for row in rows]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    for path in (jsonl, zipped, tmp_path / "a.parquet"):
        assert read(path, document="line") == ["one\n\ntwo", "three"]


def test_a_json_file_that_is_one_list_is_its_rows(tmp_path: Path) -> None:
    rows = [{"text": "one\n\ntwo", "id": 1}, {"text": None}, "three", " ", None, {"text": "a\ud800"}]
    for name, text in (("dense", json.dumps(rows)), ("spread", "\ufeff \n" + json.dumps(rows, indent=1))):
        assert read(write(tmp_path / f"{name}.json", text)) == ["one\n\ntwo", "three", "a\ufffd"]
    assert read(write(tmp_path / "none.json", "[]")) == []
    lines = write(tmp_path / "lines.json", '{"text": "[a]"}\n{"text": "b"}\n')
    assert read(lines) == ["[a]", "b"]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_csv_is_read_by_column(tmp_path: Path, name: str, separator: str) -> None:
    rows = [("id", "text", "more"), ("1", '"one, ""two""\r\nthree"', "x"), ("2", "four", ""), ("", "", "y")]
    data = "\ufeff" + "".join(separator.join(row) + "\r\n" for row in rows) + "\r\n"
    path = write(tmp_path / name, data)
    assert read(path) == ['one, "two"\r\nthree', "four"]
    assert read(path, text_field="more") == ["x", "y"]
    # Earlier versions have left tokens of its bytes as prose in the cache.
    prose = write(tmp_path / "a.txt", data)
    assert content_sha256(TextSource(str(path))) != content_sha256(TextSource(str(prose)))
    expected = hashlib.sha256(f"{path.suffix} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()).hexdigest()
    assert content_sha256(TextSource(str(path))) != expected


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("extension", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)]
)
def test_compressed_files_are_read_as_what_is_in_them(
    tmp_path: Path, extension: str, pack: Callable[[bytes], bytes]
) -> None:
    contents = {
        "a.txt": ("one\ntwo", ["one", "two"]),
        "a.jsonl": ('{"text": "one\\ntwo"}\n' * 2, ["one\ntwo"] * 2),
        "a.json": ('["one", {"text": "two"}]', ["one", "two"]),
        "a.csv": ("text\none\ntwo\n", ["one", "two"]),
    }
    for name, (text, documents) in contents.items():
        half = len(text) // 2  # two parts one after another are one file, as `cat` makes it
        data = pack(text[:half].encode()) + pack(text[half:].encode())
        assert read(write(tmp_path / f"{name}.{extension}", data), document="line") == documents


def test_another_field_is_read_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ndjson", '{"text": "no", "body": "yes"}\n')
    assert read(path, text_field="body") == ["yes"]


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    assert read(path) == ["a\ufffdb \U0001f600"]


def test_a_folder_is_read_whole_in_order_but_for_hidden_and_own_files(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a" / "z.jsonl", '{"text": "z"}')
    write(tmp_path / "c.md", "c")
    write(tmp_path / ".hidden", "no")
    write(tmp_path / ".git" / "x.txt", "no")
    write(tmp_path / "moetool.yaml", "no: 1")
    assert read(tmp_path) == ["z", "b", "c"]
    assert read(f"{tmp_path}/**/*.[jt]*") == ["z", "b"]
    assert [file.name for file in find_files(str(tmp_path))] == ["z.jsonl", "b.txt", "c.md"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    assert read(write(tmp_path / "x[1].txt", "one")) == ["one"]


def test_saved_datasets_are_recognised(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_dict({"text": [name, "", name * 2], "n": [1, 2, 3]}) for name in "ab"}
    parts["a"].save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"a": parts["a"]}).save_to_disk(tmp_path / "three")
    assert read(tmp_path / "one") == ["a", "aa"]
    assert read(tmp_path / "two" / "b") == ["b", "bb"]
    assert read(tmp_path / "three") == ["a", "aa"]
    with pytest.raises(DataError, match=r"splits a, b; give one"):
        read(tmp_path / "two")


BROKEN: dict[str, tuple[str, str | bytes, str]] = {
    "not utf-8": ("x.txt", b"a" * 1024 + b"\xff", r"x\.txt: not UTF-8 \(byte 0xff at offset 1024\); convert it"),
    "no field": (
        "notes.jsonl",
        '{"text": "a"}\n\n{"body": "b", "id": 3}\n',
        r"notes\.jsonl, line 3: no field 'text'; fields are: body, id \(use --text-field\)",
    ),
    "not json": ("n.jsonl", '{"text": "a"}\n{"text": \n', r"n\.jsonl, line 2: not JSON \(.*\); expected one object"),
    "an array": ("n.jsonl", '["a", "b"]', r"n\.jsonl, line 1: a list; expected one object per line"),
    "a list of lists": ("n.json", '["a", ["b"]]', r"n\.json, row 2: a list; expected a text or an object"),
    "a list of numbers": ("n.json", '["a", 7]', r"n\.json, row 2: field 'text' holds a int, not text"),
    "a list without the field": ("n.json", '[{"body": "a"}]', r"n\.json, row 1: no field 'text'; fields are: body"),
    "half a list": (
        "n.json",
        '[{"text": "a"},\n',
        r"n\.json: not JSON \(.*\); expected a list, or one object per line",
    ),
    "csv without the column": ("n.csv", "id;text\n1;a\n", r"n\.csv: no field 'text'; fields are: id;text"),
    "a row of csv": ("n.csv", "id,text\n1,a\n2,b, c\n", r"n\.csv, line 3: a row of 3 fields, but the header has 2"),
    "an open quote": ("n.csv", 'text\n"a\nb\n', r"n\.csv, line 3: not valid CSV \(unexpected end of data\)"),
    "csv not utf-8": ("n.csv", b"text\na\n\xe9\n", r"n\.csv: not UTF-8 \(byte 0xe9 at offset 7\)"),
    "not text": ("n.jsonl", '{"text": ["a"]}', r"n\.jsonl, line 1: field 'text' holds a list, not text"),
    "json not utf-8": ("n.jsonl", b'{"text": "\xe9"}', r"n\.jsonl, line 1: not UTF-8 \(byte 0xe9\)"),
    "too deep": ("n.jsonl", b"[" * 200_000, r"n\.jsonl, line 1: not JSON"),
    "huge number": ("n.jsonl", b'{"text": ' + b"9" * 5000 + b"}", r"n\.jsonl, line 1: not JSON"),
    "no gzip": ("n.jsonl.gz", "plain", r"n\.jsonl\.gz: not a valid gzip file"),
    "cut gzip": ("n.txt.gz", gzip.compress(b"some text" * 99)[:-9], r"n\.txt\.gz: not a valid gzip file"),
    "cut zstd": ("n.jsonl.zst", b"(\xb5/\xfd", r"n\.jsonl\.zst: not a valid zstd file"),
    "no zstd": ("n.txt.zst", "plain", r"n\.txt\.zst: not a valid zstd file"),
    "no bzip2": ("n.txt.bz2", "plain", r"n\.txt\.bz2: not a valid bzip2 file"),
    "cut bzip2": ("n.txt.bz2", bz2.compress(b"some text" * 99)[:-9], r"n\.txt\.bz2: not a valid bzip2 file"),
    "no xz": ("n.csv.xz", "plain", r"n\.csv\.xz: not a valid xz file"),
    "other packing": ("n.zip", "PK", r"n\.zip: unpack it first; of packed files only \.gz, \.bz2, \.xz, \.zst"),
    "an archive": ("n.tar.gz", gzip.compress(b"some text"), r"n\.tar\.gz: unpack it first"),
    "no parquet": ("n.parquet", "PAR1 but no more", r"n\.parquet: not a valid Parquet file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    name, data, message = BROKEN[case]
    with pytest.raises(DataError, match=message) as caught:
        read(write(tmp_path / name, data))
    assert "\n" not in str(caught.value)


def test_the_offset_of_a_wrong_byte_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", b"one\r\ntwo\nthr\xffee\n")
    with pytest.raises(DataError, match="byte 0xff at offset 12"):
        read(path, document="line")


def test_a_parquet_file_without_the_column_names_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no field 'text'; fields are: body, id"):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 1: field 'id' holds a int, not text"):
        read(tmp_path / "a.parquet", text_field="id")


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_LARGEST_DOCUMENT", 100)
    path = write(tmp_path / "a.jsonl", '{"text": "short"}\n' + json.dumps({"text": "x" * 200}))
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: longer than 100 bytes"):
        read(path)
    with pytest.raises(DataError, match=r"b\.txt: larger than 100 bytes.*--document line"):
        read(write(tmp_path / "b.txt", "x\n" * 51))
    assert len(read(tmp_path / "b.txt", document="line")) == 51


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("texd.jsonl", r"did you mean .*text\.jsonl\?"),
        ("zzz", r"no file or folder .*zzz; .* holds empty, text\.jsonl"),
        ("empty", "holds no files"),
        ("*.csv", r"no file matches .*\*\.csv"),
        ("no/where", "there is no folder"),
    ],
)
def test_a_wrong_path_is_told_what_is_there(tmp_path: Path, place: str, message: str) -> None:
    write(tmp_path / "text.jsonl", "{}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        read(tmp_path / place)


def test_a_hub_name_without_prefix_is_told_the_form() -> None:
    with pytest.raises(DataError, match=r"write a hub dataset as hf:owner/name-of-data"):
        read("owner/name-of-data")
    with pytest.raises(DataError, match=r"hf:owner/name\[@revision\]"):
        read("hf:name")


def test_the_hub_without_a_network_is_one_line() -> None:
    for digest in (lambda source: list(read_documents(source)), content_sha256):
        with pytest.raises(DataError, match=r"hf:owner/data: the hub did not provide it") as caught:
            digest(TextSource("hf:owner/data"))
        assert "\n" not in str(caught.value)


def test_a_hub_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def load_dataset(path: str, **settings: object) -> datasets.IterableDataset:
        asked.update(settings, path=path)
        rows = [{"text": "a", "n": 1}, {"text": ""}, {"text": "b", "n": 2}]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("hf:owner/data@v1.0#en/validation") == ["a", "b"]
    assert asked == {
        "path": "owner/data",
        "name": "en",
        "revision": "v1.0",
        "split": "validation",
        "streaming": True,
    }
    read("hf:owner/data")
    assert (asked["name"], asked["revision"], asked["split"]) == (None, None, "train")
    with pytest.raises(DataError, match=r"hf:owner/data, row 1: no field 'body'; fields are: text, n"):
        read("hf:owner/data", text_field="body")


def test_the_digest_follows_the_content_and_how_it_is_read(tmp_path: Path) -> None:
    digest: Callable[[Path], str] = lambda path: content_sha256(TextSource(str(path)))  # noqa: E731
    same = digest(write(tmp_path / "a.txt", '{"text": "a"}'))
    assert digest(write(tmp_path / "b" / "other.txt", '{"text": "a"}')) == same
    assert digest(write(tmp_path / "c.jsonl", '{"text": "a"}')) != same
    assert digest(write(tmp_path / "a.txt", '{"text": "A"}')) != same


def test_progress_reaches_its_total(tmp_path: Path) -> None:
    calls: list[tuple[float, float]] = []
    path = write(tmp_path / "x.txt", "a line of text\n" * 200_000)
    source = TextSource(str(path), document="line")
    list(read_documents(source, lambda task, done, total, note="": calls.append((done, total))))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (3_000_000, 3_000_000)
    assert 2 <= len(calls) <= 5
