"""A model with fewer experts as a plan: checks everything, writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from moetool.arch.moe_source import MoESource
from moetool.checkpoint.reader import CheckpointReader
from moetool.errors import CheckpointError, ConfigError
from moetool.lineage import read_experts, recorded_experts
from moetool.prune.align import Order, unit_orders
from moetool.prune.blend import blends, digests, merged_fill, weighted_mean
from moetool.prune.group import Group, read_groups, recorded_groups
from moetool.surgery.experts import config_with, open_moe, with_experts
from moetool.surgery.kinds import KINDS, Kind
from moetool.surgery.plan import Operation, Plan, lay_out


def check_numbers(source: MoESource, keep: int) -> int:
    """How many groups of experts there are, of which each keeps the same number.

    Args:
        source: the experts.
        keep: experts per layer that are kept.

    Raises:
        ConfigError: they are too few, or all, or cannot be shared out over the groups.
    """
    folder, E, K = source.reader.folder, source.num_experts, source.top_k
    if keep >= E:
        raise ConfigError(f"--keep-experts {keep}: {folder} has {E} experts; keep fewer")
    if keep < K:
        raise ConfigError(f"--keep-experts {keep}: every token goes to {K} experts; keep at least that many")
    groups, chosen = (source.reader.config.get(key) for key in ("n_group", "topk_group"))
    groups = groups if type(groups) is int and groups > 1 else 1
    if E % groups or keep % groups:
        raise ConfigError(
            f"--keep-experts {keep}: experts are chosen within {groups} groups; keep a multiple of {groups}"
        )
    if groups > 1 and (keep // groups < 2 or (type(chosen) is int and chosen * (keep // groups) < K)):
        raise ConfigError(
            f"--keep-experts {keep}: the {chosen} groups that a token goes to would have {keep // groups} experts each,"
            f" too few for {K}; keep more"
        )
    return groups


def plan_pruning(
    readers: Sequence[CheckpointReader],
    recipe: Mapping[str, Any],
    kept: Mapping[int, Sequence[int]],
    max_shard_size: int,
    groups: Mapping[int, Sequence[Group]] | None = None,
    order: Order | None = None,
) -> Plan:
    """Lay out a checkpoint with some of its experts.

    Args:
        readers: the checkpoint.
        recipe: of the command, as JSON.
        kept: layer -> experts, ascending; all layers keep as many.
        max_shard_size: bytes of tensor data per file.
        groups: layer -> experts that become one; None where none are merged.
        order: of the experts' units, of this checkpoint; None: found anew.

    Raises:
        ConfigError: see `open_moe` and `check_numbers`.
        CheckpointError: the source is damaged, or `kept` is not of it.
    """
    (reader,) = readers
    source = open_moe(reader, "pruned")
    numbers = {len(set(experts)) for experts in kept.values()} | {len(experts) for experts in kept.values()}
    if tuple(kept) != source.layers or len(numbers) != 1:
        raise CheckpointError(f"the experts to keep are not those of the layers of {reader.folder}")
    (keep,) = numbers
    check_numbers(source, keep)
    fills, layouts = with_experts(source, kept)
    recipe = {**recipe, "experts": recorded_experts(source.layers, list(kept.values()))}
    kinds: Mapping[str, Kind] = KINDS
    recorded: Callable[[], dict[str, Any]] = dict
    if groups is not None:
        recipe["merged"] = recorded_groups(groups)
        merged = blends(groups, kept, order or unit_orders(source))
        fills = [merged_fill(fill, merged, source) for fill in fills]
        kinds, recorded = {**KINDS, "merged": Kind(partial(weighted_mean, merged))}, partial(digests, groups, merged)
    return lay_out(
        "prune", recipe, readers, config_with(reader.config, source, keep, source.top_k), fills, layouts,
        max_shard_size, kinds, [str(reader.config.get("model_type"))], continues=1, recorded=recorded,
    )  # fmt: skip


def replan(readers: Sequence[CheckpointReader], entry: Mapping[str, Any], max_shard_size: int) -> Plan:
    """The plan that a lineage entry records.

    Raises:
        CheckpointError: the entry is damaged, or see `plan_pruning`.
        ConfigError: see `plan_pruning`.
    """
    found = entry.get("recipe", {})
    recipe = {key: value for key, value in found.items() if key not in ("experts", "merged")}
    num_experts = open_moe(readers[0], "pruned").num_experts
    kept = read_experts(found.get("experts"), num_experts)
    groups = read_groups(found["merged"], kept, num_experts) if "merged" in found else None
    return plan_pruning(readers, recipe, kept, max_shard_size, groups)


OPERATION = Operation("pruned", replan, one_source=True)
