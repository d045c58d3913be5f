"""Training tokens of well-known dense models whose cards give them."""

from __future__ import annotations

from pathlib import Path

# Name on the hub -> (tokens, words of its card).
_QWEN3 = (36e12, "pre-trained on 36 trillion tokens")
_LLAMA31 = (15e12, "token count 15T+")
_LLAMA32 = (9e12, "token count up to 9T")
CARDS: dict[str, tuple[float, str]] = {
    "meta-llama/Llama-3.1-8B": _LLAMA31,
    "meta-llama/Llama-3.1-70B": _LLAMA31,
    "meta-llama/Llama-3.1-405B": _LLAMA31,
    "meta-llama/Llama-3.2-1B": _LLAMA32,
    "meta-llama/Llama-3.2-3B": _LLAMA32,
    "Qwen/Qwen3-0.6B-Base": _QWEN3,
    "Qwen/Qwen3-1.7B-Base": _QWEN3,
    "Qwen/Qwen3-4B-Base": _QWEN3,
    "Qwen/Qwen3-8B-Base": _QWEN3,
    "HuggingFaceTB/SmolLM2-135M": (2e12, "pretraining tokens 2T"),
    "HuggingFaceTB/SmolLM2-1.7B": (11e12, "trained on 11 trillion tokens"),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1195k-token-2.5T": (2.5e12, "2.5T in the name of the checkpoint"),
    "allenai/OLMo-2-1124-7B": (4e12, "training tokens 4 trillion"),
    "allenai/OLMo-2-1124-13B": (5e12, "training tokens 5 trillion"),
    "allenai/OLMo-2-0325-32B": (6e12, "training tokens 6 trillion"),
    "ibm-granite/granite-7b-base": (2e12, "trained on 2T tokens"),
}


def known_tokens(model: str) -> tuple[int, str] | None:
    """Tokens that a model was trained on, and where that is said; None if it is not known.

    Args:
        model: `owner/name[@revision]`, or a folder of the same name.
    """
    name = model.partition("@")[0]
    for card, (tokens, words) in CARDS.items():
        if name == card:
            return int(tokens), f"the card of {card}: {words}"
        if Path(name).name == card.partition("/")[2]:
            return int(tokens), f"the card of {card}, by the folder's name: {words}"
    return None
