"""Load standard transformers models and tokenizers, with an error for anything missing."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetool.checkpoint.reader import CheckpointReader, check_entries
from moetool.errors import CheckpointError, ConfigError, DataError, MoetoolError, in_one_line, out_of_memory
from moetool.outside import parse_json, read_bytes, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.distributed import DistributedConfig


MAX_TOKENIZER = 500_000_000  # bytes of tokenizer.json


def pick_device(device: str = "auto") -> str:
    """The device of a name; `auto` is the first available of cuda, mps and cpu.

    Raises:
        ConfigError: the device does not exist.
    """
    import torch

    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = next(iter(str(error).splitlines()), "").strip()
            raise ConfigError(f"no device '{device}' here: {reason[:200]}; leave it at auto, or use cpu") from None
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def load_model(
    folder: Path,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    distributed: DistributedConfig | None = None,
) -> PreTrainedModel:
    """Load a causal language model and refuse it unless every tensor was found and used.

    transformers fills a missing tensor with random numbers and only logs it, so a checkpoint without a
    layer's experts or router would load.

    Args:
        folder: a Hugging Face checkpoint.
        dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        device: such as `cpu` or `cuda`; None leaves the model on the CPU.
        device_map: transformers' own placement, such as `auto`; excludes `device`.
        distributed: the mesh into whose shards it is read, on each process's own device; excludes both. No process
            ever holds more than its shards and one tensor.

    Raises:
        CheckpointError: it cannot be loaded, or tensors are missing, left over or of another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    _quiet()
    torch_dtype: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    options: dict[str, Any] = {"device_map": device_map} if device_map else {}
    options |= {"distributed_config": distributed} if distributed else {}
    check_size(folder, skeleton(folder))
    with loading(folder), one_tensor_at_a_time() if distributed else nullcontext():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch_dtype,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,  # otherwise pickles in a folder without safetensors would be read
            **options,
        )
    check_complete(folder, info)
    if distributed:
        model.config.distributed_config = None  # by which save_pretrained would gather, in all processes
    fit_experts(model)
    return model.to(device) if device else model


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Turn transformers' failure to read a checkpoint into an error that names the folder.

    Raises:
        CheckpointError: it failed, other than for lack of memory.
    """
    try:
        yield
    except Exception as error:  # a damaged or foreign checkpoint fails in many ways
        if out_of_memory(error) or isinstance(error, MoetoolError):
            raise
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {in_one_line(error, 300)}") from None


def check_complete(folder: Path, info: Mapping[str, Collection[Any]]) -> None:
    """Refuse a model unless every tensor was found and used.

    Args:
        folder: of the checkpoint.
        info: transformers' `missing_keys`, `unexpected_keys` and `mismatched_keys`.

    Raises:
        CheckpointError: names the tensors.
    """
    wrong = {kind: sorted(str(key) for key in info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
    for kind, keys in wrong.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(
                f"{folder}: {kind} tensors {', '.join(keys[:3])}{more}; the checkpoint does not match its config.json"
            )


def fit_experts(model: Any) -> None:
    """Choose how a model computes its experts.

    torch's grouped matrix product, the faster one, fails unless rows are multiples of 16 bytes. 8 elements are enough
    in every dtype (training may compute in another dtype than the weights').
    """
    experts = [_here(p).shape for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3]
    if any(size % 8 for shape in experts for size in shape[1:]):
        model.set_experts_implementation("eager")


@contextmanager
def one_tensor_at_a_time() -> Iterator[None]:
    """Keep transformers from reading all tensors of a process ahead in threads, which takes as much memory again."""
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before


def _here(parameter: Any) -> Any:
    """What this process holds of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _quiet() -> None:
    """Turn off the progress bars of libraries, and warnings that print names of a checkpoint unescaped."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity(logging.CRITICAL)


def skeleton(folder: Path, dtype: Any = None) -> Any:
    """A checkpoint's model without its weights (on torch's meta device), in seconds at any size.

    Args:
        folder: a Hugging Face checkpoint.
        dtype: of torch; None is that of config.json.

    Raises:
        CheckpointError: transformers knows no causal language model for its config.json.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _quiet()
    check_config(folder)
    num_tensors = len(CheckpointReader(folder).tensors)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if layers > num_tensors:  # each would be built before it turns out that it has no weights
            raise ValueError(f"{layers} layers, but only {num_tensors} tensors in its files")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype, trust_remote_code=False)
    except Exception as error:  # a damaged or foreign config fails in many ways
        reason = in_one_line(error, 300)
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {reason}") from None


def without_weights(config: Mapping[str, Any], num_tensors: int) -> list[Any]:
    """The model of a config.json on torch's meta device; none where transformers does not know or cannot build it.

    Args:
        config: that `check_config` has seen. Where it names no class, the causal language model and the model without
            a head are both built.
        num_tensors: in its files; layers that have none are not built.
    """
    import torch
    import transformers
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, PreTrainedModel

    if config.get("model_type") not in CONFIG_MAPPING:
        return []
    _quiet()
    named = next(iter(config.get("architectures") or ()), None)
    kind = getattr(transformers, named, None) if isinstance(named, str) and named.isidentifier() else None
    known: Any = kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None
    builds: list[Any] = []
    if known:
        builds = [known._from_config]
    elif named is None:
        builds = [partial(auto.from_config, trust_remote_code=False) for auto in (AutoModelForCausalLM, AutoModel)]
    built = []
    for build in builds:
        with suppress(Exception), torch.device("meta"):  # a damaged or foreign config fails in many ways
            settings = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
            if getattr(settings.get_text_config(), "num_hidden_layers", 0) <= num_tensors:
                built.append(build(settings))
    return built


# Keys of config.json whose numbers size lists or modules of transformers, and a bound far above any model's.
_COUNTED = re.compile(r"(layers?|experts?|heads?|labels|blocks?|groups?|stages)$")
MAX_COUNT = 100_000
_KERNEL = re.compile(r"(attn|experts)_implementation(_internal)?$")


def check_config(folder: Path) -> None:
    """Refuse a config.json that would make transformers run foreign code or use unbounded memory.

    Raises:
        CheckpointError: names the key.
    """
    check_entries(folder)
    path = folder / "config.json"
    if not path.is_file():  # a folder with only a tokenizer
        return
    level: list[Any] = [read_json(path)]
    while level:
        documents = [one for one in level if isinstance(one, dict)]
        for key, value in (item for one in documents for item in one.items()):
            if type(value) is int and abs(value) > (MAX_COUNT if _COUNTED.search(key) else 2**62):
                raise CheckpointError(f"{path}: {key} is {str(value)[:60]}, more than any model has")
            # A hub name here is a kernel, which would be fetched and imported.
            if _KERNEL.search(key) and not re.fullmatch(r"[\w|]*", "|".join(map(str, _values(value)))):
                raise CheckpointError(f"{path}: {key} is {str(value)[:100]!r}, code from elsewhere; delete the key")
        level = [inner for one in level for inner in _values(one) if isinstance(inner, (dict, list))]


def _values(document: Any) -> list[Any]:
    if isinstance(document, dict):
        return list(document.values())
    return document if isinstance(document, list) else [document]


def check_size(folder: Path, model: Any) -> None:
    """Refuse weights that config.json announces but the files lack: transformers would initialise them at random."""
    if getattr(model.config, "quantization_config", None) is not None:
        return  # several parameters per element
    announced = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    there = sum(info.num_elements for info in CheckpointReader(folder).tensors.values())
    if announced > 4 * there + 10**7:  # if fewer are missing, a later error names them
        raise CheckpointError(
            f"{folder}: config.json describes {announced} parameters, but the files hold {there}; fetch both again"
        )


def free_models() -> None:
    """Give back the memory of models that nothing refers to any more; torch would keep that of a GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """Silence the tokenizers library, which prints unknown option names directly to standard output."""
    try:
        kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no standard output
        yield
        return
    sys.stdout.flush()
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a checkpoint's folder.

    Raises:
        DataError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise DataError(f"{folder} holds no tokenizer (tokenizer.json); copy it from the original model")
    _quiet()
    check_config(folder)
    try:
        with _nothing_printed():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = in_one_line(error, 300)
        raise DataError(f"{folder}: the tokenizer cannot be loaded: {reason}") from None


def tokenizer_sha256(folder: Path) -> str:
    """A digest of the parts of tokenizer.json that determine the ids of a text.

    Tokens added around a text, padding, truncation and the file's formatting are excluded, so a
    tokenizer that was loaded and saved again is still the same.

    Raises:
        DataError: there is no tokenizer.json, or it is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{folder} holds no tokenizer.json; save the tokenizer there with save_pretrained")
    try:
        tokenizer = parse_json(read_bytes(path, MAX_TOKENIZER, DataError), str(path), DataError)
        parts = {name: tokenizer.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    except (DataError, AttributeError):
        raise DataError(f"{folder}/tokenizer.json is damaged; copy it again from the original model") from None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
