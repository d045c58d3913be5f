"""Locate a model: a folder, or `owner/name[@revision]` on the hub."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
import shutil
import sys
from pathlib import Path

from moetool.checkpoint.reader import named_shards
from moetool.errors import CheckpointError

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$")

# Files of a hub model besides the weights: configuration, tokenizer and licence, at the top of the repository.
CONFIGURATION = ["*.json", "*.model", "tokenizer.model.*", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*"]
SUBFOLDERS = ["*/*"]


def resolve_model(model: str, weights: bool = True, unpickle: bool = False) -> Path:
    """Return the folder of a model, fetching it from the hub if it is not local.

    Args:
        model: a folder, or `owner/name[@revision]`.
        weights: whether to fetch the weights too, or only configuration and tokenizer.
        unpickle: whether pickled weights may be fetched if there are no safetensors.

    Raises:
        CheckpointError: nothing is there; says whether the hub was tried, and its answer.
    """
    path = Path(os.path.expanduser(model))  # no error for a home that does not exist
    if path.is_dir():
        _check_cache(path, model)
        return path
    if path.exists():
        raise CheckpointError(f"{model} is a file; give the folder that holds config.json and the safetensors shards")
    if not _HUB_NAME.match(model):
        raise CheckpointError(
            f"no folder {model}{_near(path)}; give a folder that holds config.json and the safetensors shards"
        )
    name, _, revision = model.partition("@")
    return Path(_download(name, revision or None, model, weights, unpickle=unpickle))


def find_model(model: str) -> Path | None:
    """The folder of a model on this machine, local or in the hub's cache; nothing is fetched."""
    path = Path(os.path.expanduser(model))
    try:
        if path.exists() or not _HUB_NAME.match(model):
            return path if path.is_dir() else None
    except OSError:  # not a valid file name
        return None
    name, _, revision = model.partition("@")
    try:
        return Path(_download(name, revision or None, model, weights=True, cached=True))
    except CheckpointError:
        return None


def fetch_headers(model: str, into: Path) -> Path:
    """The folder of a model, without the weights if it is on the hub: enough for a plan.

    For a hub model, a folder is created in `into` with its configuration and tokenizer, and shards
    that have the remote headers; their data is a hole that takes no disk space.

    Raises:
        CheckpointError: nothing is there, or it holds no safetensors.
    """
    if Path(os.path.expanduser(model)).exists() or not _HUB_NAME.match(model):
        return resolve_model(model)
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    folder = into / "headers"
    while folder.exists():
        folder = folder.with_name(folder.name + "_")
    shutil.copytree(resolve_model(model, weights=False), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    name, _, revision = model.partition("@")
    try:
        metadata = get_safetensors_metadata(name, revision=revision or None)
    except NotASafetensorsRepoError:
        raise CheckpointError(
            f"{model} holds no safetensors on the hub; convert it first: moetool convert {model} OUT --unpickle"
        ) from None
    except Exception as error:
        cached = find_model(model)  # works without a network on files fetched before
        if cached is not None:
            return cached
        raise _no_answer(model, error) from None
    for file, header in metadata.files_metadata.items():
        if file != Path(file).name or not file.endswith(".safetensors"):
            raise CheckpointError(f"{model}: its index names {file[:100]!r}, which is not a valid shard name")
        entries = {
            name: {"dtype": str(info.dtype), "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            for name, info in header.tensors.items()
        }
        raw = json.dumps(entries).encode()
        with (folder / file).open("wb") as shard:
            shard.write(len(raw).to_bytes(8, "little") + raw)
            shard.truncate(8 + len(raw) + max((info.data_offsets[1] for info in header.tensors.values()), default=0))
    return folder


def _check_cache(path: Path, model: str) -> None:
    """Refuse the hub's cache folder of a model, which holds its snapshots."""
    _, _, name = path.name.partition("models--")
    if name and (path / "snapshots").is_dir() and not (path / "config.json").exists():
        hub_name = name.replace("--", "/", 1)
        snapshots = sorted(entry.name for entry in (path / "snapshots").iterdir())
        either = f"or one of its snapshots: {path / 'snapshots' / snapshots[-1]}" if snapshots else "to fetch it again"
        raise CheckpointError(f"{model} is the hub's cache of a model; give its name, {hub_name}, {either}")


def _near(path: Path) -> str:
    """A clause that suggests a folder with a name similar to `path`, if there is one."""
    try:
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""


def _no_answer(model: str, error: Exception) -> CheckpointError:
    """One line for an error of the hub's client, with the fix: a network, name or licence problem."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, _, revision = model.partition("@")
    if isinstance(error, GatedRepoError):
        why = f"({name} is gated); accept its licence on its page, then run `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        why = "(the model does not exist, or is private); check the spelling, or run `hf auth login`"
    elif isinstance(error, (LocalEntryNotFoundError, ConnectionError)):
        fetch = f"hf download {name}{f' --revision {revision}' if revision else ''}"
        why = (
            f"({_first_line(error.__cause__ or error)}); check the spelling and the network; without a network, run"
            f" `{fetch}` on a machine that has one, then give the folder that it prints"
        )
    else:
        why = f"({_first_line(error)}); check the spelling and the network, or run `hf auth login`"
    return CheckpointError(f"no folder {model} here{_near(Path(name))}, and the hub did not provide it {why}")


def _first_line(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}" if first else type(error).__name__


def _download(
    name: str, revision: str | None, model: str, weights: bool, cached: bool = False, unpickle: bool = False
) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():  # the hub client also draws its bars into files and pipes
        disable_progress_bars()
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=CONFIGURATION,
            ignore_patterns=SUBFOLDERS,
            local_files_only=cached,
        )
        if not weights:
            return folder
        # Only files that transformers reads: repositories also hold other formats of the same weights. Fetch by the
        # commit, which is the folder's name, so that weights and index have one revision.
        shards = [glob.escape(shard) for shard in named_shards(Path(folder), unpickle)]
        return snapshot_download(name, revision=Path(folder).name, allow_patterns=shards, local_files_only=cached)
    except CheckpointError:
        raise
    except Exception as error:  # the hub client's errors have no common base class: network, HTTP, cache
        raise _no_answer(model, error) from None
