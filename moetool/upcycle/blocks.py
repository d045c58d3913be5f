"""The kinds of content that only upcycling has: experts, the shared expert, routers, weights from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial

import torch

from moetool import registry
from moetool.measured import Measured
from moetool.recipe import UpcycleRecipe, generator
from moetool.surgery.fill import Fill, Piece, Place
from moetool.surgery.kinds import KINDS, Block, Drawn, Kind, constant
from moetool.surgery.moments import Sums
from moetool.surgery.rows import gather_rows, replace, select
from moetool.units import held_units, permutation, redrawn_units
from moetool.upcycle.init import Slice, slice_moments


def kinds(recipe: UpcycleRecipe, measured: Measured) -> Mapping[str, Kind]:
    """How a recipe, and the decisions of a pass over text, make each kind of fill."""
    return {
        **KINDS,
        "expert": Kind(
            partial(_expert, recipe, measured),
            partial(_draw_expert, recipe, measured),
            partial(_redrawn, recipe, measured),
        ),
        "exp_avg": Kind(partial(_mean_gradient, recipe, measured)),
        "exp_avg_sq": Kind(
            partial(_expert, recipe, measured),
            partial(_draw_square, recipe, measured),
            partial(_new_units, recipe, measured),
        ),
        "weighted": Kind(partial(_weighted, recipe)),
        "shared": Kind(partial(_shared, recipe, measured)),
        "router": Kind(partial(_router, recipe, measured)),
        "selection bias": Kind(partial(_selection_bias, recipe, measured)),
        "normal": Kind(_zeros, partial(_draw_all, recipe), _all),
    }


def _weighted(recipe: UpcycleRecipe, block: Block) -> torch.Tensor:
    """A tensor outside the experts: the mean of the dense ones by their weights, rounded once."""
    rows = [block.rows(piece, block.start, block.stop) for piece in block.fill.sources]
    return _mean(recipe, block, rows).to(block.dtype)


def _shared(recipe: UpcycleRecipe, measured: Measured, block: Block) -> torch.Tensor:
    """The shared expert's matrix: the mean of the dense ones in fp32, times the planned factor, rounded once."""
    fill = block.fill
    size = fill.sources[0].info.shape[fill.axis] // recipe.granularity
    held = held_units(recipe, measured, _layer(fill), None, size)
    whole = [_units(block, piece, 0, held) for piece in fill.sources]
    if len(whole) == 1:
        return _scaled(block, whole[0])
    equal = not recipe.donor_weights
    mean = torch.stack([units.float() for units in whole]).mean(0) if equal else _mean(recipe, block, whole)
    return _scaled(block, mean)


def _mean(recipe: UpcycleRecipe, block: Block, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of share x rows in fp32, in the order of the sources.

    Products and sums are operations of their own: one that does both rounds differently on some machines.
    """
    total = torch.zeros(rows[0].shape, dtype=torch.float32)
    for piece, one in zip(block.fill.sources, rows, strict=True):
        total += one.float() * float(recipe.trunk_shares[piece.source])
    return total


def _expert(recipe: UpcycleRecipe, measured: Measured, block: Block) -> torch.Tensor:
    """An expert's matrix before a method changes units: its donor's, times the planned factor, rounded once."""
    fill, expert = block.fill, block.place.expert
    units = fill.shape[fill.axis]
    donor, first = recipe.donor(expert), recipe.first_unit(expert, units)
    order = permutation(recipe, _layer(fill), expert, units)
    held = _dense_units(recipe, measured, fill, expert, order)

    def made() -> torch.Tensor:
        return _scaled(block, _units(block, fill.sources[donor], first, held))

    return block.cache.get("made", (donor, first), made) if order is None else made()


def _dense_units(
    recipe: UpcycleRecipe, measured: Measured, fill: Fill, expert: int, order: torch.Tensor | None
) -> torch.Tensor | None:
    """The dense unit at each position of an expert's matrix; None where they are neighbours from its first one on."""
    size = fill.shape[fill.axis]
    held = held_units(recipe, measured, _layer(fill), expert, size)
    if order is None:
        return held
    return recipe.first_unit(expert, size) + order if held is None else held[order]


def _scaled(block: Block, rows: torch.Tensor) -> torch.Tensor:
    factor = block.fill.factor
    return rows.to(block.dtype) if factor == 1 else (rows.float() * factor).to(block.dtype)


def _units(block: Block, piece: Piece, first: int, held: torch.Tensor | None) -> torch.Tensor:
    """A block's rows of a dense FFN matrix with the units `held`, or else with those from `first` on.

    Units past the dense FFN's last begin again at 0: a shared expert may hold copies of all of it.
    """
    fill, start, stop = block.fill, block.start, block.stop
    whole, units = piece.info.shape[fill.axis], fill.shape[fill.axis]
    if fill.axis == 1:
        rows = block.rows(piece, start, stop)
        if held is not None:
            return select(rows, 1, held)
        return rows.repeat(1, units // whole) if units > whole else rows.narrow(1, first, units)
    if held is None and first + stop <= whole:
        return block.rows(piece, first + start, first + stop)
    wanted = (first + torch.arange(start, stop)) % whole if held is None else held[start:stop]
    return gather_rows(block.readers[piece.source], piece.info, wanted)


def _redrawn(recipe: UpcycleRecipe, measured: Measured, fill: Fill, place: Place) -> Drawn | None:
    """The units of an expert's matrix that its method changes, with the moments that the proof expects."""
    size = fill.shape[fill.axis]
    if not recipe.num_redrawn(size, _layer(fill), place.expert):
        return None
    units = redrawn_units(recipe, _layer(fill), place.expert, _projection(fill), size, measured)
    if recipe.method == "noise":
        return Drawn(units, partial(_noise, recipe), added=True, whole=True)
    return Drawn(units, _replaced)


def _replaced(old: Sums, whole: Sums) -> tuple[float, float]:
    return old.mean, old.std


def _noise(recipe: UpcycleRecipe, old: Sums, whole: Sums) -> tuple[float, float]:
    return 0.0, float(recipe.noise_scale) * whole.std if recipe.noise_std is None else float(recipe.noise_std)


def _draw_expert(recipe: UpcycleRecipe, measured: Measured, block: Block, kept: torch.Tensor) -> torch.Tensor:
    drawn = _redrawn(recipe, measured, block.fill, block.place)
    if drawn is None:
        return _apply(recipe, block, kept, torch.empty(0, dtype=torch.int64), "values", (0.0, 0.0))
    return _apply(recipe, block, kept, drawn.units, "values", _moments(recipe, measured, block, drawn.units))


def _moments(recipe: UpcycleRecipe, measured: Measured, block: Block, units: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of what is drawn for one matrix of one expert, from the sums of its donor's units."""
    fill, expert = block.fill, block.place.expert
    if recipe.noise_std is not None:
        return 0.0, float(recipe.noise_std)
    size = fill.shape[fill.axis]
    if recipe.method == "noise":
        units, order = torch.arange(size), None  # relative to the whole matrix
    else:
        order = permutation(recipe, _layer(fill), expert, size)
    held = _dense_units(recipe, measured, fill, expert, order)
    dense = recipe.first_unit(expert, size) + units if held is None else held[units]
    width = fill.num_elements // size
    sums = block.sums[fill.sources[recipe.donor(expert)]]
    mean, std = slice_moments(*sums, dense, width)
    if recipe.method == "noise":
        return 0.0, float(recipe.noise_scale) * std * fill.factor
    return mean * fill.factor, std * fill.factor


def _mean_gradient(recipe: UpcycleRecipe, measured: Measured, block: Block) -> torch.Tensor:
    """An expert's share of the mean gradient; 0 for its new units, whose gradients nobody has seen."""
    kept, drawn = _expert(recipe, measured, block), _new_units(recipe, measured, block.fill, block.place)
    if drawn is None:
        return kept
    units, axis = _within(block, drawn.units), block.fill.axis
    return replace(kept, axis, units, torch.zeros_like(select(kept, axis, units)))


def _new_units(recipe: UpcycleRecipe, measured: Measured, fill: Fill, place: Place) -> Drawn | None:
    """The units of an expert that are new to its optimizer: those that are redrawn. Noise leaves a unit what it was."""
    drawn = _redrawn(recipe, measured, fill, place)
    return None if drawn is None or drawn.added else Drawn(drawn.units, _mean_of_kept, whole=True)


def _mean_of_kept(old: Sums, whole: Sums) -> tuple[float, float]:
    left = whole.n - old.n
    return ((whole.mean * whole.n - old.mean * old.n) / left if left else whole.mean), 0.0


def _draw_square(recipe: UpcycleRecipe, measured: Measured, block: Block, kept: torch.Tensor) -> torch.Tensor:
    """An expert's share of the mean squared gradient; that of the matrix's kept units (all, if none is) for new ones.

    With 0, the first update of such a weight would be too large at a beta2 above 0.99.
    """
    drawn, axis = _new_units(recipe, measured, block.fill, block.place), block.fill.axis
    if drawn is None:
        return kept
    others = torch.ones(block.fill.shape[axis], dtype=torch.bool)
    others[drawn.units] = len(drawn.units) == len(others)
    mean, _ = _moments(recipe, measured, block, others.nonzero().flatten())
    units = _within(block, drawn.units)
    return replace(kept, axis, units, torch.full_like(select(kept, axis, units), mean))


def _zeros(block: Block) -> torch.Tensor:
    return torch.zeros((block.stop - block.start, block.fill.row_length), dtype=block.dtype)


def _all(fill: Fill, place: Place) -> Drawn:
    """Every unit of a matrix that begins from scratch, except for the row that stays zero."""
    units = torch.arange(fill.shape[fill.axis])
    return Drawn(units[units != fill.zero_row] if fill.zero_row is not None else units, partial(_initial, fill.value))


def _initial(std: float, old: Sums, whole: Sums) -> tuple[float, float]:
    return 0.0, std


def _draw_all(recipe: UpcycleRecipe, block: Block, kept: torch.Tensor) -> torch.Tensor:
    return _apply(recipe, block, kept, _all(block.fill, block.place).units, "scratch", (0.0, block.fill.value))


def _apply(
    recipe: UpcycleRecipe,
    block: Block,
    kept: torch.Tensor,
    units: torch.Tensor,
    stream: str,
    moments: tuple[float, float],
) -> torch.Tensor:
    """A block after the recipe's method has changed its units."""
    fill, place = block.fill, block.place
    units = _within(block, units)
    draws = generator(recipe.seed, stream, place.draw + block.index)
    block_of_units = Slice(kept, units, fill.axis, moments, draws, fill.layer, place.expert, fill.projection)
    return registry.load("method", recipe.method)(block_of_units)  # type: ignore[no-any-return]


def _within(block: Block, units: torch.Tensor) -> torch.Tensor:
    """The positions of some units in a block."""
    if block.fill.axis == 1:
        return units
    return units[(units >= block.start) & (units < block.stop)] - block.start


def _router(recipe: UpcycleRecipe, measured: Measured, block: Block) -> torch.Tensor:
    return router_rows(recipe, measured, block.fill)[block.start : block.stop].to(block.dtype)


@lru_cache(maxsize=2)  # the blocks of a large router come one after another, and orthogonal rows are slow
def router_rows(recipe: UpcycleRecipe, measured: Measured, fill: Fill) -> torch.Tensor:
    """A layer's router, fp32 (E, D); its draw depends on the seed and the layer, not on the method.

    The experts of a group have the same row, so that they are chosen together and weigh the same
    (virtual groups: He et al. 2024, arXiv 2410.07524, section 3.2).
    """
    experts, hidden = fill.shape
    rows = drawn_rows(recipe, (experts, hidden), fill.layer or 0)
    fitted = measured.routers.get(fill.layer or 0)
    if fitted:
        rows = fitted.rows(rows)
    return rows.repeat_interleave(recipe.group_size, dim=0)


def drawn_rows(recipe: UpcycleRecipe, shape: tuple[int, int], layer: int) -> torch.Tensor:
    """Random rows of a layer's router, fp32 (groups of experts, D), from the shape (E, D) of the router."""
    draw = registry.load("router", recipe.router)
    groups = shape[0] // recipe.group_size
    std = float(recipe.router_std)
    return draw((groups, shape[1]), std, generator(recipe.seed, "router", layer))  # type: ignore[no-any-return]


def _selection_bias(recipe: UpcycleRecipe, measured: Measured, block: Block) -> torch.Tensor:
    """0, or what balances a fitted router; the experts of a group have the same."""
    fitted = measured.routers.get(_layer(block.fill))
    if fitted is None or fitted.bias_G is None:
        return constant(block)
    whole = fitted.bias_G.repeat_interleave(recipe.group_size).reshape(block.fill.shape)
    return whole[block.start : block.stop].reshape(block.stop - block.start, -1).to(block.dtype)


def _layer(fill: Fill) -> int:
    assert fill.layer is not None
    return fill.layer


def _projection(fill: Fill) -> str:
    assert fill.projection is not None
    return fill.projection
