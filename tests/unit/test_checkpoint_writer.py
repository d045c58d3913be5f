"""Layout, transaction and lock of a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from moetool.checkpoint.folder import PARTIAL, FolderLock
from moetool.checkpoint.reader import CheckpointReader
from moetool.checkpoint.shard import TensorLayout, check_written, index_file, layout_shards
from moetool.checkpoint.writer import CheckpointWriter, clear, prepare
from moetool.errors import CheckpointError

TENSORS = [TensorLayout("a", "F32", (2, 3)), TensorLayout("b", "BF16", (5,)), TensorLayout("c", "F32", (4,))]


def fill(folder: Path, max_shard_size: int) -> dict[str, bytes]:
    shards = layout_shards(TENSORS, max_shard_size)
    writer = CheckpointWriter(folder, shards, {"recipe": {}})
    content = {t.name: bytes(range(t.size)) for t in TENSORS}
    for shard in shards:
        writer.open(shard)
    for name, data in reversed(content.items()):  # any order, in pieces
        half = len(data) // 2
        writer.write(name, half, memoryview(data)[half:])
        writer.write(name, 0, memoryview(data)[:half])
    for shard in shards:
        writer.close(shard, "digest")
    writer.finish({"config.json": b"{}"} | index_file(shards))
    return content


@pytest.mark.parametrize(("size", "files"), [(10**9, 1), (34, 2), (1, 3)])
def test_safetensors_reads_what_was_written(tmp_path: Path, size: int, files: int) -> None:
    content = fill(tmp_path, size)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == files
    loaded = {name: t for shard in shards for name, t in safetensors.torch.load_file(shard).items()}
    assert {n: t.dtype for n, t in loaded.items()} == {"a": torch.float32, "b": torch.bfloat16, "c": torch.float32}
    for name, tensor in loaded.items():
        assert tensor.view(torch.uint8).flatten().tolist() == list(content[name])
    assert not (tmp_path / PARTIAL).exists()
    assert CheckpointReader(tmp_path).shards == [s.name for s in shards]
    check_written(tmp_path, layout_shards(TENSORS, size))


def test_headers_keep_tensor_data_aligned() -> None:
    (shard,) = layout_shards(TENSORS, 10**9)
    assert len(shard.header) % 8 == 0
    assert shard.starts["a"] == len(shard.header)


def test_an_unfinished_folder_cannot_be_opened_and_keeps_its_complete_shards(tmp_path: Path) -> None:
    shards = layout_shards(TENSORS, 1)
    writer = CheckpointWriter(tmp_path, shards, {"recipe": {"seed": 1}})
    writer.open(shards[0])
    writer.open(shards[1])
    writer.close(shards[0], "abc")
    with pytest.raises(CheckpointError, match="unfinished"):
        CheckpointReader(tmp_path)
    again = CheckpointWriter(tmp_path, shards, {"recipe": {"seed": 1}})
    assert again.complete == {shards[0].name: "abc"}
    writer.abandon()
    assert sorted(p.name for p in tmp_path.iterdir()) == [shards[0].name, PARTIAL]


def test_another_recipe_is_refused_and_named(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path, [], {"recipe": {"seed": 1}})
    prepare(tmp_path, {"recipe": {"seed": 1}}, overwrite=False)
    with pytest.raises(CheckpointError, match="seed 1 -> 2"):
        prepare(tmp_path, {"recipe": {"seed": 2}}, overwrite=False)
    prepare(tmp_path, {"recipe": {"seed": 2}}, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_overwrite_deletes_nothing_where_anything_foreign_lies(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    (tmp_path / "thesis.txt").write_text("mine")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"thesis\.txt"):
        clear(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_second_writer_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    import os

    with FolderLock(tmp_path):
        CheckpointWriter(tmp_path, [], {})
        with pytest.raises(CheckpointError, match=f"process {os.getpid()}"), FolderLock(tmp_path):
            pass
    with FolderLock(tmp_path):  # free again
        assert json.loads((tmp_path / PARTIAL).read_text())["writer"]["process"] == os.getpid()


def test_a_run_killed_at_its_first_file_can_be_begun_again(tmp_path: Path) -> None:
    (tmp_path / (PARTIAL + ".unfinished")).write_bytes(b"{")
    prepare(tmp_path, {"recipe": {}}, overwrite=False)
    fill(tmp_path, 1)
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_shard_that_someone_deletes_meanwhile_leaves_no_checkpoint(tmp_path: Path) -> None:
    shards = layout_shards(TENSORS, 1)
    writer = CheckpointWriter(tmp_path, shards, {"recipe": {}})
    for shard in shards:
        writer.open(shard)
        writer.close(shard, "digest")
    (tmp_path / shards[1].name).unlink()
    with pytest.raises(CheckpointError, match="was deleted or changed by another program"):
        writer.finish({"config.json": b"{}"} | index_file(shards))
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(("old", "new"), [(b"[2,3]", b"[3,2]"), (b'"BF16"', b'"F16" ')])
def test_a_header_with_another_shape_or_dtype_of_the_same_size_is_found(tmp_path: Path, old: bytes, new: bytes) -> None:
    fill(tmp_path, 10**9)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(CheckpointError, match="does not hold the planned tensors"):
        check_written(tmp_path, layout_shards(TENSORS, 10**9))


def test_a_file_system_without_locks_is_written_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, "as NFS answers for a folder")

    monkeypatch.setattr(fcntl, "flock", flock)
    with FolderLock(tmp_path / "new"):
        fill(tmp_path / "new", 1)
