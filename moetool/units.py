"""Units of a dense FFN: how their contributions are recorded, how they are split, and which are redrawn.

Integers alone decide what is rebuilt from a recipe, so that every machine has the same sets.

Shapes: F units, G parts.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import torch

from moetool.errors import CheckpointError
from moetool.lineage import LINEAGE
from moetool.measured import NOTHING, Measured, unpacked
from moetool.recipe import PROJECTIONS, UpcycleRecipe, generator, matrix_index

STEPS = 16  # of a code, for each factor of 2 between contributions
LAST = 255  # the code of contributions that are 2^-16 of the largest, or less
FRACTION = 28  # bits of a logarithm behind the point
WEIGHT = 12  # bits of a weight behind the point


def part_dtype(parts: int) -> torch.dtype:
    """The smallest type that holds the number of a part."""
    return torch.uint8 if parts <= 256 else torch.int32


def order_of(recorded: Any, units: int, parts: int, layer: int) -> torch.Tensor:
    """The units of a dense FFN part by part, ascending within each: int64 (F,), position -> unit.

    Args:
        recorded: the packed part of each unit.
        units: F.
        parts: G.
        layer: for errors.

    Raises:
        CheckpointError: it is absent, or its parts are not of equal size.
    """
    if recorded is None:
        raise CheckpointError(f"moetool.json: measured has no split of layer {layer}; it was edited")
    part_F = unpacked(recorded, part_dtype(parts), (units,)).long()
    sizes = torch.bincount(part_F.clamp(min=0), minlength=parts).tolist()
    if sizes != [units // parts] * parts:
        raise CheckpointError(f"moetool.json: the split of layer {layer} is not one into equal parts; it was edited")
    return part_F.argsort(stable=True)


def contribution_codes(contribution_F: torch.Tensor) -> torch.Tensor:
    """uint8 (F,): c such that a contribution is about 2^(-c / 16) of the largest one; 255 where it is less than that.

    Args:
        contribution_F: not negative.
    """
    ratio_F = contribution_F.double() / contribution_F.max().double().clamp(min=torch.finfo(torch.float64).tiny)
    steps_F = (-STEPS * ratio_F.clamp(min=2.0**-20).log2()).round()
    return steps_F.clamp(0, LAST).to(torch.uint8)


def least_used(codes_F: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """A random choice of units, without replacement, those of small contributions more often: int64, ascending.

    Each draw takes one of the units that are left with a probability inversely proportional to its contribution.

    Args:
        codes_F: contributions, see `contribution_codes`.
        count: units to choose.
        draw: of this choice's own.
    """
    return keys(codes_F, draw).sort(stable=True).indices[:count].sort().values


def keys(codes_F: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """int64 (F,): E / weight, of which the smallest are chosen; E is exponential, a weight one over a contribution.

    That is Gumbel top-k (Efraimidis and Spirakis 2006). E = -log2 u has 28 bits behind the point, weights have 12: no
    product reaches 2^62, and none is rounded.
    """
    uniform_F = torch.randint(1, 2**31, codes_F.shape, generator=draw)
    roots = [round(2 ** (step / STEPS) * 2**WEIGHT) for step in range(STEPS)]
    inverse = torch.tensor([roots[step % STEPS] << step // STEPS for step in range(LAST + 1)])
    return _minus_log2(uniform_F) * inverse[LAST - codes_F.long()]


def _minus_log2(uniform_F: torch.Tensor) -> torch.Tensor:
    """-log2(u / 2^31) in units of 2^-28, for integers 0 < u < 2^31, in integers: a bit for each squaring."""
    mantissa_F, exponent_F = torch.frexp(uniform_F.double())  # exact: u has 31 bits
    x_F = (mantissa_F * 2**31).long()  # in [2^30, 2^31), stands for [1, 2)
    log_F = exponent_F.long() - 1
    for _ in range(FRACTION):
        x_F = (x_F * x_F) >> 30
        bit_F = x_F >> 31
        log_F = 2 * log_F + bit_F
        x_F = x_F >> bit_F
    return (31 << FRACTION) - log_F


def unit_order(recipe: UpcycleRecipe, measured: Measured, layer: int, units: int) -> torch.Tensor | None:
    """The units of a dense FFN in the order in which they are split: int64 (units,), position -> dense unit.

    The part at position `first_unit` of them is an expert's; the shared expert's comes first. None where the order is
    their own.

    Raises:
        CheckpointError: the split that the recipe needs was not recorded, or is damaged.
    """
    return None if recipe.split == "contiguous" else _order(recipe, layer, units, measured.split.get(layer))


@lru_cache(maxsize=4)
def _order(recipe: UpcycleRecipe, layer: int, units: int, recorded: str | None) -> torch.Tensor:
    size = units // recipe.granularity
    if recipe.split == "random":
        draw = generator(recipe.seed, "split", layer)
        order = torch.randperm(units, generator=draw).view(-1, size).sort(dim=1).values.flatten()
    else:
        order = order_of(recorded, units, recipe.granularity, layer)
    shared = recipe.shared_parts * size  # several parts, one matrix
    order[:shared] = order[:shared].sort().values
    return order


def held_units(
    recipe: UpcycleRecipe, measured: Measured, layer: int, expert: int | None, units: int
) -> torch.Tensor | None:
    """The dense units of one expert, ascending int64; None where they are neighbours from `first_unit` on.

    Args:
        recipe: of the upcycling.
        measured: what a pass over text has decided.
        layer: its layer.
        expert: its number; None is the shared expert.
        units: of one routed expert.

    Raises:
        CheckpointError: see `unit_order`.
    """
    if expert is None and not recipe.shared_parts:  # all of them, once or more
        return None
    order = unit_order(recipe, measured, layer, units * recipe.granularity)
    if order is None:
        return None
    first = 0 if expert is None else recipe.first_unit(expert, units)
    return order[first : first + (recipe.shared_parts if expert is None else 1) * units]


def redrawn_units(
    recipe: UpcycleRecipe, layer: int, expert: int, projection: str, units: int, measured: Measured = NOTHING
) -> torch.Tensor:
    """The intermediate units of one expert that are changed, sorted int64 of shape (num_redrawn,).

    With `shared` the set belongs to the whole FFN (the projection does not matter); with
    `per-matrix` each projection has its own, counted after the expert's permutation.

    Raises:
        CheckpointError: what the recipe needs to know of the units was not recorded, or is damaged.
    """
    if recipe.drop_units == "least-used":
        contributions, split = measured.contributions.get(layer), measured.split.get(layer)
        return _least_used_units(recipe, layer, expert, units, contributions, split)
    return _random_units(recipe, layer, expert, projection, units)


# The experts of a layer; more would lie between blocks in the allocator, and keep their pages from being used again.
@lru_cache(maxsize=64)
def _random_units(recipe: UpcycleRecipe, layer: int, expert: int, projection: str, units: int) -> torch.Tensor:
    whose = projection if recipe.drop_index == "per-matrix" else PROJECTIONS[0]
    draw = generator(recipe.seed, "units", matrix_index(recipe, layer, expert, whose))
    return torch.randperm(units, generator=draw)[: recipe.num_redrawn(units, layer, expert)].sort().values


@lru_cache(maxsize=64)
def _least_used_units(
    recipe: UpcycleRecipe, layer: int, expert: int, units: int, contributions: str | None, split: str | None
) -> torch.Tensor:
    if contributions is None:
        raise CheckpointError(f"{LINEAGE}: measured has no contributions of layer {layer}; it was edited")
    whole, first = units * recipe.granularity, recipe.first_unit(expert, units)
    codes_F = unpacked(contributions, torch.uint8, (recipe.num_donors, whole))[recipe.donor(expert)]
    if recipe.split != "contiguous":
        codes_F = codes_F[_order(recipe, layer, whole, split)]
    draw = generator(recipe.seed, "least-used", layer * recipe.num_experts + expert)
    return least_used(codes_F[first : first + units], recipe.num_redrawn(units, layer, expert), draw)


@lru_cache(maxsize=64)
def permutation(recipe: UpcycleRecipe, layer: int, expert: int, units: int) -> torch.Tensor | None:
    """The order of one expert's units (int64, position -> dense unit); None where it is the dense order."""
    if recipe.drop_index != "per-matrix" or recipe.num_redrawn(units, layer, expert) == 0:
        return None
    draw = generator(recipe.seed, "permutation", layer * recipe.num_experts + expert)
    return torch.randperm(units, generator=draw)


def units_digest(recipe: UpcycleRecipe, layer: int, expert: int, units: int, measured: Measured = NOTHING) -> str:
    """A checksum of the changed (and permuted) units of one expert: 16 hexadecimal digits of SHA-256."""
    digest = hashlib.sha256()
    for projection in PROJECTIONS:
        digest.update(redrawn_units(recipe, layer, expert, projection, units, measured).numpy().tobytes())
    order = permutation(recipe, layer, expert, units)
    if order is not None:
        digest.update(order.numpy().tobytes())
    return digest.hexdigest()[:16]


def split_digest(recipe: UpcycleRecipe, layer: int, units: int, measured: Measured = NOTHING) -> str:
    """A checksum of how a dense FFN is split: 16 hexadecimal digits of SHA-256.

    Raises:
        CheckpointError: see `unit_order`.
    """
    order = unit_order(recipe, measured, layer, units)
    return hashlib.sha256(b"" if order is None else order.numpy().tobytes()).hexdigest()[:16]
