"""A conversion as a plan: checks everything, writes nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moetool.arch.dense import EMBEDDING, LM_HEAD
from moetool.arch.forms import is_wrapped, text_names
from moetool.arch.moe_source import config_number, layers_of
from moetool.arch.spec import ArchSpec, detect
from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.reader import AdapterReader, CheckpointReader
from moetool.checkpoint.shard import TensorLayout
from moetool.convert.adapter import KINDS_OF_CONVERT, Adapter, adapted, read_adapter
from moetool.convert.matrix import Matrix, as_they_are, check_layout, join_experts, layout_of, split_experts
from moetool.convert.recipe import ConvertRecipe
from moetool.convert.text import result_config
from moetool.errors import CheckpointError, ConfigError
from moetool.surgery.fill import Fill, Piece, Place, natural
from moetool.surgery.plan import Operation, Plan, lay_out
from moetool.values import FLOAT_DTYPES

# Biases that only choose experts move by steps below bf16's precision; models hold them in fp32.
_KEPT_DTYPE = re.compile(r"(e_score_correction_bias|expert_bias)$")
_EMBEDDING_OR_HEAD = re.compile(r"(^|\.)(lm_head|wte|word_embeddings|embed(_in|_tokens)?|tok_embeddings)\.weight$")
_BESIDE_TEXT = re.compile(r"\.rotary_emb\.inv_freq$|^mtp\.|^model\.mtp\.")


@dataclass(frozen=True)
class Conversion:
    """The result of a recipe for a checkpoint; see `plan_conversion`.

    Attributes:
        plan: what is written.
        text_model_of: the multimodal family that it is taken out of, or None.
        layouts: of experts, in the source and in the result; None where there are none.
        num_merged: weights that the adapter is added to.
        num_replaced: tensors that the adapter replaces.
        untied: whether the adapter makes two tensors of the one that was both embeddings and output head.
    """

    plan: Plan
    text_model_of: str | None
    layouts: tuple[str | None, str | None]
    num_merged: int
    num_replaced: int
    untied: bool


def plan_conversion(readers: Sequence[CheckpointReader], recipe: ConvertRecipe, max_shard_size: int) -> Conversion:
    """Check sources and a recipe against each other and lay out the result.

    Args:
        readers: the checkpoint, and the adapter where the recipe has one.
        recipe: what to change.
        max_shard_size: bytes of tensor data per file.

    Raises:
        ConfigError: the family does not have the layout, or the adapter is of a kind that is not merged here.
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    source = readers[0]
    config = result_config(source.config)
    spec, wrapped = detect(config), is_wrapped(source.config)
    tensors = _text_tensors(source, config)
    matrices, layout = as_they_are(tensors), layout_of(tensors, spec)
    after = layout
    if recipe.layout != "auto" and recipe.layout != layout:
        check_layout(recipe.layout, spec, str(config.get("model_type"))[:60])
        if layout is None:
            raise ConfigError(f"--layout {recipe.layout}: {source.folder} has no experts; leave --layout out")
        assert spec is not None
        change = join_experts if recipe.layout == "fused" else split_experts
        num_experts = config_number(config, spec, spec.num_experts_key, source.folder)
        matrices, after = change(matrices, spec, num_experts), recipe.layout
    adapter, untied = Adapter({}, {}), False
    if recipe.adapter:
        adapter = _read(readers).named(_names_on_disk(matrices, spec))
        tied = EMBEDDING in matrices and LM_HEAD not in matrices and bool(adapter.changed & {EMBEDDING, LM_HEAD})
        if tied and _has_one_change(adapter, readers[1]):
            adapter = adapter.without(LM_HEAD)
        elif tied:
            matrices[LM_HEAD] = replace(matrices[EMBEDDING], place=Place(LM_HEAD))
            config["tie_word_embeddings"], untied = False, True
        _check_fit(adapter, readers, matrices, layout, spec)
    fills, layouts = _fills(matrices, recipe, spec, adapter, readers)
    if recipe.dtype != "auto":
        config["dtype"] = config["torch_dtype"] = FLOAT_DTYPES[recipe.dtype]
    model_types = [str(source.config.get("model_type")), *["lora"] * recipe.adapter]
    plan = lay_out(
        "convert", asdict(recipe), readers, config, fills, layouts, max_shard_size, KINDS_OF_CONVERT, model_types,
        continues=1,
    )  # fmt: skip
    text_model_of = str(source.config["model_type"])[:60] if wrapped else None
    return Conversion(plan, text_model_of, (layout, after), len(adapter.deltas), len(adapter.replaced), untied)


def _text_tensors(source: CheckpointReader, config: dict[str, Any]) -> dict[str, TensorInfo]:
    """The tensors to carry under the names of a language model on its own; says in config whether its head is tied."""
    wrapped = is_wrapped(source.config)
    names = text_names(source.tensors, source.config) if wrapped else {name: name for name in source.tensors}
    tensors = {
        usual: source.tensors[name] for name, usual in names.items() if not (wrapped and _BESIDE_TEXT.search(usual))
    }
    if LM_HEAD in tensors and EMBEDDING in tensors and config.get("tie_word_embeddings"):
        if source.same(tensors[LM_HEAD], tensors[EMBEDDING]):
            del tensors[LM_HEAD]  # a copy of the embeddings: transformers saves none
        else:
            config["tie_word_embeddings"] = False  # transformers unties them when they differ
    elif wrapped and LM_HEAD not in tensors and not config.get("tie_word_embeddings"):
        raise CheckpointError(f"{source.folder} has no output head ({LM_HEAD}), and its embeddings are not tied")
    return tensors


def _read(readers: Sequence[CheckpointReader]) -> Adapter:
    reader = readers[1]
    assert isinstance(reader, AdapterReader)
    adapter = read_adapter(reader)
    if not adapter.changed:
        raise CheckpointError(f"--adapter {reader.folder} holds no tensors")
    return adapter


def _has_one_change(adapter: Adapter, reader: CheckpointReader) -> bool:
    """Whether peft has saved the same change of embeddings and output head twice."""
    if reader.config.get("ensure_weight_tying") is True:
        return True
    saved = [adapter.replaced.get(name) for name in (EMBEDDING, LM_HEAD)]
    whole = not adapter.deltas.keys() & {EMBEDDING, LM_HEAD}
    return whole and saved[0] is not None and saved[1] is not None and reader.same(saved[0], saved[1])


def _names_on_disk(matrices: Mapping[str, Matrix], spec: ArchSpec | None) -> dict[str, str]:
    """Names in transformers 5's modules -> those of a checkpoint's tensors, where these are others."""
    renamed = spec.renamed if spec else {}
    return {
        inside.format(layer=layer): name
        for layer in layers_of(matrices)
        for saved, inside in renamed.items()
        if (name := saved.format(layer=layer)) in matrices
    }


def _check_fit(
    adapter: Adapter,
    readers: Sequence[CheckpointReader],
    matrices: Mapping[str, Matrix],
    layout: str | None,
    spec: ArchSpec | None,
) -> None:
    """Refuse an adapter of another base.

    Raises:
        CheckpointError: it changes a tensor that is not there, or is of another shape.
        ConfigError: it changes embeddings that may be the output head as well.
    """
    where, config = readers[1].folder, readers[0].config
    named = LM_HEAD in matrices or EMBEDDING in matrices
    for name in sorted(adapter.changed):
        if not named and config.get("tie_word_embeddings", True) and _EMBEDDING_OR_HEAD.search(name):
            raise ConfigError(
                f"--adapter {where} changes {name[:100]}, and moetool does not know whether a"
                f" {str(config.get('model_type'))[:60]} has one tensor for embeddings and output head; merge it with"
                " peft, into a base in which they are two"
            )
    for name in sorted(adapter.changed - set(matrices)):
        why = "; give the base model that it was trained on"
        if layout and spec and not spec.fused and ".experts." in name:
            other = "per-expert" if layout == "fused" else "fused"
            why = f", because it stores experts otherwise; run moetool convert --layout {other} on it first"
        raise CheckpointError(f"--adapter {where} changes {name[:100]}, which {readers[0].folder} does not have{why}")
    for name, info in adapter.replaced.items():
        if info.shape != matrices[name].whole:
            raise CheckpointError(
                f"--adapter {where} replaces {name[:100]} with a tensor of shape {list(info.shape)}, but the base has"
                f" {list(matrices[name].whole)}; give the base model that it was trained on, with as many tokens"
            )


def _fills(
    matrices: Mapping[str, Matrix],
    recipe: ConvertRecipe,
    spec: ArchSpec | None,
    adapter: Adapter,
    readers: Sequence[CheckpointReader],
) -> tuple[list[Fill], list[TensorLayout]]:
    dtypes: dict[str, set[str]] = {}
    for name, matrix in matrices.items():
        dtypes.setdefault(matrix.place.tensor, set()).add(_dtype(name, matrix.info.dtype, recipe, spec))
    fills: list[Fill] = []
    layouts: dict[str, TensorLayout] = {}
    for name in sorted(matrices, key=lambda name: natural(matrices[name].place.tensor)):
        matrix = matrices[name]
        together = dtypes[matrix.place.tensor]  # experts that share a tensor have one dtype, which holds them all
        dtype = next(iter(together)) if len(together) == 1 else "F32"
        base = Piece(0, matrix.info)
        if name in adapter.replaced:
            base = Piece(1, replace(adapter.replaced[name], shape=matrix.info.shape))
        fill = Fill("carried", (base,), (matrix.place,), dtype, matrix.info.shape)
        if name in adapter.deltas:
            delta, reader = adapter.deltas[name], readers[1]
            assert isinstance(reader, AdapterReader)
            kind, pieces = adapted(name, matrix.info, delta, reader)
            fill = replace(fill, kind=kind, sources=(base, *pieces), value=delta.scaling)
        fills.append(fill)
        layouts.setdefault(matrix.place.tensor, TensorLayout(matrix.place.tensor, dtype, matrix.whole))
    return fills, list(layouts.values())


def _dtype(name: str, dtype: str, recipe: ConvertRecipe, spec: ArchSpec | None) -> str:
    floating = dtype in FLOAT_DTYPES or dtype == "F64"
    fixed = spec is not None and spec.router_dtype and re.fullmatch(spec.router.replace("{layer}", r"\d+"), name)
    return dtype if recipe.dtype == "auto" or not floating or fixed or _KEPT_DTYPE.search(name) else recipe.dtype


def replan(readers: Sequence[CheckpointReader], entry: Mapping[str, Any], max_shard_size: int) -> Plan:
    """The plan that a lineage entry records.

    Raises:
        CheckpointError: the entry is damaged, or see `plan_conversion`.
        ConfigError: see `plan_conversion`.
    """
    recipe = ConvertRecipe.from_json(entry.get("recipe", {}))
    if len(readers) != 1 + recipe.adapter:
        raise CheckpointError(f"moetool.json records {1 + recipe.adapter} sources but names {len(readers)}")
    return plan_conversion(readers, recipe, max_shard_size).plan


OPERATION = Operation("converted", replan)
