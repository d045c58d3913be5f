"""What is tried: every pair of a dense family and a target, with each trait that the pair can have."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from moetool import registry
from moetool.arch.dense_families import DENSE
from moetool.arch.spec import ArchSpec

WINDOW, LENGTH, POSITIONS = 16, 48, 256  # tokens: of a narrow window, of the text, at most
VOCABULARY = 512
LAYERS = 3

# Sizes that every engine's kernels take.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": POSITIONS,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
SOME = ["sliding_attention"] * (LAYERS - 1) + ["full_attention"]
# What tests/tiny.py switches on is off, so that each trait shows alone.
PLAIN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "granite": {"attention_bias": False},
    "cohere2": {"sliding_window": POSITIONS, "layer_types": SOME, "tie_word_embeddings": True},
    "cohere": {"tie_word_embeddings": True},
    "cwm": {"bos_token_id": 0},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv"],
        "block_auto_adjust_ff_dim": False,
        "tie_word_embeddings": True,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite_swa": {"sliding_window": POSITIONS, "layer_types": SOME, "layer_rope_theta": [10000.0] * LAYERS},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 256,
        "mamba_d_head": 32,
        "mamba_d_state": 32,
    },
}
ROPE = {
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
}  # fmt: skip
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW}
# What sets some layers apart from others.
WINDOWS: dict[str, dict[str, dict[str, Any]]] = {
    "mistral": {
        "a window in all layers": {"sliding_window": WINDOW},
        "a window as long as all positions": {"sliding_window": POSITIONS},
    },
    "granitemoehybrid": {
        "attention in all layers": {"layer_types": ["attention"] * LAYERS, "position_embedding_type": "rope"},
    },
    "granite_swa": {
        "a window in some layers": {"sliding_window": WINDOW},
        "no layer with a window": {"layer_types": ["full_attention"] * LAYERS},
        "layers without positions": {"layer_rope_theta": [0, 10000.0, 0]},
    },
    "cohere2": {
        "a window in some layers": {"sliding_window": WINDOW},
        "no layer with a window": {"layer_types": ["full_attention"] * LAYERS},
    },
    **{
        family: {
            "a window in all layers": QWEN_WINDOWS | {"max_window_layers": 0},
            "a window in some layers": QWEN_WINDOWS | {"max_window_layers": 1},
        }
        for family in ("qwen2", "qwen3")
    },
}


@dataclass(frozen=True)
class Case:
    """One dense model and one command.

    Attributes:
        dense: its family.
        target: of `--target`.
        trait: what is special, in words.
        changes: to the dense config.
        options: of `upcycle`.
        tokenizer: `bpe`, with GLM's special tokens (`glm`), or with a tokenizer.model beside it (`sentencepiece`).
        greedy: whether the likeliest tokens after the text are compared as well.
    """

    dense: str
    target: str
    trait: str
    changes: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    tokenizer: str = "bpe"
    greedy: bool = False

    @property
    def name(self) -> str:
        """A folder's name, and what `--only` looks at."""
        return f"{self.dense}-{self.target}-{self.trait}".replace(" ", "-").replace("/", "-")

    @property
    def settings(self) -> dict[str, Any]:
        """Of the dense model, for `tiny.save_dense`: copies, because transformers adds to what it is given."""
        return deepcopy(SIZES | PLAIN.get(self.dense, {}) | self.changes)

    @property
    def command(self) -> list[str]:
        """Options of `upcycle`, so that routing and redrawn units matter."""
        return ["--num-experts", "4", "--router-std", "0.3", "--target", self.target, *self.options]


PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
    "short_factor": [1.0 + i / 16 for i in range(16)], "long_factor": [2.0 + i / 4 for i in range(16)],
}  # fmt: skip
WIDE = {"sliding_window": 2 * POSITIONS}
ALIKE: list[tuple[Any, ...]] = [
    ("phi3", "mixtral", "plain", {"sliding_window": None}),
    ("phi3", "mixtral", "a window in all layers", {"sliding_window": WINDOW}),
    ("phi3", "mixtral", "longrope positions", {"sliding_window": None, "rope_parameters": LONG}),
    ("phi3", "glm4_moe", "positions in half of each head", WIDE | {"rope_parameters": PARTIAL}),
    ("ministral", "qwen2_moe", "plain", {"layer_types": SOME, "sliding_window": WINDOW}),
    ("ministral", "qwen2_moe", "a window as long as all positions", {"layer_types": SOME, "sliding_window": POSITIONS}),
    ("ministral", "granitemoe_swa", "plain", {"layer_types": SOME, "sliding_window": WINDOW}),
    ("cwm", "granitemoe_swa", "plain", {"layer_types": SOME, "sliding_window": WINDOW}),
    ("cwm", "qwen2_moe", "plain", {"layer_types": SOME, "sliding_window": WINDOW}),
    ("internlm3", "mixtral", "plain"),
    ("iquestcoder", "mixtral", "plain"),
    ("seed_oss", "glm4_moe", "plain", {"head_dim": 64}),
    ("seed_oss", "granitemoehybrid", "plain"),
    ("helium", "ernie4_5_moe", "plain", {}, (), "sentencepiece"),
    ("cohere", "cohere2_moe", "plain"),
]

# docs/recipes.md: what sets the published models apart, and the page's options.
RECIPES: list[tuple[Any, ...]] = [
    (
        "qwen2", "granitemoehybrid", "Qwen2.5 as in the recipes", {"tie_word_embeddings": True},
        ("--target", "auto", "--for", "vllm", "--for", "llama.cpp"),
    ),
    (
        "llama", "mixtral", "Llama 3.2 as in the recipes",
        {"tie_word_embeddings": True, "rope_parameters": ROPE["llama3"], "head_dim": 64}, ("--target", "auto"),
    ),
    (
        "qwen3", "qwen3_moe", "Qwen3 as in the recipes", {"tie_word_embeddings": True, "head_dim": 64},
        ("--target", "auto"),
    ),
    (
        "qwen3", "qwen3_moe", "Qwen3 fine-grained, as in the recipes", {"tie_word_embeddings": True, "head_dim": 64},
        ("--target", "auto", "--granularity", "4", "--num-experts", "32", "--top-k", "8"),
    ),
]  # fmt: skip


def cases() -> list[Case]:
    """All of them, pair by pair in the registry's order; then the families that are like another one."""
    of_targets = [case for name in registry.names("target") for case in _of_target(registry.load("target", name))]
    return of_targets + [Case(*case) for case in ALIKE] + [replace(Case(*case), greedy=True) for case in RECIPES]


def _of_target(spec: ArchSpec) -> Iterator[Case]:
    for dense in spec.dense:
        for trait, changes, *rest in _traits(dense, spec):
            case = Case(dense, spec.model_type, trait, changes, *rest)
            # The converter of llama.cpp reads no other vocabulary of the family.
            whole = dense == "ernie4_5" and trait != "no tokenizer.model"
            yield replace(case, tokenizer="sentencepiece") if whole else case


def _traits(dense: str, spec: ArchSpec) -> Iterator[tuple[Any, ...]]:
    """(trait, changes, options, tokenizer), the last two where they are needed."""
    yield "plain", {}
    yield "copies", {}, ("--method", "copy")
    tied = PLAIN.get(dense, {}).get("tie_word_embeddings", False)
    yield "untied" if tied else "tied", {"tie_word_embeddings": not tied}
    yield "a key and value for each head", {"num_key_value_heads": 4}
    yield "heads of another size", {"head_dim": 64}
    for kind, settings in ROPE.items() if dense != "granitemoehybrid" else ():  # it has none by default
        yield f"{kind} positions", {"rope_parameters": settings}
    if "attention_bias" in DENSE[dense].defaults:
        yield "biases of attention", {"attention_bias": True}
    yield from WINDOWS.get(dense, {}).items()
    for activation in ("gelu", "gelu_pytorch_tanh", "relu") if dense == spec.dense[0] else ("gelu",):
        yield activation, {"hidden_act": activation}
    yield "fine-grained", {}, ("--granularity", "2", "--num-experts", "8", "--top-k", "4")
    if spec.shared:
        for shared in spec.shared.sizes or (0, 1, 2):
            yield f"{shared} shared", {}, ("--shared-experts", str(shared))
        if not spec.shared.sizes:
            options = ("--granularity", "2", "--num-experts", "8", "--top-k", "4", "--shared-experts", "1")
            yield "fine-grained, 1 part shared", {}, options
    if spec.moe_layers:
        yield "first layer dense", {}, ("--moe-layers", "1-")
        yield "last layer dense", {}, ("--moe-layers", f"0-{LAYERS - 2}")
        yield "every other layer dense", {}, ("--moe-layers", "every:2")
    if any(limit.unless == "tokenizer.model" for limit in spec.limits):
        yield "no tokenizer.model", {}
    if any(limit.unless == "[gMASK]" for limit in spec.limits):
        yield "GLM's special tokens", {}, (), "glm"
        yield "GLM's special tokens, llama3 positions", {"rope_parameters": ROPE["llama3"]}, (), "glm"
        yield "GLM's special tokens, 0 shared", {}, ("--shared-experts", "0"), "glm"
