"""The units that a recipe redraws are part of the format: moetool.json rebuilds them years later.

Changing these numbers means that older checkpoints can no longer be verified or analysed.
"""

from __future__ import annotations

import torch

from moetool.measured import NOTHING, Measured, packed
from moetool.recipe import UpcycleRecipe
from moetool.units import permutation, redrawn_units, unit_order, units_digest


def test_the_sets_of_two_recipes() -> None:
    shared = UpcycleRecipe("mixtral", seed=0)
    assert redrawn_units(shared, 0, 0, "gate", 16).tolist() == SHARED
    script = UpcycleRecipe("mixtral", seed=7, drop_index="per-matrix")
    assert redrawn_units(script, 1, 3, "down", 16).tolist() == SCRIPT
    order = permutation(script, 1, 3, 16)
    assert order is not None
    assert order.tolist() == ORDER
    assert units_digest(shared, 2, 5, 4096) == DIGEST


SHARED = [0, 1, 5, 7, 8, 10, 11, 12]
SCRIPT = [0, 2, 3, 4, 5, 10, 11, 13]
ORDER = [9, 2, 0, 14, 3, 13, 1, 8, 12, 5, 4, 11, 15, 7, 10, 6]
DIGEST = "8555e593e6c95af3"


def test_the_set_of_a_recipe_that_redraws_what_does_little() -> None:
    recipe = UpcycleRecipe("mixtral", num_experts=4, granularity=2, split="random", drop_units="least-used", seed=3)
    codes = (torch.arange(64, dtype=torch.int64) * 37 % 256).to(torch.uint8)
    measured = Measured(contributions={1: packed(codes[None])})
    assert redrawn_units(recipe, 1, 2, "up", 32, measured).tolist() == LEAST_USED
    order = unit_order(recipe, NOTHING, 1, 64)
    assert order is not None
    assert order[:32].tolist() == SPLIT


LEAST_USED = [2, 5, 7, 10, 13, 14, 16, 17, 18, 20, 21, 25, 26, 27, 29, 30]
SPLIT = [
    0,
    3,
    6,
    7,
    8,
    11,
    14,
    16,
    21,
    23,
    27,
    28,
    29,
    31,
    32,
    36,
    38,
    39,
    40,
    43,
    46,
    47,
    49,
    50,
    51,
    53,
    54,
    55,
    57,
    60,
    62,
    63,
]
