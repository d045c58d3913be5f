"""An average as a plan: checks everything, writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from moetool.arch.moe_source import expert_part, layers_of
from moetool.arch.spec import detect
from moetool.average.checkpoints import check_one_model
from moetool.average.recipe import AverageRecipe, coefficients
from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.reader import CheckpointReader
from moetool.checkpoint.shard import TensorLayout
from moetool.checkpoint.step_folder import StepReader
from moetool.errors import CheckpointError, ConfigError
from moetool.recipe import PROJECTIONS
from moetool.surgery.fill import Fill, Piece, Place, as_matrix, natural
from moetool.surgery.kinds import KINDS, Block, Kind
from moetool.surgery.plan import Operation, Plan, lay_out
from moetool.values import FLOAT_DTYPES


def plan_average(readers: Sequence[CheckpointReader], recipe: AverageRecipe, max_shard_size: int) -> Plan:
    """Check checkpoints against each other and lay out their mean.

    Args:
        readers: the checkpoints, from the one trained least to the one trained most.
        recipe: their weights.
        max_shard_size: bytes of tensor data per file.

    Raises:
        ConfigError: they are not of one model, or quantised.
        CheckpointError: the fp32 weights of a step folder do not fit its checkpoint.
    """
    if readers[0].config.get("quantization_config"):
        raise ConfigError(f"{readers[0].folder} is quantised; average the checkpoints that it was made from")
    weights = coefficients(recipe.weights, len(readers))
    check_one_model(readers)
    exact = [exact_tensors(reader) for reader in readers]
    tensors = readers[0].tensors
    fills, layouts = [], []
    for name in sorted(tensors, key=natural):
        info = tensors[name]
        averaged = info.dtype in FLOAT_DTYPES or info.dtype == "F64"
        pieces = tuple(Piece(n, as_matrix(of[name])) for n, of in enumerate(exact if averaged else exact[:1]))
        kind = "averaged" if averaged else "carried"
        fills.append(Fill(kind, pieces, (Place(name),), info.dtype, as_matrix(info).shape))
        layouts.append(TensorLayout(name, info.dtype, info.shape))
    return lay_out(
        "average", asdict(recipe), readers, readers[0].config, fills, layouts, max_shard_size,
        {**KINDS, "averaged": Kind(partial(_averaged, weights))},
        model_types=[str(readers[0].config.get("model_type"))] * len(readers), continues=len(readers),
    )  # fmt: skip


def _averaged(weights: Sequence[float], block: Block) -> torch.Tensor:
    """Sum of w x over sum of w in fp64, in the order of the sources, rounded once.

    Products and sums are operations of their own: one that does both rounds differently on some machines.
    """
    total = torch.zeros((block.stop - block.start, block.fill.row_length), dtype=torch.float64)
    for weight, piece in zip(weights, block.fill.sources, strict=True):
        total += block.rows(piece, block.start, block.stop).double().mul_(weight)
    return rounded(total.div_(sum(weights)), block.dtype)


def rounded(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp64 rounded once: torch rounds to fp32 on the way to narrower dtypes, which may move a tie."""
    if dtype in (torch.float64, torch.float32):
        return wide.to(dtype)
    # Rounded to odd (Boldo and Melquiond 2008): what lies between two fp32 numbers becomes the odd one, no tie.
    narrow = wide.float()
    back = narrow.double()
    even = (narrow.view(torch.int32) & 1) == 0
    infinity = torch.tensor(torch.inf)
    other = torch.nextafter(narrow, torch.where(wide > back, infinity, -infinity))
    return torch.where((back != wide) & even, other, narrow).to(dtype)


def exact_tensors(reader: CheckpointReader) -> dict[str, TensorInfo]:
    """The most exact tensors of a checkpoint: the fp32 weights of a step folder, if it has them.

    Raises:
        CheckpointError: one of those has no counterpart in the checkpoint, or another shape.
    """
    masters = reader.masters if isinstance(reader, StepReader) else {}
    found, left = dict(reader.tensors), set(masters)
    for name, (master, info) in _counterparts(reader, masters).items():
        if info.shape != found[name].shape:
            raise CheckpointError(
                f"{reader.folder}: {name[:100]} has shape {list(found[name].shape)}, its fp32 weights"
                f" {list(info.shape)}; copy the step folder again"
            )
        found[name] = info
        left.discard(master)
    if left:
        raise CheckpointError(
            f"{reader.folder} has fp32 weights of {min(left)[:100]}, which its checkpoint does not hold under a known"
            f" name; move its training_state away to average the rounded weights"
        )
    return found


def _counterparts(reader: CheckpointReader, masters: Mapping[str, TensorInfo]) -> dict[str, tuple[str, TensorInfo]]:
    """Tensors of a checkpoint -> the model's parameter with their fp32 weights, and where in it they lie."""
    found = {name: (name, masters[name]) for name in reader.tensors if name in masters}
    spec = detect(reader.config)
    if spec is None:
        return found
    memory = spec.in_memory
    same = [(spec.router, memory.router), (spec.selection_bias or "", memory.selection_bias or "")]
    same += [(spec.experts[p], memory.experts[p]) for p in PROJECTIONS] if spec.fused else []
    for layer in layers_of(masters):
        for own, parameter in ((own.format(layer=layer), name.format(layer=layer)) for own, name in same):
            if own in reader.tensors and parameter in masters:
                found[own] = parameter, masters[parameter]
        for projection in () if spec.fused else PROJECTIONS:
            parameter = memory.experts[projection].format(layer=layer)
            num_experts = masters[parameter].shape[0] if parameter in masters else 0
            for expert in range(num_experts):
                own = spec.experts[projection].format(layer=layer, expert=expert)
                if own in reader.tensors:
                    part = expert_part(masters[parameter], memory.experts, projection, expert, num_experts)
                    found[own] = parameter, part
    return found


def replan(readers: Sequence[CheckpointReader], entry: Mapping[str, Any], max_shard_size: int) -> Plan:
    """The plan that a lineage entry records.

    Raises:
        CheckpointError: the entry is damaged, or see `plan_average`.
        ConfigError: see `plan_average`.
    """
    return plan_average(readers, AverageRecipe.from_json(entry.get("recipe", {})), max_shard_size)


OPERATION = Operation("averaged", replan, lambda entry: StepReader)
