"""Blocks of the result: what is kept of the source, and what a method makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from moetool import registry
from moetool.checkpoint.reader import CheckpointReader
from moetool.recipe import UpcycleRecipe, generator, matrix_index, permutation, redrawn_units
from moetool.upcycle.init import slice_moments
from moetool.upcycle.layout import Fill
from moetool.upcycle.plan import Plan
from moetool.upcycle.source import TORCH_DTYPES, Source, gather_rows, read_rows

# Rows of a source's tensor, and blocks made of them, while one block of a fill is written: the experts
# of a layer share them. (donor, ...) -> tensor.
Cache = dict[tuple[object, ...], torch.Tensor]


def kept_block(
    plan: Plan,
    readers: Sequence[CheckpointReader],
    fill: Fill,
    number: int,
    start: int,
    stop: int,
    cache: Cache | None = None,
) -> torch.Tensor:
    """Rows [start, stop) of one place as they are before a method changes units, in the target's dtype.

    The source times the planned factor, rounded once; of several donors, the mean in fp32. A router's
    drawn rows; a constant.

    Args:
        plan: the plan.
        readers: the donors.
        fill: what is written; not `normal`.
        number: of the place, which is the expert.
        start: first row.
        stop: one past the last.
        cache: of this block of this fill.
    """
    cache = {} if cache is None else cache
    dtype = TORCH_DTYPES[fill.dtype]
    if fill.kind == "constant":
        return torch.full((stop - start, fill.row_length), fill.value, dtype=dtype)
    if fill.kind == "router":
        return router_rows(plan.recipe, fill)[start:stop].to(dtype)
    if fill.kind == "carried":
        return _mean(readers, fill, start, stop, cache).to(dtype)
    if fill.kind == "shared":
        return _scaled(_units(plan, readers, fill, None, 0, None, start, stop, cache), plan.factor(fill), dtype)
    assert fill.layer is not None
    donor, first = plan.donor(number), plan.first_unit(number)
    order = permutation(plan.recipe, fill.layer, number, plan.num_units)
    key = ("made", donor, first)
    if order is None and key in cache:
        return cache[key]
    made = _scaled(_units(plan, readers, fill, donor, first, order, start, stop, cache), plan.factor(fill), dtype)
    if order is None:
        cache[key] = made
    return made


def _scaled(block: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    return block.to(dtype) if factor == 1 else (block.float() * factor).to(dtype)


def _mean(readers: Sequence[CheckpointReader], fill: Fill, start: int, stop: int, cache: Cache) -> torch.Tensor:
    """Rows of a source's tensor: its own where there is one donor, else the mean in fp32."""
    rows = [_rows(readers, fill, donor, start, stop, cache) for donor in range(len(readers))]
    if len(rows) == 1:
        return rows[0]
    total = rows[0].float().clone()
    for other in rows[1:]:
        total += other.float()
    return total / len(rows)


def _rows(
    readers: Sequence[CheckpointReader], fill: Fill, donor: int, start: int, stop: int, cache: Cache
) -> torch.Tensor:
    key = (donor, start, stop)
    if key not in cache:
        cache[key] = read_rows(readers[donor], fill.sources[donor], start, stop)
    return cache[key]


def _units(
    plan: Plan,
    readers: Sequence[CheckpointReader],
    fill: Fill,
    donor: int | None,
    first: int,
    order: torch.Tensor | None,
    start: int,
    stop: int,
    cache: Cache,
) -> torch.Tensor:
    """Rows [start, stop) of an FFN matrix whose units are `order` (all, in order) counted from `first`.

    Units past the dense FFN's last begin again at 0: a shared expert may hold copies of all of it.
    Without a donor, the mean of all of them.
    """
    whole = plan.intermediate_size
    donors = range(len(readers)) if donor is None else [donor]
    blocks = []
    for d in donors:
        if fill.projection == "down":
            rows = _rows(readers, fill, d, start, stop, cache)
            if order is not None:
                rows = rows.index_select(1, first + order)
            elif fill.shape[1] > whole:
                rows = rows.repeat(1, fill.shape[1] // whole)
            elif fill.shape[1] < whole:
                rows = rows.narrow(1, first, fill.shape[1])
        elif order is not None:
            rows = gather_rows(readers[d], fill.sources[d], first + order[start:stop])
        elif first + stop <= whole:
            rows = _rows(readers, fill, d, first + start, first + stop, cache)
        else:
            rows = gather_rows(readers[d], fill.sources[d], (first + torch.arange(start, stop)) % whole)
        blocks.append(rows)
    if len(blocks) == 1:
        return blocks[0]
    return torch.stack([block.float() for block in blocks]).mean(0)


def expert_moments(plan: Plan, source: Source, fill: Fill, expert: int) -> tuple[float, float]:
    """Mean and standard deviation of what a method draws for one matrix of one expert."""
    assert fill.layer is not None
    assert fill.projection is not None
    recipe, size, factor = plan.recipe, plan.num_units, plan.factor(fill)
    if not plan.num_redrawn:
        return 0.0, 0.0
    if recipe.method == "noise" and recipe.noise_std is not None:
        return 0.0, float(recipe.noise_std)
    if recipe.method == "noise":
        units = torch.arange(size)  # relative to the whole matrix
    else:
        units = redrawn_units(recipe, fill.layer, expert, fill.projection, size)
        order = permutation(recipe, fill.layer, expert, size)
        units = units if order is None else order[units]
    key = (plan.donor(expert), fill.layer, fill.projection)
    width = fill.shape[0] if fill.projection == "down" else fill.row_length
    mean, std = slice_moments(source.sums[key], source.squares[key], plan.first_unit(expert) + units, width)
    if recipe.method == "noise":
        return 0.0, float(recipe.noise_scale) * std * factor
    return mean * factor, std * factor


def expert_block(plan: Plan, source: Source, fill: Fill, expert: int, index: int, kept: torch.Tensor) -> torch.Tensor:
    """One block of one expert's matrix, given what is kept of the source in the same rows."""
    assert fill.layer is not None
    assert fill.projection is not None
    start, stop = fill.blocks[index]
    units = redrawn_units(plan.recipe, fill.layer, expert, fill.projection, plan.num_units)
    axis = 1 if fill.projection == "down" else 0
    if axis == 0:
        units = units[(units >= start) & (units < stop)] - start
    place = matrix_index(plan.recipe, fill.layer, expert, fill.projection) * plan.draws_per_matrix + index
    draws = generator(plan.recipe.seed, "values", place)
    method = registry.load("method", plan.recipe.method)
    return method(kept, units, axis, expert_moments(plan, source, fill, expert), draws)  # type: ignore[no-any-return]


def normal_block(plan: Plan, fill: Fill, start: int, stop: int, draw: int) -> torch.Tensor:
    """One block of a tensor that is drawn from scratch; `draw` numbers the blocks of the whole result."""
    block = torch.empty((stop - start, fill.row_length), dtype=torch.float32)
    block.normal_(0.0, fill.value, generator=generator(plan.recipe.seed, "scratch", draw))
    if fill.zero_row is not None and start <= fill.zero_row < stop:
        block[fill.zero_row - start] = 0
    return block.to(TORCH_DTYPES[fill.dtype])


@lru_cache(maxsize=2)  # the blocks of a large router come one after another, and orthogonal rows are slow
def router_rows(recipe: UpcycleRecipe, fill: Fill) -> torch.Tensor:
    """A layer's router, fp32 (E, D); its draw depends on the seed and the layer, not on the method.

    The experts of a group have the same row, so that they are chosen together and weigh the same
    (virtual groups: He et al. 2024, arXiv 2410.07524, section 3.2).
    """
    draw = registry.load("router", recipe.router)
    experts, hidden = fill.shape
    rows = draw(
        (experts // recipe.group_size, hidden),
        float(recipe.router_std),
        generator(recipe.seed, "router", fill.layer or 0),
    )
    return rows.repeat_interleave(recipe.group_size, dim=0)  # type: ignore[no-any-return]
