"""Documents become one token stream on disk, which is complete or not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moetool.checkpoint.model import load_tokenizer
from moetool.data import encode as encoding
from moetool.data import make_tokens as module
from moetool.data.make_tokens import describe, tokenized, write_tokens
from moetool.data.text import TextSource
from moetool.data.tokens import TokenStream, open_tokens, split_validation
from moetool.errors import ConfigError, DataError
from tests import forked, tiny

DOCUMENTS = ["The quick fox.", "x", "def add(a, b):\n    return a + b\n", "日本語 and <|endoftext|>"]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return folder


@pytest.fixture
def stream(tmp_path: Path, tokenizer_folder: Path) -> TokenStream:
    return write_tokens(DOCUMENTS, load_tokenizer(tokenizer_folder), tmp_path / "tokens")


def flat(documents: list[list[int]]) -> list[int]:
    return [token for ids in documents for token in ids]


def expected(folder: Path, documents: list[str] = DOCUMENTS) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    return [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in documents]


def test_the_stream_is_the_documents_each_ended_by_eos(stream: TokenStream, tokenizer_folder: Path) -> None:
    each = expected(tokenizer_folder)
    assert stream.read(0, stream.num_tokens).tolist() == flat(each)
    assert np.diff(stream.offsets).tolist() == [len(ids) for ids in each]
    assert stream.num_documents == 4
    assert stream.read(3, 5).dtype == np.int64
    assert stream.read(3, 0).tolist() == []
    assert stream.manifest["dtype"] == "uint16"
    assert stream.manifest["num_bytes"] == len("".join(DOCUMENTS).encode())


def test_on_disk_are_little_endian_integers(stream: TokenStream, tmp_path: Path) -> None:
    raw = (tmp_path / "tokens" / "tokens.bin").read_bytes()
    assert raw == stream.read(0, stream.num_tokens).astype("<u2").tobytes()
    assert (tmp_path / "tokens" / "offsets.bin").read_bytes() == stream.offsets.astype("<i8").tobytes()


def test_a_batch_boundary_changes_nothing(
    stream: TokenStream, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 1)
    other = write_tokens(DOCUMENTS, load_tokenizer(tokenizer_folder), tmp_path / "other")
    assert other.manifest == stream.manifest
    assert other.offsets.tolist() == stream.offsets.tolist()


def test_truncation_and_padding_of_the_tokenizer_do_not_act(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    stream = write_tokens(DOCUMENTS, tokenizer, tmp_path / "tokens")
    assert stream.read(0, stream.num_tokens).tolist() == flat(expected(tokenizer_folder))


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.add_tokens([f"<extra {i}>" for i in range(2**16)])
    stream = write_tokens([f"a <extra {2**16 - 1}>"], tokenizer, tmp_path / "tokens")
    assert stream.manifest["dtype"] == "uint32"
    assert stream.read(0, stream.num_tokens).max() == stream.manifest["vocab_size"] - 1 > 2**16


def test_some_documents_read_as_a_stream_of_their_own(stream: TokenStream, tokenizer_folder: Path) -> None:
    each = expected(tokenizer_folder)
    part = stream.documents(np.array([3, 0, 2]))
    tokens = each[3] + each[0] + each[2]
    assert (part.num_tokens, part.num_documents) == (len(tokens), 3)
    for start in range(len(tokens)):
        for length in range(len(tokens) - start + 1):
            assert part.read(start, length).tolist() == tokens[start : start + length]
    again = part.documents(np.array([1]))
    assert again.read(0, again.num_tokens).tolist() == each[0]


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 10_000), (10_000, 0), (0, -1)])
def test_reading_past_the_stream_is_an_error(stream: TokenStream, start: int, length: int) -> None:
    with pytest.raises(IndexError):
        stream.read(start, length)


def test_damage_is_found_on_opening(stream: TokenStream, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    open_tokens(folder)
    with (folder / "tokens.bin").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match=r"tokens\.bin has \d+ bytes instead of \d+"):
        open_tokens(folder)
    (folder / "tokens.bin").unlink()
    with pytest.raises(DataError, match=r"tokens\.bin is missing"):
        open_tokens(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"dtype": "float8"}))
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        open_tokens(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(DataError, match="format 99"):
        open_tokens(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="no finished tokens"):
        open_tokens(folder)


def test_a_failure_leaves_nothing(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Iterator[str]:
        yield "good"
        raise DataError("bad")

    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 1)
    tokenizer = load_tokenizer(tokenizer_folder)
    with pytest.raises(DataError, match="bad"):
        write_tokens(fail(), tokenizer, tmp_path / "deep" / "tokens")
    assert list((tmp_path / "deep").iterdir()) == []
    with pytest.raises(DataError, match="no text in the input"):
        write_tokens([], tokenizer, tmp_path / "deep" / "tokens")
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_failed_overwrite_leaves_the_old_tokens(stream: TokenStream, tmp_path: Path, tokenizer_folder: Path) -> None:
    def fail() -> Iterator[str]:
        yield "good"
        raise DataError("bad")

    with pytest.raises(DataError, match="bad"):
        write_tokens(fail(), load_tokenizer(tokenizer_folder), tmp_path / "tokens", overwrite=True)
    assert open_tokens(tmp_path / "tokens").manifest == stream.manifest


def test_a_killed_run_leaves_nothing_that_opens_and_the_next_one_clears_up(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from moetool.checkpoint.model import load_tokenizer; from moetool.data import encode, make_tokens\n"
        "encode._BATCH_CHARACTERS = 1\n"
        "def texts():\n"
        "    yield 'a'; yield 'b'\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "make_tokens.write_tokens(texts(), load_tokenizer(Path(sys.argv[1])), Path(sys.argv[2]))\n"
    )
    folder = tmp_path / "tokens"
    done = subprocess.run([sys.executable, "-c", script, str(tokenizer_folder), str(folder)], timeout=120, check=False)
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    with pytest.raises(DataError):
        open_tokens(left)
    long_ago = time.time() - 3600
    os.utime(left, (long_ago, long_ago))
    write_tokens(DOCUMENTS, load_tokenizer(tokenizer_folder), folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_foreign_files_are_never_deleted(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"holds other files \(thesis\.tex\)"):
            write_tokens(DOCUMENTS, tokenizer, tmp_path / "mine", overwrite=overwrite)
    with pytest.raises(DataError, match="is a file"):
        write_tokens(DOCUMENTS, tokenizer, tmp_path / "mine" / "thesis.tex", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        write_tokens(DOCUMENTS, tokenizer, tmp_path / "tokens")


# The cache.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOETOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def test_text_is_tokenized_once(tokenizer_folder: Path, jsonl: Path, cache: Path) -> None:
    read: list[str] = []
    first = tokenized(TextSource(str(jsonl)), tokenizer_folder, lambda task, *_: read.append(task))
    assert read[-1] == "read text.jsonl"
    read.clear()
    second = tokenized(TextSource(str(jsonl)), tokenizer_folder, lambda task, *_: read.append(task))
    assert "read text.jsonl" not in read
    assert first.manifest == second.manifest
    assert first.num_documents == 80
    assert len(list(cache.iterdir())) == 1


def test_another_content_field_rule_or_tokenizer_is_another_entry(
    tmp_path: Path, tokenizer_folder: Path, cache: Path
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one\ntwo\n")
    other = tmp_path / "other"
    tiny.save_tokenizer(other, vocab_size=290)
    assert tokenized(TextSource(str(text)), tokenizer_folder).num_documents == 1
    assert tokenized(TextSource(str(text), document="line"), tokenizer_folder).num_documents == 2
    assert tokenized(TextSource(str(text)), other).manifest["vocab_size"] == 290
    text.write_text("one\ntwo\nthree\n")
    assert tokenized(TextSource(str(text), document="line"), tokenizer_folder).num_documents == 3
    assert len(list(cache.iterdir())) == 4


def test_a_damaged_cache_entry_is_made_anew(tokenizer_folder: Path, jsonl: Path, cache: Path) -> None:
    first = tokenized(TextSource(str(jsonl)), tokenizer_folder)
    (entry,) = cache.iterdir()
    (entry / "tokens.bin").write_bytes(b"\0")
    again = tokenized(TextSource(str(jsonl)), tokenizer_folder)
    assert again.manifest == first.manifest
    assert open_tokens(entry).num_tokens == first.num_tokens


def say_number() -> None:
    print(tokenized(TextSource(sys.argv[1]), Path(sys.argv[2])).num_tokens)


def test_many_processes_make_one_cache_entry(tokenizer_folder: Path, jsonl: Path, cache: Path, tmp_path: Path) -> None:
    target = f"{__name__}:say_number"
    running = [forked.start(tmp_path / str(n), jsonl, tokenizer_folder, target=target) for n in range(3)]
    done = [process.wait() for process in running]
    assert [one.code for one in done] == [0, 0, 0]
    assert len({one.out for one in done}) == 1
    assert int(done[0].out) > 0
    (entry,) = cache.iterdir()
    open_tokens(entry)


def test_the_loser_of_a_race_takes_the_winners_tokens(
    tokenizer_folder: Path, jsonl: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    won: list[TokenStream] = []

    def race(source: TextSource, progress: object) -> Iterator[str]:
        monkeypatch.undo()
        monkeypatch.setenv("MOETOOL_CACHE", str(cache.parent))
        won.append(tokenized(source, tokenizer_folder))
        yield "something else"

    monkeypatch.setattr(module, "read_documents", race)
    lost = tokenized(TextSource(str(jsonl)), tokenizer_folder)
    assert lost.manifest == won[0].manifest
    assert lost.num_documents == 80


def test_a_tokenised_folder_is_opened_as_it_is(tmp_path: Path, tokenizer_folder: Path, jsonl: Path) -> None:
    source, folder, resaved = TextSource(str(jsonl)), tmp_path / "tokens", tmp_path / "resaved"
    tokenizer = load_tokenizer(tokenizer_folder)
    write_tokens(["only", "two"], tokenizer, folder, describe([source], tokenizer_folder, tokenizer))
    assert tokenized(TextSource(str(folder)), tokenizer_folder).num_documents == 2
    tokenizer.backend_tokenizer.enable_truncation(7)  # saved with it, and formatted anew: the same tokenizer
    tokenizer.save_pretrained(resaved)
    path = resaved / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert tokenized(TextSource(str(folder)), resaved).num_documents == 2
    other = tmp_path / "other"
    tiny.save_tokenizer(other, vocab_size=290)
    with pytest.raises(DataError, match=r"tokenized with another tokenizer, not that of .*other"):
        tokenized(TextSource(str(folder)), other)


# Validation.


def documents_of(part: TokenStream, whole: TokenStream) -> set[int]:
    return {whole.starts.tolist().index(start) for start in part.starts.tolist()}


def test_validation_is_a_fixed_choice_of_whole_documents(tokenizer_folder: Path, jsonl: Path) -> None:
    stream = tokenized(TextSource(str(jsonl)), tokenizer_folder)
    train, val = split_validation(stream, "0.1", seed=0)
    held = documents_of(val, stream)
    assert len(held) == 8
    assert documents_of(train, stream) == set(range(80)) - held
    assert held != set(range(72, 80))
    assert train.num_tokens + val.num_tokens == stream.num_tokens
    assert documents_of(split_validation(stream, 0.1, seed=0)[1], stream) == held
    assert documents_of(split_validation(stream, 0.1, seed=1)[1], stream) != held
    assert held < documents_of(split_validation(stream, 0.2, seed=0)[1], stream)


def test_each_side_holds_at_least_a_document(stream: TokenStream) -> None:
    for fraction, sizes in (("0.0001", (3, 1)), ("0.9999", (1, 3))):
        assert tuple(part.num_documents for part in split_validation(stream, fraction, 0)) == sizes


@pytest.mark.parametrize(
    ("num_tokens", "fraction", "held"), [(100, "0.1", 10), (100, "0.001", 2), (100, "0.999", 98), (4, "0.01", 2)]
)
def test_of_a_single_document_the_last_tokens_are_held_out(num_tokens: int, fraction: str, held: int) -> None:
    memory = np.arange(1000, 2000)
    start = np.array([7])  # where it begins in the memory
    manifest = {"num_documents": 1, "num_tokens": num_tokens}
    whole = TokenStream(manifest, start, np.array([0, num_tokens]), memory)
    for seed in (0, 1):
        train, val = split_validation(whole, fraction, seed)
        assert train.read(0, train.num_tokens).tolist() == [*range(1007, 1007 + num_tokens - held)]
        assert val.read(0, val.num_tokens).tolist() == [*range(1007 + num_tokens - held, 1007 + num_tokens)]
        assert val.positions(1, 1).tolist() == [0]
        with pytest.raises(IndexError):
            train.read(train.num_tokens - 1, 2)
        assert train.is_part
        assert val.is_part
    assert not whole.is_part


def test_what_cannot_be_split_is_refused(stream: TokenStream) -> None:
    three = TokenStream({"sources": ["a.txt"]}, np.array([0]), np.array([0, 3]), np.arange(3))
    with pytest.raises(DataError, match=r"a.txt: 3 tokens in one document, too few.*--val-fraction 0"):
        split_validation(three, "0.5", 0)
    for fraction in (0, 1, "-0.1", "x"):
        with pytest.raises(ConfigError, match="--val-fraction"):
            split_validation(stream, fraction, 0)
    assert not any(part.is_part for part in split_validation(stream, "0.5", 0))


def test_a_link_to_a_folder_stays_a_link_and_overwriting_loses_nothing(tmp_path: Path, llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to("real")
    assert write_tokens(["one"], tokenizer, link).num_documents == 1
    assert write_tokens(["one", "two"], tokenizer, link, overwrite=True).num_documents == 2
    assert link.is_symlink()
    assert open_tokens(tmp_path / "real").num_documents == 2


def test_the_current_folder_is_refused(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="give one inside it"):
        write_tokens(["one"], load_tokenizer(llama), Path())


def test_positions_count_from_the_document_or_the_window() -> None:
    stream = TokenStream({}, np.array([0, 3, 4]), np.array([0, 3, 4, 9]), np.arange(9))
    assert stream.positions(0, 9).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    assert stream.positions(1, 4).tolist() == [0, 1, 0, 0]
    assert stream.positions(6, 3).tolist() == [0, 1, 2]
    with pytest.raises(IndexError, match="tokens 6 to 10"):
        stream.positions(6, 4)


@pytest.mark.parametrize(("first", "documents"), [(0, 1), (9, 1), (10, 2), (11, 2), (12, 3), (10**6, 4)])
def test_only_the_documents_that_hold_the_first_tokens(
    first: int, documents: int, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first document and its end are 10 tokens, the second 2. The token after the first ones is there, too."""
    assert [len(ids) for ids in expected(tokenizer_folder, ["The quick fox.", "x"])] == [10, 2]
    for characters in (1, 2**18):  # however much a batch holds
        monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", characters)
        out = tmp_path / str(characters)
        found = write_tokens(DOCUMENTS, load_tokenizer(tokenizer_folder), out, first=first)
        assert found.num_documents == documents
        assert found.read(0, found.num_tokens).tolist() == flat(expected(tokenizer_folder, DOCUMENTS[:documents]))
        whole = write_tokens(DOCUMENTS[:documents], load_tokenizer(tokenizer_folder), tmp_path / f"{characters} whole")
        assert found.manifest["sha256"] == whole.manifest["sha256"]


def test_the_rest_of_a_long_text_is_not_read(
    tmp_path: Path, tokenizer_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("stands for 840 MB", encoding="utf-8")
    read = 0

    def documents(*those: object) -> Iterator[str]:
        nonlocal read
        for _ in range(100_000):
            read += 1
            yield "The quick brown fox. " * 400

    monkeypatch.setattr(module, "read_documents", documents)
    found = tokenized(TextSource(str(path)), tokenizer_folder, first=5000)
    assert 5000 < found.num_tokens < 10_000
    assert read < 100_000 / 20  # what the cores have at once
    assert tokenized(TextSource(str(path)), tokenizer_folder, first=5000).manifest == found.manifest
    assert tokenized(TextSource(str(path)), tokenizer_folder, first=9000).num_tokens > 9000


def test_a_run_that_recorded_all_tokens_gets_them_again(tokenizer_folder: Path, jsonl: Path, cache: Path) -> None:
    """As earlier versions did, whose runs are continued."""
    source = TextSource(str(jsonl))
    every, first = tokenized(source, tokenizer_folder), tokenized(source, tokenizer_folder, first=20)
    assert 20 < first.num_tokens < every.num_tokens
    for one in (every, first):
        recorded = json.dumps({"recipe": {"data": {"t": one.manifest["sha256"]}}})
        found = tokenized(source, tokenizer_folder, first=20, recorded=recorded)
        assert found.manifest["sha256"] == one.manifest["sha256"]


def test_a_flipped_bit_of_cached_first_tokens_is_found(tokenizer_folder: Path, jsonl: Path, cache: Path) -> None:
    first = tokenized(TextSource(str(jsonl)), tokenizer_folder, first=20)
    tokens, path = first.read(0, 20).tolist(), cache / first.manifest["key"] / "tokens.bin"
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert tokenized(TextSource(str(jsonl)), tokenizer_folder, first=20).read(0, 20).tolist() == tokens
    assert path.read_bytes() == whole
