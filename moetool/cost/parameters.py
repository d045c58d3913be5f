"""The shapes of a model's parameters in memory, and how it is shared between processes; they decide its cost.

Of a model of transformers it is read (`sizes_of`); `moetool plan` makes it from headers, without torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

# What families call the bias that chooses experts.
BIAS_NAMES = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True, eq=False)
class Sizes:
    """A model as far as it decides cost.

    Attributes:
        family: model_type of its configuration.
        shapes: of its parameters by name; a tied head is not among them.
        num_experts: routed experts per layer; 1 for a dense model.
        top_k: experts per token.
        hidden_size: of the residual stream.
        vocab_size: of the head.
        num_layers: all of them.
        num_heads: of attention's queries.
        num_key_value_heads: of its keys and values.
        head_dim: size of a head.
        tied: whether the head is the embedding, as the configuration says.
        changes_logits: whether a head adds a bias or a family caps its logits: their loss is not taken in chunks.
        tp_plan: module or parameter, with `*` for a layer -> style of tensor parallelism; empty where there is none.
        fsdp_plan: module -> how FSDP gathers it.
        spread: modules of experts that `ep` divides.
        exact: modules that stay fp32 in bf16.
        frozen: parameters that are never trained.
        routers: parameters of routers.
    """

    family: str
    shapes: Mapping[str, tuple[int, ...]]
    hidden_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int = 1
    top_k: int = 1
    tied: bool = False
    changes_logits: bool = False
    tp_plan: Mapping[str, str] = field(default_factory=dict)
    fsdp_plan: Mapping[str, str] = field(default_factory=dict)
    spread: Collection[str] = ()
    exact: Collection[str] = ()
    frozen: Collection[str] = ()
    routers: frozenset[str] = frozenset()

    def count(self, among: Collection[str] | None = None) -> tuple[int, int]:
        """Elements of all parameters, and of those that one token uses; where names are given, among these."""
        counted = {name: shape for name, shape in self.shapes.items() if among is None or name in among}
        total = sum(map(prod, counted.values()))
        experts = sum(prod(shape) for name, shape in counted.items() if is_routed(name, shape))
        return total, total - experts + experts * self.top_k // self.num_experts

    @property
    def total(self) -> int:
        """Elements of all parameters."""
        return self.count()[0]

    @property
    def active(self) -> int:
        """Elements of those that one token uses."""
        return self.count()[1]

    @property
    def expert_counts(self) -> set[int]:
        """Experts of its layers."""
        return {shape[0] for name, shape in self.shapes.items() if is_routed(name, shape)}


@cache
def pattern(name: str) -> str:
    """A name with `*` for its layer's number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def is_routed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter holds the routed experts of a layer, (experts, rows, columns)."""
    return len(shape) == 3 and ".experts." in name


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to experts, routed or shared; what weights a shared expert does not."""
    return bool(re.search(r"\.(experts|shared_experts?|shared_mlp)\.", name))


def is_selection_bias(name: str) -> bool:
    """Whether a tensor is a selection bias."""
    return name.rpartition(".")[2] in BIAS_NAMES


def is_embedding(name: str) -> bool:
    """Whether a parameter is the input embedding or the head."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def sizes_of(model: Any) -> Sizes:
    """The sizes of a model of transformers, whose tensors may be on torch's meta device."""
    config = model.config.get_text_config()
    shapes = {name: tuple(map(int, parameter.shape)) for name, parameter in model.named_parameters()}
    num_experts, top_k = routing_size(model)
    head = model.get_output_embeddings()
    capped = bool(getattr(config, "final_logit_softcapping", None))
    heads = getattr(config, "num_attention_heads", None) or 0  # a model may have none
    return Sizes(
        family=model.config.model_type,
        shapes=shapes,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0),
        num_experts=num_experts,
        top_k=top_k,
        tied=bool(config.tie_word_embeddings),
        changes_logits=getattr(head, "bias", None) is not None or capped,
        tp_plan=dict(model.tp_plan or {}),
        fsdp_plan=dict(model.fsdp_plan or {}),
        spread=[name for name, style in (model.ep_plan or {}).items() if style == "ep_dispatch_experts"],
        exact=exact_modules(model),
        routers=router_names(model),
        frozen=[name for name, p in model.named_parameters() if is_selection_bias(name) or not p.requires_grad],
    )


def routing_size(model: Any) -> tuple[int, int]:
    """Routed experts per layer and experts per token of a model of transformers; (1, 1) for a dense one.

    A block is run on torch's meta device, so that no family's names for the two need be known.
    """
    from moetool.routing.capture import RouterCapture, has_routers
    from moetool.routing.shape import outline

    if not has_routers(model):
        return 1, 1
    if found := outline(model, RouterCapture(model)):
        return found.num_experts, found.top_k
    experts = [p.shape[0] for name, p in model.named_parameters() if is_routed(name, p.shape)]
    return max(experts, default=1), getattr(model.config.get_text_config(), "num_experts_per_tok", 1)


def router_names(model: Any) -> frozenset[str]:
    """The parameters of the routers of a model of transformers, by name."""
    from moetool.routing.capture import find_routers

    return frozenset(
        f"{router}.{name}" for router, module in find_routers(model) for name, _ in module.named_parameters()
    )


def exact_modules(model: Any) -> list[str]:
    """The modules whose weights stay fp32 in bf16, with `*` for a layer's number: routers, owners of selection biases.

    Args:
        model: of transformers.
    """
    from moetool.routing.capture import find_routers

    names = [name for name, _ in find_routers(model)]
    names += [name.rpartition(".")[0] for name, _ in model.named_parameters() if is_selection_bias(name)]
    return sorted(set(map(pattern, names)))


def trained_names(
    parameters: Iterable[str], routers: frozenset[str], train_only: str, freeze_router: bool
) -> frozenset[str]:
    """The parameters that `cpt` trains, by name, but for selection biases, which no gradient reaches.

    Args:
        parameters: of the model.
        routers: those of its routers.
        train_only: `routers`, `experts` (routed and shared ones) or `everything`.
        freeze_router: whether routers are not among them.
    """
    if train_only == "routers":
        return routers
    chosen = frozenset(parameters if train_only == "everything" else filter(is_expert, parameters))
    return chosen - routers if freeze_router else chosen
