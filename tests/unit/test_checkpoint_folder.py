"""Files that are whole or absent, and the lock on a folder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moetool.checkpoint.folder import FolderLock, naming, write_files
from moetool.errors import CheckpointError


def test_who_holds_a_folder_is_said_though_nothing_is_written_in_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = "import sys; from pathlib import Path; from moetool.checkpoint.folder import FolderLock\n"
    program += "with FolderLock(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    (tmp_path / "program").write_text(program)
    command = [sys.executable, "program", "out", "some\x1b words"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout
        process.stdout.readline()
        with pytest.raises(CheckpointError) as error:
            FolderLock(out)
        assert list(out.iterdir()) == []
        process.kill()
    assert f"(process {process.pid}, '" in str(error.value)
    assert "some  words', since 20" in str(error.value)
    with FolderLock(out):  # a killed holder holds nothing
        pass
    assert out.is_dir()  # it was there before


def test_a_folder_that_came_to_nothing_goes_again(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a" / "b").exists()
    with FolderLock(tmp_path / "c"):
        (tmp_path / "c" / "file").touch()
    assert (tmp_path / "c" / "file").exists()


def test_a_folder_replaced_while_it_is_being_locked_is_locked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    out, real, calls = tmp_path / "out", fcntl.flock, 0

    def flock(descriptor: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:  # the holder finishes between our look and our lock, and removes the folder
            out.rmdir()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with FolderLock(out):
        assert out.is_dir()
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match="another process"):
            FolderLock(out)
    assert calls == 2


def test_files_are_all_put_in_place_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plots").mkdir()
    write_files(tmp_path, {"a": b"old a", "plots/b": b"old b"})
    real, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left") as error:
        write_files(tmp_path, {"a": b"new a", "plots/b": b"new b", "c": b""})
    assert error.value.filename == str(tmp_path / "plots" / "b")
    monkeypatch.undo()
    files = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"a": b"old a", "plots/b": b"old b"}


def test_a_file_that_cannot_take_its_place_leaves_nothing_unfinished(tmp_path: Path) -> None:
    (tmp_path / "b" / "full").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write_files(tmp_path, {"a": b"new", "b": b"new", "c": b"new"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_an_error_that_names_a_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent") as error, naming(tmp_path):
        (tmp_path / "absent").read_bytes()
    assert error.value.filename == str(tmp_path / "absent")
