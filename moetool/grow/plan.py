"""A model with more experts as a plan: checks everything, writes nothing.

Shapes: E experts before, N after, m = N / E where each is copied alike, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moetool.arch.moe_source import MoESource
from moetool.checkpoint.reader import CheckpointReader
from moetool.errors import CheckpointError, ConfigError
from moetool.grow.recipe import RATE, GrowRecipe
from moetool.recipe import recorded_experts
from moetool.surgery.experts import config_with, copies, open_moe, row_fills, with_experts
from moetool.surgery.fill import Fill
from moetool.surgery.kinds import KINDS, Block, Kind
from moetool.surgery.plan import Operation, Plan, lay_out
from moetool.surgery.rows import read_rows


@dataclass(frozen=True)
class Growth:
    """What a recipe makes of a checkpoint; see `plan_growth`.

    Attributes:
        recipe: with all numbers.
        source: its experts before.
        used: different experts of the source that a token goes to at most, before and after.
        plan: what is written.
    """

    recipe: GrowRecipe
    source: MoESource
    used: tuple[int, int]
    plan: Plan


def plan_growth(readers: Sequence[CheckpointReader], recipe: GrowRecipe, max_shard_size: int) -> Growth:
    """Check a source and a recipe against each other and lay out the result.

    The experts keep their numbers; expert E + j is a copy of expert j mod E.

    Args:
        readers: the checkpoint.
        recipe: what to change.
        max_shard_size: bytes of tensor data per file.

    Raises:
        ConfigError: the family cannot start that way, or the numbers do not fit the source.
        CheckpointError: the source is damaged.
    """
    (reader,) = readers
    source = open_moe(reader, "grown")
    E, N = source.num_experts, recipe.num_experts
    if N <= E:
        raise ConfigError(f"--num-experts {N}: {reader.folder} has {E} experts already; give more")
    recipe = _settled(recipe, source, reader.config)
    chosen = [expert % E for expert in range(N)]
    biases: dict[str, list[Fill]] = {}
    for layer in source.layers:
        biases |= _biases(source, layer, chosen, recipe)
    fills, layouts = with_experts(source, dict.fromkeys(source.layers, chosen), biases)
    assert recipe.top_k is not None
    plan = lay_out(
        "grow", asdict(recipe) | {"experts": recorded_experts(source.layers, [chosen] * len(source.layers))}, readers,
        config_with(reader.config, source, N, recipe.top_k), fills, layouts, max_shard_size,
        {**KINDS, "moved": Kind(_moved)}, [str(reader.config.get("model_type"))], continues=1,
    )  # fmt: skip
    most = max(map(len, copies(chosen).values()))
    return Growth(recipe, source, (source.top_k, math.ceil(recipe.top_k / most)), plan)


def _settled(recipe: GrowRecipe, source: MoESource, config: Mapping[str, Any]) -> GrowRecipe:
    """The recipe with all numbers, once the source can be grown that way."""
    E, K, N = source.num_experts, source.top_k, recipe.num_experts
    family, start = source.spec.model_type, f"--start {recipe.start}"
    groups = [config.get(key) for key in ("n_group", "topk_group")]
    if type(groups[0]) is int and groups[0] > 1:
        raise ConfigError(
            f"this {family} chooses experts within {groups[0]} groups (n_group), which copies would change; moetool"
            " cannot grow it"
        )
    if recipe.start == "twins":
        return replace(recipe, top_k=recipe.top_k or K, wake_after=0)
    softmax_and_bias = source.spec.ranked_by == "softmax" and source.selection_bias(source.layers[0]) is not None
    if N % E and (recipe.start == "double-k" or softmax_and_bias):
        raise ConfigError(f"--num-experts {N}: {start} needs a multiple of the model's {E} experts in this family")
    wanted = K * N // E if recipe.start == "double-k" else K
    if recipe.top_k not in (None, wanted):
        raise ConfigError(f"--top-k {recipe.top_k}: {start} is exact with {wanted} only; leave it out, or use twins")
    recipe = replace(recipe, top_k=wanted)
    if recipe.start == "double-k":
        sigmoid = source.spec.ranked_by == "sigmoid" or config.get("expert_selection_fn") == "sigmoid"
        if sigmoid and config.get("norm_topk_prob") is not True:
            raise ConfigError(
                f"{start}: this {family} does not divide its sigmoid scores by their sum (norm_topk_prob), so twice as"
                " many experts would give twice as much; use sleeping or twins"
            )
        return replace(recipe, wake_after=0)
    if any(source.selection_bias(layer) is None for layer in source.layers):
        raise ConfigError(
            f"{start}: a {family} has no selection bias behind which experts could sleep; use double-k or twins"
        )
    least = _least_steps(source)
    if recipe.wake_after is not None and recipe.wake_after < least:
        raise ConfigError(
            f"--wake-after {recipe.wake_after}: a copy could be chosen at once, because scores and biases differ by up"
            f" to {least * RATE:.3f}; give at least {least}"
        )
    return replace(recipe, wake_after=recipe.wake_after or least)


def _least_steps(source: MoESource) -> int:
    """Steps of the bias that are more than scores (between 0 and 1) and biases of a layer can make up for."""
    spread = 0.0
    for layer in source.layers:
        info = source.selection_bias(layer)
        assert info
        bias_E = read_rows(source.reader, replace(info, shape=(source.num_experts,)), 0, source.num_experts).double()
        spread = max(spread, float(bias_E.max() - bias_E.min()))
    if not math.isfinite(spread):
        raise CheckpointError(f"{source.reader.folder}: a selection bias holds NaN or infinity; fetch it again")
    return int((1 + spread) / RATE) + 2


def _biases(source: MoESource, layer: int, chosen: Sequence[int], recipe: GrowRecipe) -> dict[str, list[Fill]]:
    """The selection bias of a layer where it changes.

    Copies sleep behind a bias that is lower by `wake_after` steps of `loss-free`. Where scores are a softmax over all
    experts, m copies of each have scores that are m times smaller, and the biases beside them must be, too.
    """
    info = source.selection_bias(layer)
    smaller = source.spec.ranked_by == "softmax" and recipe.start != "twins"
    if info is None or not (smaller or recipe.start == "sleeping"):
        return {}
    assert source.spec.selection_bias
    name = source.spec.selection_bias.format(layer=layer)
    E, factor = source.num_experts, source.num_experts / recipe.num_experts if smaller else 1.0
    asleep = recipe.start == "sleeping"
    fills: list[Fill] = []
    for copied in (False, True):
        rows = {
            before: [after for after in those if (after >= E) == copied] for before, those in copies(chosen).items()
        }
        rows = {before: those for before, those in rows.items() if those}
        value = -(recipe.wake_after or 0) * RATE if copied and asleep else 0.0
        # In bf16, steps of this size would be lost.
        fills += row_fills(info, name, rows, kind="moved", dtype="F32", factor=factor, value=value)
    return {name: fills}


def _moved(block: Block) -> torch.Tensor:
    """Rows times the fill's factor plus its value, in fp64, rounded once."""
    rows = block.rows(block.fill.sources[0], block.start, block.stop).double()
    return (rows * block.fill.factor + block.fill.value).to(block.dtype)


def replan(readers: Sequence[CheckpointReader], entry: Mapping[str, Any], max_shard_size: int) -> Plan:
    """The plan that a lineage entry records.

    Raises:
        CheckpointError: the entry is damaged, or see `plan_growth`.
        ConfigError: see `plan_growth`.
    """
    return plan_growth(readers, GrowRecipe.from_json(entry.get("recipe", {})), max_shard_size).plan


OPERATION = Operation("grown", replan, one_source=True)
