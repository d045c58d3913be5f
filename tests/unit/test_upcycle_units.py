"""How units are dealt to parts and which are redrawn, against hand-computed and planted examples."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetool.errors import CheckpointError
from moetool.measured import NOTHING, Measured, packed
from moetool.recipe import UpcycleRecipe
from moetool.units import (
    _minus_log2,
    contribution_codes,
    held_units,
    keys,
    least_used,
    order_of,
    part_dtype,
    redrawn_units,
    split_digest,
    unit_order,
)
from moetool.upcycle.usage import by_activation


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_activation_by_hand() -> None:
    # By contribution: 3 7 | 0 5 / 2 6 / 4 1. The shared part of two takes the first pair; the rest goes there
    # (part 1, 2, 3) and back (3, 2, 1): 0 -> 1, 5 -> 2, 2 -> 3, 6 -> 3, 4 -> 2, 1 -> 1.
    contribution_F = torch.tensor([6.0, 1, 4, 9, 2, 5, 3, 8])
    assert by_activation(contribution_F, 1, 4).tolist() == [1, 1, 3, 0, 2, 2, 3, 0]
    # Nothing shared: 3 7 0 5 there, 2 6 4 1 back.
    assert by_activation(contribution_F, 0, 4).tolist() == [2, 0, 3, 0, 1, 3, 2, 1]
    # Equals go by their number.
    assert by_activation(torch.ones(4), 1, 2).tolist() == [0, 0, 1, 1]


def test_routed_parts_of_activation_contribute_alike() -> None:
    contribution_F = torch.randn(4096, generator=draws()).exp()
    part_F = by_activation(contribution_F, 1, 8)
    sums = torch.zeros(8).index_add_(0, part_F, contribution_F)
    assert sums[0] > 2 * sums[1:].max()
    assert sums[1:].max() / sums[1:].min() < 1.01


@given(data=st.data())
@settings(max_examples=25)
def test_any_split_is_into_equal_parts(data: st.DataObject) -> None:
    parts, size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 7))
    shared, F = data.draw(st.integers(0, parts - 1)), parts * size
    seed = data.draw(st.integers(0, 2**31))
    values = torch.rand(F, generator=draws(seed))
    contribution_F = (values * 4).round() if data.draw(st.booleans()) else values  # ties, zeros
    part_F = by_activation(contribution_F, shared, parts)
    assert torch.bincount(part_F, minlength=parts).tolist() == [size] * parts
    inside, outside = contribution_F[part_F < shared], contribution_F[part_F >= shared]
    assert shared == 0 or inside.min() >= outside.max()


def test_contributions_are_recorded_as_steps_of_a_sixteenth_octave() -> None:
    # 2^-(c / 16) of the largest: 1, 1/2, 1/4, 0.3 (16 x 1.737 = 27.8), 2^-15, 2^-17 and nothing at all.
    contribution_F = 8 * torch.tensor([1.0, 0.5, 0.25, 0.3, 2**-15, 2**-17, 0])
    assert contribution_codes(contribution_F).tolist() == [0, 16, 32, 28, 240, 255, 255]
    assert contribution_codes(torch.zeros(3)).tolist() == [255] * 3


def test_least_used_follows_the_weights() -> None:
    # Contributions 1, 1/2, 1/4, 1/8: weights 1, 2, 4, 8 of 15.
    n = 20_000
    codes_NF = torch.tensor([[0, 16, 32, 48]], dtype=torch.uint8).expand(n, 4)
    order_NF = keys(codes_NF, draws()).argsort(dim=1)
    for unit, weight in enumerate([1, 2, 4, 8]):
        p = weight / 15
        assert abs(int((order_NF[:, 0] == unit).sum()) - n * p) < 5 * math.sqrt(n * p * (1 - p))
    # Both 2 and 3: 4/15 x 8/11 + 8/15 x 4/7.
    p = 4 / 15 * 8 / 11 + 8 / 15 * 4 / 7
    both = int((order_NF[:, :2] >= 2).all(1).sum())
    assert abs(both - n * p) < 5 * math.sqrt(n * p * (1 - p))
    codes_F = codes_NF[0]
    smallest = [set(keys(codes_F, draws(seed)).argsort()[:2].tolist()) for seed in range(20)]
    assert [set(least_used(codes_F, 2, draws(seed)).tolist()) for seed in range(20)] == smallest


def test_least_used_of_equals_is_uniform_and_has_the_number_asked_for() -> None:
    counts = torch.zeros(50)
    for seed in range(400):
        units = least_used(torch.full((50,), 77, dtype=torch.uint8), 10, draws(seed))
        assert units.tolist() == sorted(set(units.tolist()))
        assert len(units) == 10
        counts[units] += 1
    assert (counts - 80).abs().max() < 5 * math.sqrt(400 * 0.2 * 0.8)
    assert least_used(torch.zeros(5, dtype=torch.uint8), 0, draws()).tolist() == []
    assert least_used(torch.zeros(5, dtype=torch.uint8), 5, draws()).tolist() == [0, 1, 2, 3, 4]


def recorded(part_F: Tensor, parts: int) -> str:
    return packed(part_F.to(part_dtype(parts)))


def test_a_recorded_split_is_read_by_part() -> None:
    # Parts 2 0 1 1 0 2: part 0 has units 1 and 4, and so on, ascending within each.
    assert order_of(recorded(torch.tensor([2, 0, 1, 1, 0, 2]), 3), 6, 3, 0).tolist() == [1, 4, 2, 3, 0, 5]
    for damaged in (torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 2, 9])):
        with pytest.raises(CheckpointError, match="equal parts"):
            order_of(recorded(damaged, 3), 6, 3, 0)
    for nothing in (None, "", "AAAA", recorded(torch.tensor([0, 1]), 2)):
        with pytest.raises(CheckpointError, match="edited"):
            order_of(nothing, 6, 3, 0)


def test_experts_hold_their_parts_and_the_shared_one_the_first() -> None:
    recipe = UpcycleRecipe("glm4_moe", num_experts=4, granularity=4, shared_experts=2, split="activation")
    part_F = torch.tensor([3, 1, 0, 2, 1, 0, 2, 3])  # the shared part has 1 2 4 5, which lie in both of its parts
    measured = Measured(split={5: recorded(part_F, 4)})

    def held(expert: int | None) -> list[int]:
        found = held_units(recipe, measured, 5, expert, 2)
        assert found is not None
        return found.tolist()

    assert [held(None), *map(held, range(4))] == [[1, 2, 4, 5], [3, 6], [0, 7], [3, 6], [0, 7]]
    assert held_units(UpcycleRecipe(granularity=4), NOTHING, 5, 0, 2) is None
    with pytest.raises(CheckpointError, match="no split of layer 6"):
        held_units(recipe, measured, 6, 0, 2)


def test_a_random_split_follows_from_the_seed() -> None:
    recipe = UpcycleRecipe("mixtral", granularity=4, split="random", seed=1, shared_experts=0)
    order = unit_order(recipe, NOTHING, 0, 64)
    assert order is not None
    assert sorted(order.tolist()) == list(range(64))
    assert all(part.tolist() == sorted(part.tolist()) for part in order.chunk(4))
    assert order[:16].tolist() != list(range(16))
    other = UpcycleRecipe("mixtral", granularity=4, split="random", seed=2, shared_experts=0)
    assert len({split_digest(*key, 64) for key in ((recipe, 0), (recipe, 1), (other, 0))}) == 3


def test_redrawn_units_are_counted_within_the_part() -> None:
    # Units 4..7 do nothing; part 1 of two holds 0 5 6 7, and part 0 holds 1 2 3 4.
    codes = torch.tensor([[0, 0, 0, 0, 255, 255, 255, 255]] * 2, dtype=torch.uint8)
    codes[1] = 255 - codes[1]  # another donor: the other way around
    split = recorded(torch.tensor([1, 0, 0, 0, 0, 1, 1, 1]), 2)
    measured = Measured(split={0: split}, contributions={0: packed(codes)})
    recipe = UpcycleRecipe(
        "mixtral", num_experts=4, granularity=2, split="activation", drop_units="least-used", num_donors=2,
        drop_ratio=Decimal("0.75"), shared_experts=0,
    )  # fmt: skip
    found = [redrawn_units(recipe, 0, expert, "gate", 4, measured).tolist() for expert in range(4)]
    assert found[1] == [1, 2, 3]  # of DENSE's: 5 6 7
    assert found[2] == [0, 1, 2]  # of the donor's: 1 2 3
    assert 3 in found[0]
    assert 0 in found[3]
    with pytest.raises(CheckpointError, match="no contributions of layer 1"):
        redrawn_units(recipe, 1, 0, "gate", 4, measured)


def test_measured_survives_json_and_refuses_what_is_damaged() -> None:
    measured = Measured(split={3: "abc"}, contributions={3: "def"})
    again = Measured.from_json(measured.to_json(), {})
    assert (again.split, again.contributions) == ({3: "abc"}, {3: "def"})
    assert NOTHING.to_json() == {}
    damaged: Any
    for damaged in ([], {"split": []}, {"split": {"three": "x"}}, {"contributions": {"3": 4}}):
        with pytest.raises(CheckpointError, match="measured"):
            Measured.from_json(damaged, {})


def test_recipes_of_older_versions_are_read() -> None:
    old = UpcycleRecipe("mixtral").to_json()
    assert not {"split", "drop_units"} & set(old)
    assert UpcycleRecipe.from_json(old) == UpcycleRecipe("mixtral")
    new = UpcycleRecipe("mixtral", granularity=2, split="random", drop_units="least-used")
    assert UpcycleRecipe.from_json(new.to_json()) == new


def test_logarithms_in_integers() -> None:
    uniform = torch.cat([torch.tensor([1, 2, 3, 2**30, 2**31 - 1]), torch.randint(1, 2**31, (10_000,))])
    exact = 31 - uniform.double().log2()
    assert _minus_log2(uniform)[:2].tolist() == [31 << 28, 30 << 28]
    assert float((_minus_log2(uniform).double() / 2**28 - exact).abs().max()) < 4 / 2**28
