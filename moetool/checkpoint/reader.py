"""Read a Hugging Face safetensors folder: its config, its headers, and blocks of its tensors' bytes.

Opening reads only headers. Bytes are read with `pread` (no memory map), from any thread.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Self

from moetool.checkpoint.folder import PARTIAL, unfinished
from moetool.checkpoint.header import TensorInfo, read_header
from moetool.errors import CheckpointError
from moetool.outside import read_json

MAX_OPEN = 200  # files kept open at once; systems allow as few as 256
SAMPLE = 4096  # bytes of each tensor in a content fingerprint
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
ADAPTER_CONFIG, ADAPTER, PICKLED_ADAPTER = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


class BlockFile:
    """Reads tensor bytes from a folder's shards, from any thread; close it, or use `with`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read_into(self, info: TensorInfo, offset: int, buffer: memoryview) -> None:
        """Fill a byte buffer from a tensor's bytes at `offset`.

        Raises:
            CheckpointError: the file has become shorter than its header says.
        """
        descriptor = self._files.get(info.shard)
        if descriptor is None:
            opened = os.open(self.folder / info.shard, os.O_RDONLY)
            if len(self._files) >= MAX_OPEN:
                try:
                    self._read(opened, info, offset, buffer)
                finally:
                    os.close(opened)
                return
            # Two threads may race to open a shard; the loser's descriptor is closed.
            descriptor = self._files.setdefault(info.shard, opened)
            if descriptor != opened:
                os.close(opened)
        self._read(descriptor, info, offset, buffer)

    def same(self, a: TensorInfo, b: TensorInfo) -> bool:
        """Whether two tensors are equal, byte for byte."""
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        step = 1 << 20
        for offset in range(0, a.size, step):
            blocks = [bytearray(min(step, a.size - offset)) for _ in (a, b)]
            for info, block in zip((a, b), blocks, strict=True):
                self.read_into(info, offset, memoryview(block))
            if blocks[0] != blocks[1]:
                return False
        return True

    def _read(self, descriptor: int, info: TensorInfo, offset: int, buffer: memoryview) -> None:
        position = info.start + offset
        while buffer:
            count = os.preadv(descriptor, [buffer], position)
            if count == 0:
                raise CheckpointError(f"{self.folder / info.shard} ends before tensor {info.name} does; fetch it again")
            position += count
            buffer = buffer[count:]


def check_entries(folder: Path) -> None:
    """Refuse a folder that contains a pipe or a device: a library would wait or read forever.

    Raises:
        CheckpointError: names it.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not (path.is_file() or path.is_dir() or not os.path.exists(path)):
            raise CheckpointError(f"{path} is a pipe or a device, not a file; remove it from the checkpoint")


def _weight_map(folder: Path, index: str = INDEX) -> dict[str, str] | None:
    """An index as tensor -> shard; None if there is none."""
    if not (folder / index).exists():
        return None
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / index} has no weight_map; fetch it again")
    ending = ".bin" if index == PICKLED_INDEX else ".safetensors"
    for file in weight_map.values():
        if not isinstance(file, str) or file != Path(file).name or not file.endswith(ending):
            raise CheckpointError(f"{folder / index} names {str(file)[:100]!r}, which is not a valid shard name")
    return weight_map


def named_shards(folder: Path, unpickle: bool = False) -> list[str]:
    """The names of the shards that a folder has or should have.

    Args:
        folder: config.json, or adapter_config.json, and the index are there.
        unpickle: whether pickled weights may replace missing safetensors.

    Raises:
        CheckpointError: the index is not an index of weights.
    """
    if (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists():
        return [ADAPTER, *[PICKLED_ADAPTER] * unpickle]
    maps = _weight_map(folder) or (_weight_map(folder, PICKLED_INDEX) if unpickle else None)
    return sorted(set(maps.values())) if maps else [SINGLE, *[PICKLED] * unpickle]


def _unfinished_download(folder: Path) -> str:
    """A clause about a half-fetched file of the hub's client, in its cache or in a download folder."""
    places = (folder.parent.parent / "blobs", folder / ".cache" / "huggingface" / "download")
    found = [file for place in places for file in sorted(place.glob("*.incomplete"))]
    return f", because its download is unfinished ({found[0]})" if found else ""


class CheckpointReader(BlockFile):
    """A checkpoint folder with checked headers.

    Attributes:
        folder: the folder.
        config: the content of config.json.
        tensors: every tensor by name, in file order.
        shards: the file names, in order.

    Args:
        folder: the folder.
        unpickle: whether pickled weights are read where there are no safetensors.

    Raises:
        CheckpointError: no config, no safetensors, an index that names absent files or tensors, a
            damaged header, or pickled weights without `unpickle`.
    """

    names = ("config.json", SINGLE, PICKLED)

    def __init__(self, folder: Path, unpickle: bool = False) -> None:
        super().__init__(folder)
        check_entries(folder)
        if (folder / PARTIAL).exists():
            raise CheckpointError(unfinished(folder))
        config, self._single, self._pickled = self.names
        if (folder / ADAPTER_CONFIG).exists() and not (folder / config).exists():
            raise CheckpointError(
                f"{folder} is an adapter (LoRA), not a model; merge it into its base model first:"
                f" moetool convert BASE OUT --adapter {folder}"
            )
        self.config = read_json(folder / config)
        self.shards = self._find_shards(unpickle)
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self.shards:
            tensors = read_header(folder / shard)[0] if shard.endswith(".safetensors") else _unpickled(folder / shard)
            for name, info in tensors.items():
                if name in self.tensors:
                    raise CheckpointError(f"{folder}: tensor {name} is in {self.tensors[name].shard} and in {shard}")
                self.tensors[name] = info
        self._check_index()

    def _find_shards(self, unpickle: bool) -> list[str]:
        self._index, self._weight_map = INDEX, _weight_map(self.folder)
        if not self._weight_map and unpickle and not (self.folder / self._single).is_file():
            self._index, self._weight_map = PICKLED_INDEX, _weight_map(self.folder, PICKLED_INDEX)
        if self._weight_map:
            shards = sorted(set(self._weight_map.values()))
            for file in shards:
                if not (self.folder / file).is_file():
                    what = f"{self.folder / self._index} names {file}, which is missing"
                    raise CheckpointError(f"{what}{_unfinished_download(self.folder)}; fetch it again")
            return shards
        for name in (self._single, *[self._pickled] * unpickle):
            if (self.folder / name).is_file():
                return [name]
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pth")):
            only = f" (but only files named like {self._pickled}, which is missing)" if unpickle else ""
            raise CheckpointError(
                f"{self.folder} holds pickled weights (.bin), which can run code when loaded; moetool convert"
                f" --unpickle reads them with torch's restricted unpickler{only}"
            )
        unfinished = _unfinished_download(self.folder)
        again = "; fetch it again" if unfinished else ""
        raise CheckpointError(f"{self.folder} holds neither {self._single} nor {INDEX}{unfinished}{again}")

    def _check_index(self) -> None:
        for name, file in (self._weight_map or {}).items():
            if name not in self.tensors or self.tensors[name].shard != file:
                index = self.folder / self._index
                raise CheckpointError(f"{index} places tensor {name[:100]} in {file}, which lacks it; fetch both again")

    @property
    def pickled(self) -> bool:
        """Whether weights are read from pickled files."""
        return any(not shard.endswith(".safetensors") for shard in self.shards)

    def fingerprint(self) -> str:
        """A quick identity of the source: config, headers, sizes and times; it changes if a file does."""
        digest = hashlib.sha256((self.folder / self.names[0]).read_bytes())
        for shard in self.shards:
            status = (self.folder / shard).stat()
            digest.update(f"{shard} {status.st_size} {status.st_mtime_ns}".encode())
        for info in self.tensors.values():
            digest.update(f"{info.name} {info.dtype} {info.shape} {info.shard} {info.start}".encode())
        return digest.hexdigest()


class AdapterReader(CheckpointReader):
    """A folder saved by peft; `config` is adapter_config.json."""

    names = (ADAPTER_CONFIG, ADAPTER, PICKLED_ADAPTER)

    def __init__(self, folder: Path, unpickle: bool = False) -> None:
        if not (folder / ADAPTER_CONFIG).is_file():
            raise CheckpointError(
                f"{folder} holds no {ADAPTER_CONFIG}, so it is not an adapter; give a folder that peft has saved"
            )
        super().__init__(folder, unpickle)


def _unpickled(path: Path) -> dict[str, TensorInfo]:
    from moetool.checkpoint.pickled import read_pickle  # loads torch

    return read_pickle(path)


def content_fingerprint(folder: Path) -> str:
    """A digest of a checkpoint's content: config, headers and the first bytes of every tensor.

    It is unchanged by a copy to another folder and differs for another seed. Reading everything would take minutes.

    Raises:
        CheckpointError: it is not a readable safetensors checkpoint.
    """
    with CheckpointReader(folder) as reader:
        digest = hashlib.sha256(json.dumps(reader.config, sort_keys=True).encode())
        for name, info in sorted(reader.tensors.items()):
            sample = bytearray(min(SAMPLE, info.size))
            reader.read_into(info, 0, memoryview(sample))
            digest.update(f"{name} {info.dtype} {info.shape}".encode() + sample)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, as in `sha256sum` and on the hub."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
