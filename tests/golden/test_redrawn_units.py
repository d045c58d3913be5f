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


SHARED = [1, 3, 4, 6, 9, 11, 12, 14]
SCRIPT = [3, 4, 5, 6, 7, 9, 11, 14]
ORDER = [13, 8, 4, 11, 9, 14, 7, 12, 5, 15, 6, 10, 2, 0, 1, 3]
DIGEST = "99162d4629478666"
