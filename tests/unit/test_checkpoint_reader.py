"""The reader refuses every damaged or hostile folder, in one line that says what and where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moetool.checkpoint.header import read_header
from moetool.checkpoint.hub import resolve_model
from moetool.checkpoint.reader import CheckpointReader
from moetool.errors import CheckpointError


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_header_gives_absolute_offsets(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"x": entry(0, 8, [2]), "y": entry(8, 12, [1])}, b"12345678abcd")
    tensors, header = read_header(path)
    assert tensors["y"].start == header + 8
    assert path.read_bytes()[tensors["y"].start :][: tensors["y"].size] == b"abcd"


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        pytest.param({"x": entry(0, 8, [2])}, b"1234", None, id="truncated"),
        pytest.param({"x": entry(0, 8, [2])}, b"123456789", None, id="trailing bytes"),
        pytest.param({"x": entry(0, 8, [2]), "y": entry(4, 12, [2])}, b"x" * 12, None, id="overlap"),
        pytest.param({"x": entry(0, 4, [1]), "y": entry(8, 12, [1])}, b"x" * 12, None, id="hole"),
        pytest.param({"x": entry(0, 8, [3])}, b"12345678", None, id="shape and bytes disagree"),
        pytest.param({"x": entry(8, 0, [2])}, b"12345678", None, id="backwards"),
        pytest.param({"x": entry(0, 8, [-2])}, b"12345678", None, id="negative shape"),
        pytest.param({"x": entry(0, 8, [True, 2])}, b"12345678", None, id="boolean shape"),
        pytest.param({"x": entry(0, 2**70, [2**68])}, b"", None, id="overflow"),
        pytest.param({"x": [1, 2]}, b"", None, id="entry is a list"),
        pytest.param([], b"", None, id="header is a list"),
        pytest.param(b"{", b"", None, id="not JSON"),
        pytest.param(b"[" * 50_000, b"", None, id="deep nesting"),
        pytest.param(b'{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"x":1}', b"", None, id="a name twice"),
        pytest.param({}, b"", 2**63, id="absurd length"),
        pytest.param({"x": entry(0, 4, [4], "F8_E4M3")}, b"1234", None, id="quantised"),
    ],
)
def test_a_bad_header_is_refused(tmp_path: Path, header: Any, data: bytes, length: int | None) -> None:
    path = write(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        read_header(path)


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def test_what_a_folder_lacks_is_named(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors"):
        CheckpointReader(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="pickled"):
        CheckpointReader(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not an object"):
        CheckpointReader(folder)


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", "sub/x.safetensors", "config.json", 7])
def test_an_index_cannot_name_a_file_elsewhere(llama: Path, tmp_path: Path, file: object) -> None:
    folder = copy(llama, tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(CheckpointError, match="not a valid shard name"):
        CheckpointReader(folder)


def test_an_index_that_names_an_absent_file_or_tensor(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"gone\.safetensors, which is missing"):
        CheckpointReader(folder)
    index.write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))
    with pytest.raises(CheckpointError, match="which lacks it"):
        CheckpointReader(folder)


def test_a_file_cut_after_opening_is_an_error_not_a_hang(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m")
    with CheckpointReader(folder) as reader:
        info = list(reader.tensors.values())[-1]
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(info.start + 4)
        with pytest.raises(CheckpointError, match="ends before"):
            reader.read_into(info, 0, memoryview(bytearray(info.size)))


def test_an_adapter_and_a_git_lfs_pointer_are_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an adapter"):
        CheckpointReader(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match="git-lfs pointer"):
        CheckpointReader(tmp_path)


def test_an_unfinished_download_is_named(llama: Path, tmp_path: Path) -> None:
    """In the hub's cache the half that was fetched is a blob, in a folder of one's own it lies under .cache."""
    cached = tmp_path / "models--org--name" / "snapshots" / "0123"
    own = tmp_path / "own"
    for folder, place in (
        (cached, tmp_path / "models--org--name" / "blobs"),
        (own, own / ".cache/huggingface/download"),
    ):
        shutil.copytree(llama, folder)
        place.mkdir(parents=True)
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="holds neither"):
            CheckpointReader(folder)
        (place / "abc.incomplete").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"because its download is unfinished .*incomplete\); fetch it again"):
            CheckpointReader(folder)
    with pytest.raises(CheckpointError, match=r"give its name, org/name, or one of its snapshots: .*/0123"):
        resolve_model(str(tmp_path / "models--org--name"))
