"""The cache of calibrations: a file for each model, text and way to run it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from moetool import __version__
from moetool.calibration.sums import Calibration
from moetool.checkpoint.folder import cache_root, write_file
from moetool.checkpoint.reader import content_fingerprint
from moetool.surgery.rows import raw_bytes

FORMAT = 3  # of the files; raise it when what they hold changes


def cache_folder() -> Path:
    """Where calibrations are kept."""
    return cache_root() / "calibration"


def cached(
    folder: Path, texts: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any], make: Callable[[], Calibration]
) -> Calibration:
    """The calibration of a model from the cache, or a new one, which is then cached.

    Args:
        folder: the checkpoint.
        texts: name -> the manifest of its tokens.
        settings: everything else that the result depends on.
        make: computes a new one.
    """
    parts = [
        FORMAT,
        __version__,
        content_fingerprint(folder),
        {name: one["sha256"] for name, one in texts.items()},
        settings,
    ]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / f"{digest}.safetensors"
    with suppress(OSError, SafetensorError, KeyError, ValueError, TypeError):  # absent, or damaged and made again
        # Copied, because the last bits of a product depend on where in memory a tensor begins, and a file's map begins
        # tensors anywhere: what is chosen would depend on whether the calibration is new.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        with safe_open(path, "pt") as file:
            sound = (file.metadata() or {}).get("xxh3") == _checksum(tensors)
        if sound:
            return Calibration.from_tensors(tensors)
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in made.to_tensors().items()}
    about = {"provenance": json.dumps(parts, sort_keys=True), "xxh3": _checksum(tensors)}
    write_file(path, save(tensors, about))
    return made


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(raw_bytes(tensors[name].reshape(-1)))
    return digest.hexdigest()
