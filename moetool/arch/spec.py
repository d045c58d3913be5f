"""A target family as data, and how one is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moetool import registry
from moetool.arch.dense import FFN, Projection, Windows
from moetool.arch.limits import Limit, own_head_dim
from moetool.errors import ConfigError
from moetool.recipe import PROJECTIONS, UpcycleRecipe


def ffn(prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> dict[str, str]:
    """Names of the three matrices of an expert: projection -> tensor name."""
    return {
        projection: f"model.layers.{{layer}}.{prefix}.{name}.weight"
        for projection, name in zip(PROJECTIONS, (gate, up, down), strict=True)
    }


@dataclass(frozen=True)
class SharedExpert:
    """The shared expert of a family: a dense FFN that every token goes through, beside the routed ones.

    Attributes:
        tensors: projection -> tensor name with `{layer}`.
        gate: name of the row w of a gate, sigmoid(w . x), on its output; written as zeros, which is 1/2.
        default: how many experts' sizes it has unless the user says: 1 where the family always has
            one, or writes tensors of size zero without.
        sizes: the only sizes it can have; empty when any.
        averaged: whether a layer gives the mean of its output and the routed experts', not the sum.
    """

    tensors: Mapping[str, str]
    gate: str | None = None
    default: int = 0
    sizes: tuple[int, ...] = ()
    averaged: bool = False


@dataclass(frozen=True)
class ArchSpec:
    """How a family of Mixture-of-Experts models is named, shaped and configured on disk.

    Attributes:
        model_type: in config.json.
        architecture: the transformers class of the causal language model.
        dense: the dense families whose attention and norms line up with it.
        config_map: (filled dense config, recipe) -> what config.json has beyond the shared keys; pure.
        experts: projection (gate, up, down) -> tensor name with `{layer}` and `{expert}`; without
            `{expert}`, the tensor holds all experts, gate above up where they share a name.
        router: tensor name with `{layer}`.
        block: the module of a layer that holds router and experts in transformers 5.
        renamed: names of a router or selection bias -> those in transformers 5, where these are others.
        num_experts_key: the config key of the number of routed experts.
        top_k_key: the config key of the experts a token goes to.
        units_key: the config key of the units of one expert.
        keys: config keys that published checkpoints have -> those above.
        router_fp32: whether router logits are computed in fp32, whatever the model's dtype.
        ranked_by: the scores of which the largest are chosen: `softmax` over all experts, `sigmoid`, or `logits`.
        router_dtype: of the router on disk, where the family fixes it.
        selection_bias: tensor name with `{layer}` of a bias that only chooses experts; None where there is none.
        selection_bias_is_matrix: whether it is a matrix of one row and a frozen parameter, not a vector and a buffer.
        shared: the shared expert, None where the family has none.
        scaling_key: the config key of a factor on the routed output, None where weights must carry it.
        moe_layers: which layers can be dense -> config keys; None where all are MoE. Gets the MoE
            layers and the number of layers; raises ValueError with what it can express.
        biases: which projections of attention may have a bias.
        windows: which layers may have a sliding window.
        zero_biases: which of them are written as zeros where the dense model has none, because other
            readers always have them.
        rotary_bases: whether layers may differ in their rotary base, or have no positions.
        sinks: the tensor within a layer of attention's sinks, which take nothing where the dense model has none.
        scratch: whether all its tensors begin as `--method scratch` makes them: norms 1, biases 0, all else normal.
        partial_rotary: whether positions may turn only a part of each head.
        head_dim: whether a head may have another size than hidden_size / num_attention_heads.
        ties: whether the output head may be the embedding; where it may not, it is written out.
        limits: which programs other than transformers 5 do not compute it, when, and why.
    """

    model_type: str
    architecture: str
    dense: tuple[str, ...]
    config_map: Callable[[Mapping[str, Any], UpcycleRecipe], dict[str, Any]]
    experts: Mapping[str, str] = field(default_factory=lambda: ffn("mlp.experts.{expert}"))
    router: str = "model.layers.{layer}.mlp.gate.weight"
    block: str = "mlp"
    renamed: Mapping[str, str] = field(default_factory=dict)
    num_experts_key: str = "num_experts"
    top_k_key: str = "num_experts_per_tok"
    units_key: str = "moe_intermediate_size"
    keys: Mapping[str, str] = field(default_factory=dict)
    router_fp32: bool = False
    ranked_by: Literal["softmax", "sigmoid", "logits"] = "softmax"
    router_dtype: str | None = None
    selection_bias: str | None = None
    selection_bias_is_matrix: bool = False
    shared: SharedExpert | None = None
    scaling_key: str | None = None
    moe_layers: Callable[[frozenset[int], int], dict[str, Any]] | None = None
    biases: tuple[Projection, ...] = ()
    windows: Windows = Windows.NONE
    zero_biases: tuple[Projection, ...] = ()
    sinks: str | None = None
    rotary_bases: bool = False
    scratch: bool = True
    partial_rotary: bool = False
    head_dim: bool = True
    ties: bool = True
    limits: tuple[Limit, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether a tensor holds all experts of a layer."""
        return "{expert}" not in self.experts["gate"]

    @property
    def in_memory(self) -> ArchSpec:
        """The same with the names of transformers 5's modules, where two tensors hold all experts of a layer."""
        both, down = (f"model.layers.{{layer}}.{self.block}.experts.{name}" for name in ("gate_up_proj", "down_proj"))
        return replace(
            self,
            experts={"gate": both, "up": both, "down": down},
            router=self.renamed.get(self.router, self.router),
            selection_bias=self.renamed.get(self.selection_bias or "", self.selection_bias),
        )

    @property
    def together(self) -> ArchSpec:
        """The same with the names where experts are stored together: its own, or those of transformers 5's modules."""
        return self if self.fused else self.in_memory

    def expert_place(self, projection: str, layer: int, expert: int, num_elements: int) -> tuple[str, int]:
        """The tensor of an expert's matrix, and the element of it at which the matrix begins.

        Args:
            projection: gate, up or down.
            layer: of the expert.
            expert: its number.
            num_elements: of the matrix.
        """
        name = self.experts[projection]
        together = [p for p in PROJECTIONS if self.experts[p] == name]
        place = expert * len(together) + together.index(projection) if self.fused else 0
        return name.format(layer=layer, expert=expert), place * num_elements

    def config(self, dense: Mapping[str, Any], recipe: UpcycleRecipe, moe: frozenset[int]) -> dict[str, Any]:
        """config.json of the result.

        Args:
            dense: the filled dense config.
            recipe: with `shared_experts` a number.
            moe: the layers that are MoE.
        """
        config = _shared_config(self, dense)
        config |= {self.num_experts_key: recipe.num_experts, self.top_k_key: recipe.top_k}
        config |= self.config_map(dense, recipe)
        config[self.units_key] = dense["intermediate_size"] // recipe.granularity
        if self.moe_layers:
            config |= self.moe_layers(moe, dense["num_hidden_layers"])
        return config


def scales(recipe: UpcycleRecipe, spec: ArchSpec) -> tuple[float, float]:
    """Factors on the outputs of the routed experts and of the shared one that make the start exact.

    A group of M routed experts has equal logits and weights that sum to 1 over the chosen groups, so
    it gives 1/M of the sum of its parts: the factor is M. Where the shared expert is one or more (c)
    copies of the whole FFN, it and the routed ones give half each.
    """
    shared, parts = recipe.shared_experts or 0, recipe.granularity
    if recipe.method == "scratch":
        return 1.0, 1.0
    if shared == 0:
        return float(parts), 1.0
    gate = 0.5 if spec.shared and spec.shared.gate else 1.0  # sigmoid(0)
    both = 2.0 if spec.shared and spec.shared.averaged else 1.0
    if shared < parts:
        return both * (parts - shared), both / gate
    return both * parts / 2, both * parts / (2 * shared) / gate


def routed_factor(recipe: UpcycleRecipe, spec: ArchSpec) -> float:
    """The factor that the routed experts' down-projections carry: 1 where config.json holds it."""
    return 1.0 if spec.scaling_key else scales(recipe, spec)[0]


# The keys that every decoder of these families shares.
SHARED_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
    "attention_dropout",
)  # fmt: skip


def _shared_config(spec: ArchSpec, dense: Mapping[str, Any]) -> dict[str, Any]:
    """The part of config.json that is carried over, in the form that old and new readers know.

    transformers 5 reads `rope_parameters` and `dtype`; older versions, vLLM and llama.cpp read
    `rope_theta`, `rope_scaling` and `torch_dtype`. `auto_map` (remote code) is never carried over.
    """
    config: dict[str, Any] = {"architectures": [spec.architecture], "model_type": spec.model_type}
    config |= {key: dense[key] for key in SHARED_KEYS if key in dense}
    rope = dense["rope_parameters"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    config["rope_parameters"] = rope
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    if spec.windows is not Windows.NONE:
        config["sliding_window"] = dense["sliding_window"]
    if spec.windows is Windows.BY_LAYER:
        config["layer_types"] = dense["layer_types"]
    # Never transformers' pooled balance loss: a saved `true` would also break generation in some versions.
    return config | {"output_router_logits": False}


def misfit(spec: ArchSpec, dense: Mapping[str, Any]) -> str | None:
    """Why a filled dense config has no place in a family that lists its model_type; None if it has."""
    if not set(dense["biases"]) <= set(spec.biases):
        return f"its attention has biases ({''.join(dense['biases'])})"
    if not spec.head_dim and own_head_dim(dense):
        heads = f"{dense['hidden_size']} / {dense['num_attention_heads']}"
        return f"its heads have size {dense['head_dim']}, and only heads of size {heads} can be written in the family"
    part = dense["rope_parameters"].get("partial_rotary_factor", 1)
    if part != 1 and not spec.partial_rotary:
        return f"its positions rotate only {part} of each head"
    if len(set(dense["rotary_bases"])) > 1 and not spec.rotary_bases:
        return "its layers differ in their positions"
    windows = set(dense["layer_types"])
    if (dense["sliding_window"] or 0) >= dense["max_position_embeddings"]:
        windows = {"full_attention"}  # as good as none
    if "sliding_attention" in windows and spec.windows is Windows.NONE:
        return "it has a sliding window"
    if windows >= {"full_attention", "sliding_attention"} and spec.windows is not Windows.BY_LAYER:
        return "only some of its layers have a sliding window"
    return None


def candidates(target: str, dense: Mapping[str, Any]) -> list[ArchSpec]:
    """The specs of a target name: one, or with `auto` each that fits the dense family, the first first.

    Args:
        target: a name in the registry, or `auto`.
        dense: the filled dense config.

    Raises:
        ConfigError: the target is unknown, or does not fit the dense model; names those that do.
    """
    if target != "auto":
        registry.check("target", target)
    family = dense["family"]
    specs: list[ArchSpec] = [registry.load("target", name) for name in registry.names("target")]
    reasons = {spec.model_type: misfit(spec, dense) for spec in specs if family in spec.dense}
    fitting = [spec for spec in specs if reasons.get(spec.model_type, "no") is None]
    chosen = fitting if target == "auto" else [spec for spec in fitting if spec.model_type == target]
    if chosen:
        return chosen
    name = next(iter(reasons)) if target == "auto" else target
    why = f": {reasons[name]}" if name in reasons else ""
    choices = ", ".join(spec.model_type for spec in fitting) or "none"
    raise ConfigError(f"a dense {family} does not fit --target {name}{why}; choose from {choices}")


def detect(config: Mapping[str, Any]) -> ArchSpec | None:
    """The spec of a Mixture of Experts' config.json, None where moetool has none for it."""
    for name in registry.names("target"):
        spec: ArchSpec = registry.load("target", name)
        if spec.model_type == config.get("model_type"):
            return spec
    return None


def dense_ffn(layer: int) -> dict[str, str]:
    """Names of the dense FFN's matrices: projection -> tensor name."""
    return {p: f"model.layers.{layer}.{name}" for p, name in zip(PROJECTIONS, FFN, strict=True)}


def leading_dense(key: str) -> Callable[[frozenset[int], int], dict[str, Any]]:
    """`moe_layers` of families whose first layers alone can be dense."""

    def keys(moe: frozenset[int], layers: int) -> dict[str, Any]:
        first = min(moe)
        if moe != frozenset(range(first, layers)):
            raise ValueError("only its first layers can be dense: all, or N- for the layers from N on")
        return {key: first}

    return keys


def listed_dense(moe: frozenset[int], layers: int) -> dict[str, Any]:
    """`moe_layers` of the Qwen families, which list the dense layers."""
    return {"mlp_only_layers": sorted(set(range(layers)) - moe), "decoder_sparse_step": 1}
