"""Where a model is: a folder, or `owner/name[@revision]` on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from moetool.errors import CheckpointError

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$")


def resolve_model(model: str, weights: bool = True) -> Path:
    """Return the folder of a model, fetching it from the hub when it is not a local one.

    Args:
        model: a folder, or `owner/name[@revision]`.
        weights: whether to fetch the weights, too, or only configuration and tokenizer.

    Raises:
        CheckpointError: nothing is there; says whether the hub was tried and what it answered.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model} is a file; give the folder that holds config.json and the safetensors shards")
    if not _HUB_NAME.match(model):
        raise CheckpointError(f"no folder {model}; give a folder that holds config.json and the safetensors shards")
    name, _, revision = model.partition("@")
    return Path(_download(name, revision or None, model, weights))


def find_model(model: str) -> Path | None:
    """The folder of a model that is on this machine, here or in the hub's cache; nothing is fetched."""
    path = Path(os.path.expanduser(model))
    try:
        if path.exists() or not _HUB_NAME.match(model):
            return path if path.is_dir() else None
    except OSError:  # a name that no file system takes
        return None
    from huggingface_hub import snapshot_download

    name, _, revision = model.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except Exception:  # not in the cache
        return None


def _download(name: str, revision: str | None, model: str, weights: bool) -> str:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model", "*.txt", "*.jinja"] + ["*.safetensors"] * weights
    try:
        return snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as error:  # the hub client's errors have no common base: network, HTTP, cache
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"no folder {model} here, and the hub did not give it ({type(error).__name__}: {first[:160]});"
            " check the spelling, or the network and `hf auth login`"
        ) from None
