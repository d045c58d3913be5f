"""Stock transformers models and tokenizers, loaded so that nothing goes missing in silence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetool.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pick_device(device: str = "auto") -> str:
    """The device of a name; `auto` is the first of cuda, mps and cpu that is there.

    Raises:
        ConfigError: there is no such device.
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
    folder: Path, dtype: str = "auto", device: str | None = None, device_map: str | None = None
) -> PreTrainedModel:
    """Load a causal language model and refuse it unless every tensor was found and used.

    transformers fills a missing tensor with random numbers and only logs it: a checkpoint without a
    layer's experts or router would load.

    Args:
        folder: a Hugging Face checkpoint.
        dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        device: where to put it, such as `cpu` or `cuda`; None leaves it on the CPU.
        device_map: transformers' own placement, such as `auto`; excludes `device`.

    Raises:
        CheckpointError: it cannot be loaded, or tensors are missing, left over or of another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # moetool's own bars say what goes on
    torch_dtype: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    options: dict[str, Any] = {"device_map": device_map} if device_map else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch_dtype,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    except Exception as error:  # a damaged or foreign checkpoint fails in a dozen ways
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {reason}") from None
    wrong = {kind: sorted(str(key) for key in info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
    for kind, keys in wrong.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(
                f"{folder}: {kind} tensors {', '.join(keys[:3])}{more}; the checkpoint does not fit its config.json"
            )
    # torch's grouped matrix product, the faster one, fails unless rows are multiples of 16 bytes, which
    # 8 elements are in every dtype (training may compute in another than the weights').
    experts = [p.shape for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3]
    if any(size % 8 for shape in experts for size in shape[1:]):
        model.set_experts_implementation("eager")
    return model.to(device) if device else model


def skeleton(folder: Path) -> Any:
    """The model of a checkpoint without its weights (on torch's meta device): seconds at any size.

    Raises:
        CheckpointError: transformers knows no causal language model for its config.json.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a damaged or foreign config fails in a dozen ways
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {reason}") from None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a checkpoint.

    Raises:
        DataError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise DataError(f"{folder} holds no tokenizer (tokenizer.json); copy it from the model that this one came from")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{folder}: the tokenizer cannot be loaded: {reason}") from None
