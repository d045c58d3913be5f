"""Initialisations against hand-computed numbers, and what a recipe draws."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch

from moetool.errors import CheckpointError
from moetool.recipe import PROJECTIONS, UpcycleRecipe, generator, matrix_index
from moetool.units import permutation, redrawn_units, units_digest
from moetool.upcycle.init import Slice, copy, drop, slice_moments
from moetool.upcycle.router import normal, uniform


@pytest.mark.parametrize(
    ("ratio", "units", "redrawn"),
    [("0.5", 4096, 2048), ("0.5", 5, 2), ("0.1", 10, 1), ("0.7", 10, 7), ("0.29", 100, 29), ("1", 7, 7), ("0.1", 9, 0)],
)
def test_the_number_of_units_is_the_floor_of_the_typed_decimal(ratio: str, units: int, redrawn: int) -> None:
    # 0.29 * 100 is 28.999999999999996 in binary floating point, 0.7 * 10 is 7.000000000000001.
    assert UpcycleRecipe("mixtral", drop_ratio=Decimal(ratio)).num_redrawn(units, 0) == redrawn


def test_copy_redraws_nothing_whatever_the_ratio() -> None:
    assert UpcycleRecipe("mixtral", method="copy", drop_ratio=Decimal("0.5")).num_redrawn(64, 0) == 0
    block = torch.randn(4, 3)
    assert copy(Slice(block, torch.tensor([0]), 0, (0.0, 1.0), generator(0, "x"))) is block


def test_slice_moments_are_those_of_the_dropped_slice() -> None:
    matrix = torch.tensor([[1.0, 2.0], [100.0, 100.0], [3.0, 6.0]])
    sums, squares = matrix.double().sum(1), matrix.double().square().sum(1)
    mean, std = slice_moments(sums, squares, torch.tensor([0, 2]), 2)
    assert mean == pytest.approx(3.0)  # (1 + 2 + 3 + 6) / 4
    assert std == pytest.approx((14 / 3) ** 0.5)  # squares of -2, -1, 0, 3 over n - 1
    assert slice_moments(sums, squares, torch.tensor([0]), 1)[1] == 0.0


@pytest.mark.parametrize("axis", [0, 1])
def test_drop_redraws_the_units_and_nothing_else(axis: int) -> None:
    block = torch.arange(12.0).reshape(4, 3)
    before = block.clone()
    units = torch.tensor([0, 2])
    made = drop(Slice(block, units, axis, (5.0, 0.1), generator(0, "x")))
    assert torch.equal(block, before)
    changed = (made != before).all(1 - axis)
    assert changed.nonzero().flatten().tolist() == [0, 2]
    assert (made.index_select(axis, units) - 5).abs().max() < 1
    assert torch.equal(made, drop(Slice(block, units, axis, (5.0, 0.1), generator(0, "x"))))


def test_sets_are_drawn_per_layer_and_expert_and_shared_by_the_projections() -> None:
    recipe = UpcycleRecipe("mixtral", seed=3)
    gate = redrawn_units(recipe, 1, 2, "gate", 64)
    assert gate.tolist() == sorted(set(gate.tolist()))
    assert torch.equal(gate, redrawn_units(recipe, 1, 2, "down", 64))
    assert not torch.equal(gate, redrawn_units(recipe, 1, 3, "gate", 64))
    assert not torch.equal(gate, redrawn_units(recipe, 2, 2, "gate", 64))
    assert permutation(recipe, 1, 2, 64) is None


def test_per_matrix_sets_are_independent_and_permuted() -> None:
    recipe = UpcycleRecipe("mixtral", drop_index="per-matrix")
    assert not torch.equal(redrawn_units(recipe, 0, 0, "gate", 64), redrawn_units(recipe, 0, 0, "up", 64))
    order = permutation(recipe, 0, 0, 64)
    assert order is not None
    assert sorted(order.tolist()) == list(range(64))
    # Nothing redrawn: nothing permuted, so that ratio 0 is `copy` in either mode.
    assert permutation(UpcycleRecipe("mixtral", drop_index="per-matrix", drop_ratio=Decimal(0)), 0, 0, 64) is None


def test_the_overlap_of_two_experts_is_hypergeometric() -> None:
    # reference: kept sets of F - |S| out of F units share (F - |S|)^2 / F on average.
    recipe, units, kept = UpcycleRecipe("mixtral", drop_ratio=Decimal("0.25")), 512, 384
    sets = [set(range(units)) - set(redrawn_units(recipe, 0, e, "gate", units).tolist()) for e in range(40)]
    overlaps = [len(sets[i] & sets[i + 1]) for i in range(0, 40, 2)]
    mean = kept * kept / units
    variance = kept * (kept / units) * (1 - kept / units) * (units - kept) / (units - 1)
    assert abs(sum(overlaps) / 20 - mean) < 5 * (variance / 20) ** 0.5


def test_the_digest_sees_seed_mode_and_expert() -> None:
    a = UpcycleRecipe("mixtral")
    digests = {
        units_digest(a, 0, 0, 64),
        units_digest(a, 0, 1, 64),
        units_digest(UpcycleRecipe("mixtral", seed=1), 0, 0, 64),
        units_digest(UpcycleRecipe("mixtral", drop_index="per-matrix"), 0, 0, 64),
    }
    assert len(digests) == 4


def test_a_recipe_survives_json() -> None:
    recipe = UpcycleRecipe("mixtral", drop_ratio=Decimal("0.10"), seed=9)
    assert UpcycleRecipe.from_json(recipe.to_json()) == recipe
    assert recipe.to_json()["drop_ratio"] == "0.10"
    with pytest.raises(CheckpointError, match="recipe"):
        UpcycleRecipe.from_json({"target": "mixtral", "drop_ratio": "much", "router_std": "0"})


@pytest.mark.parametrize("draw", [normal, uniform])
def test_routers_have_the_standard_deviation_asked_for(draw: object) -> None:
    rows = draw((64, 1024), 0.02, generator(0, "x"))  # type: ignore[operator]
    assert abs(float(rows.std()) - 0.02) < 5 * 0.02 / (2 * rows.numel()) ** 0.5
    assert abs(float(rows.mean())) < 5 * 0.02 / rows.numel() ** 0.5
    if draw is uniform:
        assert float(rows.abs().max()) <= 0.02 * 3**0.5


def test_no_two_draws_of_a_large_model_share_a_generator() -> None:
    recipe = UpcycleRecipe("mixtral", num_experts=256)
    places = [matrix_index(recipe, layer, e, p) for layer in range(61) for e in range(256) for p in PROJECTIONS]
    seeds = {generator(0, "values", place * 4 + block).initial_seed() for place in places for block in range(4)}
    assert len(seeds) == 61 * 256 * 3 * 4
    assert max(seeds) < 2**32  # all that torch's CPU generator reads
