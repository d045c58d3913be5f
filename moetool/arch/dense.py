"""A dense family as data: its tensors, and what its config may omit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

# Letters in the shapes below: V vocabulary, D hidden, F intermediate, H head_dim, A query heads, Q query heads x
# head_dim, KV key-value heads x head_dim; those of linear attention begin with L, of Mamba with M, of short
# convolutions with C (see `dims`).
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
NORM = "model.norm.weight"
ATTENTION = {
    "self_attn.q_proj.weight": "Q D",
    "self_attn.k_proj.weight": "KV D",
    "self_attn.v_proj.weight": "KV D",
    "self_attn.o_proj.weight": "D Q",
}
Projection = Literal["q", "k", "v", "o"]
QKV: tuple[Projection, ...] = ("q", "k", "v")
QKVO: tuple[Projection, ...] = (*QKV, "o")
BIASES: dict[Projection, tuple[str, str]] = {
    "q": ("self_attn.q_proj.bias", "Q"),
    "k": ("self_attn.k_proj.bias", "KV"),
    "v": ("self_attn.v_proj.bias", "KV"),
    "o": ("self_attn.o_proj.bias", "D"),
}
PRE_NORM = {"input_layernorm.weight": "D", "post_attention_layernorm.weight": "D"}
POST_NORM = {"post_attention_layernorm.weight": "D", "post_feedforward_layernorm.weight": "D"}
SINKS = {"self_attn.sinks": "A"}
HEAD_NORM = {"self_attn.q_norm.weight": "H", "self_attn.k_norm.weight": "H"}
LINEAR_ATTENTION = {
    "linear_attn.in_proj_qkv.weight": "LQKV D",
    "linear_attn.in_proj_z.weight": "LV D",
    "linear_attn.in_proj_b.weight": "LH D",
    "linear_attn.in_proj_a.weight": "LH D",
    "linear_attn.conv1d.weight": "LQKV 1 LC",
    "linear_attn.A_log": "LH",
    "linear_attn.dt_bias": "LH",
    "linear_attn.norm.weight": "LVH",
    "linear_attn.out_proj.weight": "D LV",
}
MAMBA = {
    "mamba.in_proj.weight": "MP D",
    "mamba.conv1d.weight": "MC 1 MK",
    "mamba.A_log": "MH",
    "mamba.D": "MH",
    "mamba.dt_bias": "MH",
    "mamba.norm.weight": "MI",
    "mamba.out_proj.weight": "D MI",
}
MAMBA_BIASES = {
    "mamba_conv_bias": {"mamba.conv1d.bias": "MC"},
    "mamba_proj_bias": {"mamba.in_proj.bias": "MP", "mamba.out_proj.bias": "D"},
}
SHORT_CONVOLUTION = {"conv.in_proj.weight": "3D D", "conv.conv.weight": "D 1 CL", "conv.out_proj.weight": "D D"}
# gate, up, down: name within a layer -> shape.
FFN = {"mlp.gate_proj.weight": "F D", "mlp.up_proj.weight": "F D", "mlp.down_proj.weight": "D F"}


class Windows(Enum):
    """Which layers may look back over `sliding_window` tokens only."""

    NONE = "none"
    ALL = "all, alike"
    BY_LAYER = "those that layer_types names"


@dataclass(frozen=True)
class DenseSpec:
    """A dense family.

    Attributes:
        model_type: in config.json.
        like: the family whose tensors and function it has, once it is read; None where it is its own.
        defaults: what transformers assumes where config.json is silent.
        layer: names within `model.layers.N.` (without FFN and biases) -> shapes.
        biases: the projections of attention that always have a bias; where config.json has
            `attention_bias`, that decides for all four.
        refuse: config keys that change the function in a way no target has -> the value that is fine.
        windows: how config.json says which layers have a sliding window.
        out_bias: the config key of a bias of attention's output, where it is another than for q, k and v.
        partial_rotary: whether positions may turn only a part of each head (`partial_rotary_factor`).
        mixers: where layers differ in what mixes their tokens, its layer type -> its tensors; `layer` is what all have.
        fused: name within a layer of a tensor on disk -> the names of those whose rows lie in it, in order.
        derive: filled config -> settings that follow from it.
        keys: names of config keys that are the family's own -> those of other families.
        norm: the tensor of the last norm.
    """

    model_type: str
    defaults: Mapping[str, Any]
    layer: Mapping[str, str] = field(default_factory=lambda: ATTENTION | PRE_NORM)
    biases: tuple[Projection, ...] = ()
    refuse: Mapping[str, Any] = field(default_factory=dict)
    windows: Windows = Windows.NONE
    like: str | None = None
    out_bias: str = "attention_bias"
    partial_rotary: bool = False
    mixers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    derive: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    keys: Mapping[str, str] = field(default_factory=dict)
    norm: str = NORM

    @property
    def family(self) -> str:
        """The family that targets treat it as."""
        return self.like or self.model_type

    @property
    def shapes(self) -> dict[str, str]:
        """Names within a layer, with the FFN but without biases -> shapes."""
        return {**self.layer, **FFN}


def layer_tensors(spec: DenseSpec, config: Mapping[str, Any], layer: int) -> dict[str, str]:
    """Names within a layer, without the FFN -> shapes; of a filled config."""
    tensors = {**spec.layer, **spec.mixers.get(config["layer_types"][layer], {})}
    if "mamba.in_proj.weight" in tensors:
        return tensors | {name: s for key, bias in MAMBA_BIASES.items() if config[key] for name, s in bias.items()}
    if next(iter(ATTENTION)) in tensors:
        tensors |= dict(BIASES[projection] for projection in config["biases"])
    return tensors


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that the letters in a shape stand for."""
    heads, size = config["num_attention_heads"], config["head_dim"]
    sizes = {
        "V": config["vocab_size"],
        "D": config["hidden_size"],
        "A": heads,
        "F": config["intermediate_size"],
        "H": size,
        "Q": heads * size,
        "2Q": 2 * heads * size,
        "KV": config["num_key_value_heads"] * size,
        "1": 1,
    }
    if "linear_num_value_heads" in config:  # linear attention: its heads, one head's and all heads' values
        values, value = config["linear_num_value_heads"], config["linear_value_head_dim"]
        keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
        sizes |= {"LH": values, "LVH": value, "LV": values * value, "LQKV": 2 * keys + values * value}
        sizes["LC"] = config["linear_conv_kernel_dim"]
    if "conv_L_cache" in config:
        sizes |= {"3D": 3 * config["hidden_size"], "CL": config["conv_L_cache"]}
    if "mamba_n_heads" in config:  # Mamba: its heads, inner size, convolution and projection
        inner, states = (
            config["mamba_expand"] * config["hidden_size"],
            config["mamba_n_groups"] * config["mamba_d_state"],
        )
        sizes |= {"MH": config["mamba_n_heads"], "MI": inner, "MC": inner + 2 * states, "MK": config["mamba_d_conv"]}
        sizes["MP"] = 2 * inner + 2 * states + config["mamba_n_heads"]
    return sizes


def shape(letters: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """`"F D"` -> (intermediate_size, hidden_size)."""
    return tuple(sizes[letter] for letter in letters.split())
