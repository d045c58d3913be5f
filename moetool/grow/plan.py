"""A model with more experts as a plan: checks everything, writes nothing.

Shapes: E experts before, N after, m = N / E where each is copied alike, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from moetool.arch.moe_source import MoESource
from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.reader import CheckpointReader
from moetool.checkpoint.step_folder import TrainingReader, state_document
from moetool.errors import CheckpointError, ConfigError
from moetool.grow.recipe import MOST, RATE, GrowRecipe
from moetool.grow.state import grown_state
from moetool.lineage import LINEAGE, read_experts, recorded_experts
from moetool.surgery.experts import config_with, copies, open_moe, row_fills, with_experts
from moetool.surgery.fill import Fill
from moetool.surgery.kinds import KINDS, Block, Kind
from moetool.surgery.plan import Operation, Plan, lay_out
from moetool.surgery.rows import read_rows


@dataclass(frozen=True)
class Growth:
    """The result of a recipe for a checkpoint; see `plan_growth`.

    Attributes:
        recipe: with all numbers.
        source: its experts before.
        experts: layer -> the expert before of each expert after.
        used: different experts of the source that a token goes to at least, before and after.
        plan: what is written.
    """

    recipe: GrowRecipe
    source: MoESource
    experts: Mapping[int, Sequence[int]]
    used: tuple[int, int]
    plan: Plan


def settle(source: MoESource, recipe: GrowRecipe) -> GrowRecipe:
    """A recipe with all numbers, checked against the model's experts.

    Raises:
        ConfigError: the family cannot start that way, or the numbers do not fit the source.
        CheckpointError: the source is damaged.
    """
    E, N = source.num_experts, recipe.num_experts
    if N <= E:
        raise ConfigError(f"--num-experts {N}: {source.reader.folder} has {E} experts already; give more")
    if recipe.utility != "none" and N > E * (1 + MOST):
        raise ConfigError(
            f"--num-experts {N}: with --utility {recipe.utility} no expert is copied more than {MOST} times; give at"
            f" most {E * (1 + MOST)}"
        )
    return _settled(recipe, source, source.reader.config)


def plan_growth(
    readers: Sequence[CheckpointReader],
    recipe: GrowRecipe,
    max_shard_size: int,
    experts: Mapping[int, Sequence[int]] | None = None,
    data: Mapping[str, str] | None = None,
) -> Growth:
    """Check a source and a recipe against each other and lay out the result.

    Args:
        readers: the checkpoint.
        recipe: what to change.
        max_shard_size: bytes of tensor data per file.
        experts: layer -> the expert before of each expert after. The first are the old ones, with their numbers. By
            default expert E + j is a copy of expert j mod E.
        data: SHA-256 of the texts that `experts` were chosen on.

    Raises:
        ConfigError: see `settle`.
        CheckpointError: the source is damaged, or `experts` are not of it.
    """
    (reader,) = readers
    source = open_moe(reader, "grown")
    recipe = settle(source, recipe)
    E, N = source.num_experts, recipe.num_experts
    experts = dict(experts or {layer: [expert % E for expert in range(N)] for layer in source.layers})
    if tuple(experts) != source.layers or any(
        len(chosen) != N or list(chosen[:E]) != list(range(E)) for chosen in experts.values()
    ):
        raise CheckpointError(f"{LINEAGE}: the copies of an entry are not of the experts of {reader.folder}")
    biases: dict[str, list[Fill]] = {}
    for layer, chosen in experts.items():
        info, name = source.selection_bias(layer), source.spec.selection_bias
        if info and name:
            biases |= _biases(source, recipe, info, name.format(layer=layer), chosen)
    fills, layouts = with_experts(source, experts, biases)
    state_fills, state = grown_state(source, experts, recipe, partial(_biases, source, recipe))
    assert recipe.top_k is not None
    recorded = asdict(recipe) | ({"data": dict(data)} if data else {}) | {"training_state": bool(state)}
    recorded |= {"experts": recorded_experts(source.layers, list(experts.values()))}
    beside = partial(state_document, reader, tuple(state)) if isinstance(reader, TrainingReader) and state else None
    plan = lay_out(
        "grow", recorded, readers, config_with(reader.config, source, N, recipe.top_k), [*fills, *state_fills], layouts,
        max_shard_size, {**KINDS, "moved": Kind(_moved)}, [str(reader.config.get("model_type"))], continues=1,
        state=state, beside=beside,
    )  # fmt: skip
    used = min(_fewest(chosen, recipe.top_k) for chosen in experts.values())
    return Growth(recipe, source, experts, (source.top_k, used), plan)


def _fewest(chosen: Sequence[int], top_k: int) -> int:
    """Different experts before that a token goes to, where all copies of one are chosen before those of the next."""
    found, left = 0, top_k
    for number in sorted(map(len, copies(chosen).values()), reverse=True):
        found, left = found + 1, left - number
        if left <= 0:
            break
    return found


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
    if recipe.utility != "none" and softmax_and_bias:
        raise ConfigError(
            f"--utility {recipe.utility}: {start} needs as many copies of each expert in this family, because its"
            " scores are a softmax over all of them; leave --utility out, or use twins"
        )
    wanted = K * N // E if recipe.start == "double-k" else K
    if recipe.top_k not in (None, wanted):
        raise ConfigError(f"--top-k {recipe.top_k}: {start} is exact with {wanted} only; leave it out, or use twins")
    recipe = replace(recipe, top_k=wanted)
    if recipe.start == "double-k":
        sigmoid = source.spec.ranked_by == "sigmoid" or config.get("expert_selection_fn") == "sigmoid"
        if sigmoid and config.get("norm_topk_prob") is not True:
            raise ConfigError(
                f"{start}: this {family} does not divide its sigmoid scores by their sum (norm_topk_prob), so twice"
                f" as many experts would double the output; use sleeping or twins"
            )
        return replace(recipe, wake_after=0)
    if any(source.selection_bias(layer) is None for layer in source.layers):
        raise ConfigError(f"{start}: a {family} has no selection bias to keep experts asleep; use double-k or twins")
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
        raise CheckpointError(
            f"{source.reader.folder}: a selection bias holds NaN or infinity; fetch the checkpoint again"
        )
    return int((1 + spread) / RATE) + 2


def _biases(
    source: MoESource, recipe: GrowRecipe, info: TensorInfo, name: str, chosen: Sequence[int]
) -> dict[str, list[Fill]]:
    """The selection bias of a layer by its name in the result, where it changes.

    Copies sleep behind a bias that is lower by `wake_after` steps of `loss-free`. Where scores are a softmax over all
    experts, m copies of each have scores that are m times smaller, and the biases beside them must be, too.

    Args:
        source: of the experts.
        recipe: settled.
        info: the bias before.
        name: of the bias after.
        chosen: the expert before of each expert after.
    """
    smaller = source.spec.ranked_by == "softmax" and recipe.start != "twins"
    if not (smaller or recipe.start == "sleeping"):
        return {}
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
        CheckpointError: the entry is damaged, the source has lost its training state, or see `plan_growth`.
        ConfigError: see `plan_growth`.
    """
    (reader,), recorded = readers, entry.get("recipe", {})
    recipe, data = GrowRecipe.from_json(recorded), recorded.get("data")
    experts = read_experts(recorded.get("experts"), open_moe(reader, "grown").num_experts)
    found = plan_growth(readers, recipe, max_shard_size, experts, data if isinstance(data, dict) else None)
    if found.plan.recipe["training_state"] != recorded.get("training_state"):
        raise CheckpointError(
            f"{reader.folder} has changed its training state since it was grown; copy the step folder again"
        )
    return found.plan


OPERATION = Operation("grown", replan, lambda entry: TrainingReader, one_source=True)
