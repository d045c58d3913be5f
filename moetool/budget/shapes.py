"""The sizes of a dense model and of its upcycled form, from headers only, without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from moetool.arch.dense import EMBEDDING, LM_HEAD
from moetool.arch.dense_config import dense_config
from moetool.arch.forms import family_names, text_config
from moetool.arch.sharing import FSDP, TENSOR_PARALLEL
from moetool.checkpoint.folder import beside
from moetool.checkpoint.header import ITEM_SIZE, TensorInfo
from moetool.checkpoint.reader import CheckpointReader
from moetool.cost.parameters import Sizes, is_routed, pattern
from moetool.errors import CheckpointError, ConfigError
from moetool.recipe import UpcycleRecipe
from moetool.surgery.fill import peak_memory
from moetool.upcycle.check import IGNORED, check_tensors
from moetool.upcycle.layout import fills_of, with_head
from moetool.upcycle.target import settle


@dataclass(frozen=True)
class Models:
    """A dense model and the Mixture of Experts that is planned.

    Attributes:
        dense: sizes of the dense model.
        moe: sizes of the Mixture of Experts.
        recipe: of the upcycling, settled; as typed where the family cannot be upcycled.
        unfit: why the family cannot be upcycled; empty where it can.
        num_bytes: of the Mixture of Experts on disk.
        dense_bytes: of the dense model on disk.
        upcycle_memory: bytes that `moetool upcycle` needs with two workers; None where it cannot.
    """

    dense: Sizes
    moe: Sizes
    recipe: UpcycleRecipe
    unfit: str
    num_bytes: int
    dense_bytes: int
    upcycle_memory: int | None

    @property
    def dense_layers(self) -> int:
        """Layers of the Mixture of Experts that have no experts."""
        routed = {name.partition(".experts.")[0] for name, shape in self.moe.shapes.items() if is_routed(name, shape)}
        return self.moe.num_layers - len(routed)


def plan_models(reader: CheckpointReader, recipe: UpcycleRecipe, clients: Sequence[str] = ()) -> Models:
    """Read a dense model's headers and lay out the result of a recipe.

    Args:
        reader: of the dense model.
        recipe: `target` may be `auto`, `shared_experts` None.
        clients: programs in which the result must run.

    Raises:
        ConfigError: the model is quantised or a Mixture of Experts already, or the recipe does not fit it.
        CheckpointError: its tensors are not those that its configuration announces, or say too little.
    """
    try:
        spec, dense = dense_config(reader.config)
    except ConfigError as error:
        config = text_config(reader.config)
        if config.get("quantization_config") or "already a Mixture of Experts" in str(error):
            raise
        typed = {
            "--target": recipe.target != "auto",
            "--for": bool(clients),
            "--moe-layers": recipe.moe_layers != "all",
            "--shared-experts": bool(recipe.shared_experts),
        }
        for flag, is_typed in typed.items():
            if is_typed:
                raise ConfigError(f"{flag}: {error}; leave it out to see only cost and memory") from None
        return _unsupported(reader, recipe, str(error))
    settled = settle(recipe, dense, clients, beside(reader.folder))
    source = check_tensors(reader, spec, dense)
    tied = dense["tie_word_embeddings"] and LM_HEAD not in source
    if tied != dense["tie_word_embeddings"]:  # it has a head of its own, whatever it says
        settled = settle(recipe, dense | {"tie_word_embeddings": False}, clients, beside(reader.folder))
    recipe, target = settled.recipe, settled.spec
    fills, tensors = fills_of([with_head(source, target)], target.in_memory, recipe, dense, settled.moe)
    names = {bias for layer in settled.moe if (bias := _bias(target.in_memory.selection_bias, layer))}
    frozen = names if target.selection_bias_is_matrix else set()
    experts = f"model.layers.*.{target.block}.experts"
    exact = {pattern(_module(target.in_memory.router)), *(pattern(name.rpartition(".")[0]) for name in frozen)}
    common = {
        "hidden_size": dense["hidden_size"],
        "vocab_size": dense["vocab_size"],
        "num_layers": dense["num_hidden_layers"],
        "num_heads": dense["num_attention_heads"],
        "num_key_value_heads": dense["num_key_value_heads"],
        "head_dim": dense["head_dim"],
        "fsdp_plan": FSDP,
    }
    router = pattern(_module(target.in_memory.router)) + "."
    moe = Sizes(
        family=target.model_type,
        shapes={one.name: one.shape for one in tensors if one.name not in names - frozen},
        num_experts=recipe.num_experts,
        top_k=recipe.top_k,
        tied=bool(settled.config["tie_word_embeddings"]) and tied,
        tp_plan=TENSOR_PARALLEL.get(target.model_type, {}),
        spread=(experts,),
        exact=sorted(exact),
        frozen=sorted(frozen),
        routers=frozenset(one.name for one in tensors if pattern(one.name).startswith(router)) - (names - frozen),
        **common,
    )
    own = {n: info for n, info in family_names(reader.tensors, reader.config).items() if not IGNORED.search(n)}
    plain = Sizes(
        family=spec.model_type,
        shapes={name: info.shape for name, info in own.items() if not (tied and name == LM_HEAD)},
        tied=tied,
        tp_plan=TENSOR_PARALLEL.get(spec.model_type, {}),
        **common,
    )
    num_bytes = sum(prod(one.shape) * ITEM_SIZE[one.dtype] for one in tensors)
    return Models(plain, moe, recipe, "", num_bytes, _size(own), peak_memory(fills, 2))


def _bias(name: str | None, layer: int) -> str | None:
    return name and name.format(layer=layer)


def _module(router: str) -> str:
    """The router that a matrix belongs to; some families hold it in a layer within."""
    return router.format(layer=0).removesuffix(".weight").removesuffix(".layer").removesuffix(".wg")


def _size(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(info.size for info in tensors.values())


# What families call the numbers that decide cost, beside the usual names.
_ALSO = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
}
_INSIDE = re.compile(r"\.(layers|h|blocks|block)\.\d+\.")


def _unsupported(reader: CheckpointReader, recipe: UpcycleRecipe, unfit: str) -> Models:
    """The models of a family that cannot be upcycled, as if each FFN were copied for each expert.

    An FFN's matrices are those of a layer that have the intermediate size on one side and the hidden size on the other.
    """
    config = text_config(reader.config)

    def number(key: str, usual: int | None = None) -> int:
        for name in (key, *_ALSO.get(key, ())):
            if type(config.get(name)) is int and config[name] > 0:
                return int(config[name])
        if usual is None:
            raise CheckpointError(f"{reader.folder}: config.json has no {key}, on which cost and memory depend")
        return usual

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    units = number("intermediate_size", 4 * hidden)
    shapes = {name: info.shape for name, info in family_names(reader.tensors, reader.config).items()}
    head = next((name for name in shapes if name.endswith("lm_head.weight")), None)
    embedding = EMBEDDING if EMBEDDING in shapes else max(
        (name for name in shapes if not _INSIDE.search(f".{name}")), key=lambda name: prod(shapes[name])
    )  # fmt: skip
    common: dict[str, Any] = {
        "hidden_size": hidden,
        "vocab_size": number("vocab_size", shapes[embedding][0]),
        "num_layers": number("num_hidden_layers"),
        "num_heads": heads,
        "num_key_value_heads": number("num_key_value_heads", heads),
        "head_dim": number("head_dim", hidden // heads),
        "tied": head is None,
        "changes_logits": bool(config.get("final_logit_softcapping")),
        "fsdp_plan": FSDP,
    }
    if recipe.granularity > 1 and units % recipe.granularity:
        raise ConfigError(f"--granularity {recipe.granularity} does not divide the intermediate size {units}")
    moe: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        moe[name] = shape
        if _INSIDE.search(f".{name}") and len(shape) == 2 and sorted(shape) == sorted((hidden, units)):
            owner, _, matrix = name.removesuffix(".weight").rpartition(".")
            rows, columns = (side // recipe.granularity if side == units else side for side in shape)
            del moe[name]
            moe[f"{owner}.gate.weight"] = (recipe.num_experts, hidden)
            moe[f"{owner}.experts.{matrix}"] = (recipe.num_experts, rows, columns)
    family = str(config.get("model_type"))[:60]
    planned = Sizes(
        family=family, shapes=moe, num_experts=recipe.num_experts, top_k=recipe.top_k,
        exact=sorted({pattern(name.removesuffix(".weight")) for name in moe if name.endswith(".gate.weight")}),
        routers=frozenset(name for name in moe if name.endswith(".gate.weight")), **common,
    )  # fmt: skip
    each = max(ITEM_SIZE[info.dtype] for info in reader.tensors.values())
    each = each if recipe.dtype == "auto" else ITEM_SIZE[recipe.dtype]
    return Models(
        Sizes(family=family, shapes=shapes, **common), planned, replace(recipe, shared_experts=0), unfit,
        each * planned.total, _size(reader.tensors), None,
    )  # fmt: skip
