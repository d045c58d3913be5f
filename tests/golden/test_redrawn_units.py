"""The units that a recipe redraws are part of the format: moetool.json rebuilds them years later.

Changing these numbers means that older checkpoints can no longer be verified or analysed.
"""

from __future__ import annotations

from moetool.recipe import UpcycleRecipe, permutation, redrawn_units, units_digest


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
