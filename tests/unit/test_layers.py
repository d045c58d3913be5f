"""Layers as text, a ratio for each, and which experts stay whole, against numbers computed by hand."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetool.errors import CheckpointError, ConfigError
from moetool.layers import (
    LayerRatios,
    by_layers,
    check_layer_ratios,
    chosen_layers,
    evenly,
    layer_of,
    layer_ratios,
    names,
    ranges,
    recorded_ratios,
)
from moetool.recipe import UpcycleRecipe
from moetool.units import permutation, redrawn_units, units_digest

HALF, QUARTER = Decimal("0.5"), Decimal("0.25")


def test_the_layer_is_in_the_name() -> None:
    named = {"model.layers.12.mlp.gate.weight": 12, "layers.3": 3, "text.layers.0.x": 0, "lm_head.weight": None}
    assert {name: layer_of(name) for name in named} == named
    assert layer_of("model.sublayers.1.x") is layer_of("model.layers.a.1") is None


def test_some_items_are_evenly_spread() -> None:
    assert evenly(range(10), 4) == [0, 3, 6, 9]
    assert evenly("abc", 1) == ["a"]
    assert evenly("abc", 3) == evenly("abc", 9) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", {0, 1, 2, 3, 4, 5, 6}),
        ("every:2", {1, 3, 5}),
        ("every:7", {6}),
        ("4-", {4, 5, 6}),
        ("0-3,6", {0, 1, 2, 3, 6}),
        ("2, 3", {2, 3}),
        ("6-", {6}),
    ],
)
def test_a_text_names_layers(text: str, expected: set[int]) -> None:
    assert chosen_layers(text, 7, "--x") == expected
    assert {layer for layer in range(7) if names(text, layer)} == expected


layers = st.sets(st.integers(0, 39), min_size=1)


@given(chosen=layers)
def test_ranges_are_read_back(chosen: set[int]) -> None:
    assert chosen_layers(ranges(chosen), 40, "--x") == chosen


@given(start=st.integers(0, 30), every=st.integers(1, 30), size=st.integers(31, 50))
def test_open_ranges_and_steps(start: int, every: int, size: int) -> None:
    assert chosen_layers(f"{start}-", size, "--x") == set(range(start, size))
    assert chosen_layers(f"every:{every}", size, "--x") == set(range(every - 1, size, every))


@given(text=st.text(alphabet="0123456789-,:every al", max_size=12))
def test_any_text_names_layers_or_is_refused(text: str) -> None:
    try:
        chosen = chosen_layers(text, 9, "--x")
    except ConfigError as error:
        assert str(error).startswith("--x '")  # noqa: PT017
    else:
        assert chosen
        assert chosen <= set(range(9))


cents = st.integers(0, 100).map(lambda n: Decimal(n) / 100)


@given(usual=cents, others=st.dictionaries(st.integers(0, 9), cents, min_size=1), order=st.randoms())
def test_each_layer_has_the_ratio_that_names_it_in_any_order(
    usual: Decimal, others: dict[int, Decimal], order: Any
) -> None:
    texts = [str(usual), *(f"{layer}={share}" for layer, share in others.items())]
    order.shuffle(texts)
    found = layer_ratios(texts)
    assert isinstance(found, LayerRatios)
    assert [found.of(layer) for layer in range(12)] == [others.get(layer, usual) for layer in range(12)]
    assert layer_ratios(found.texts) == found  # what is recorded is read back
    assert layer_ratios(sorted(texts)) == found
    recipe = UpcycleRecipe("mixtral", drop_ratio=found)
    assert UpcycleRecipe.from_json(recipe.to_json()) == recipe
    assert hash(recipe) == hash(UpcycleRecipe.from_json(recipe.to_json()))
    for layer in range(12):
        cent = int(others.get(layer, usual) * 100)
        assert recipe.num_redrawn(64, layer) == cent * 64 // 100
        assert len(redrawn_units(recipe, layer, 3, "up", 64)) == cent * 64 // 100


def test_a_number_alone_stays_a_number() -> None:
    assert layer_ratios(["0.50"]) == HALF
    assert layer_ratios(["all=0.25"]) == QUARTER
    assert recorded_ratios(["0.50"]) == ["0.5"]
    assert recorded_ratios(["0-3=0.250"]) == ["0.5", "0-3=0.25"]
    assert layer_ratios(["0-3=0.25"]) == LayerRatios(HALF, (("0-3", QUARTER),))  # the others have the default


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["0.5", "0.25"], "0.5 and 0.25 are both for all layers; give one"),
        (["0.5", "all=0.25"], "are both for all layers"),
        (["0-3=1.5"], "1.5 is not between 0 and 1"),
        (["0-3="], "'' is not a number"),
        (["first=0.5"], "'first': give all, every:2, or layers such as 4- or 0-3,8"),
        (["=0.5"], "give all, every:2"),
        (["0.5=0.5"], "give all, every:2"),
        (["every:0=0.5"], "give all, every:2"),
        (["9999999999-=0.5"], "give all, every:2"),
    ],
)
def test_what_is_no_ratio_is_refused(texts: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        layer_ratios(texts)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ("8=0", "'8' is not a range within layers 0-7"),
        ("6-9=0", "'6-9' is not a range"),
        ("every:9=0", "names none of the 8 layers"),
        ("1=0", "'1': layer 1 stays dense; layers with experts are 2-7"),
        ("every:2=0", "layer 1 stays dense"),
        ("4-=0 5=0.1", "both '4-' and '5' name layer 5; name it once"),
    ],
)
def test_layers_without_experts_are_refused(others: str, told: str) -> None:
    ratios = layer_ratios(others.split())
    assert isinstance(ratios, LayerRatios)
    with pytest.raises(ConfigError) as caught:
        check_layer_ratios(ratios, range(2, 8), 8, "--drop-ratio")
    assert told in str(caught.value)
    assert "--drop-ratio" in str(caught.value)


def test_numbers_by_layer_in_words() -> None:
    assert by_layers([16, 16], [0, 1], "of 64 units") == "16 of 64 units"
    said = "16 of 64 units in layers 0-1,3, 32 in layer 2"
    assert by_layers([16, 16, 32, 16], [0, 1, 2, 3], "of 64 units") == said
    assert by_layers([1, 2], [4, 6]) == "1 in layer 4, 2 in layer 6"


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({"keep_experts_whole": 0}, []),
        ({"keep_experts_whole": 3}, [0, 1, 2]),
        ({"keep_experts_whole": 8}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"keep_experts_whole": 2, "num_donors": 2}, [0, 4]),
        ({"keep_experts_whole": 4, "num_donors": 4, "num_experts": 16}, [0, 4, 8, 12]),
        ({"keep_experts_whole": 4, "num_donors": 2, "granularity": 2}, [0, 1, 4, 5]),
    ],
)
@pytest.mark.parametrize("method", ["drop", "noise"])
def test_the_first_experts_of_each_donor_stay_whole(options: dict[str, Any], whole: list[int], method: str) -> None:
    recipe = UpcycleRecipe("mixtral", method=method, drop_index="per-matrix", **options)
    experts = range(recipe.num_experts)
    assert [expert for expert in experts if recipe.is_whole(expert)] == whole
    for expert in experts:
        kept = expert in whole
        assert recipe.num_redrawn(64, 1, expert) == (0 if kept else 32)
        assert len(redrawn_units(recipe, 1, expert, "gate", 64)) == (0 if kept else 32)
        assert (permutation(recipe, 1, expert, 64) is None) == kept
    assert recipe.num_redrawn(64, 1) == (0 if len(whole) == len(experts) else 32)


def test_fewer_units_are_some_of_those_that_were_drawn_before() -> None:
    """The sets of a layer are those of a recipe with its ratio for all layers, whatever other layers have."""
    mixed = UpcycleRecipe("mixtral", drop_ratio=LayerRatios(HALF, (("1", QUARTER),)), keep_experts_whole=1)
    half, quarter = UpcycleRecipe("mixtral"), UpcycleRecipe("mixtral", drop_ratio=QUARTER)
    for expert in range(1, 8):
        assert units_digest(mixed, 0, expert, 64) == units_digest(half, 0, expert, 64)
        assert units_digest(mixed, 1, expert, 64) == units_digest(quarter, 1, expert, 64)
        some = redrawn_units(mixed, 1, expert, "gate", 64).tolist()
        assert set(some) < set(redrawn_units(half, 1, expert, "gate", 64).tolist())


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((), "1/3 1/3 1/3"),
        (("0.7", None), "3/20 7/10 3/20"),
        (("0.7", "0.3"), "0 7/10 3/10"),
        (("0", None), "1/2 0 1/2"),
        (("1", None), "0 1 0"),
        (("0.25", "0.25"), "1/2 1/4 1/4"),
    ],
)
def test_models_without_a_weight_share_the_rest(weights: tuple[str | None, ...], shares: str) -> None:
    typed = [None if weight is None else Decimal(weight) for weight in weights]
    recipe = UpcycleRecipe("mixtral").settled(3, typed)
    assert recipe.trunk_shares == tuple(map(Fraction, shares.split()))
    assert UpcycleRecipe.from_json(recipe.to_json()) == recipe
    assert recipe.to_json().get("donor_weights", []) == list(weights)


def test_equal_weights_are_no_weights() -> None:
    assert UpcycleRecipe("mixtral").settled(2, [HALF]) == UpcycleRecipe("mixtral").settled(2)
    assert UpcycleRecipe("mixtral").settled(4, [QUARTER] * 3).donor_weights == ()


def test_a_recipe_from_before_is_read_and_written_as_it_was() -> None:
    old = {
        "target": "mixtral", "num_experts": 8, "top_k": 2, "method": "drop", "drop_ratio": "0.5",
        "drop_index": "shared", "noise_ratio": "0", "noise_scale": "0", "noise_std": None, "num_donors": 1,
        "granularity": 1, "shared_experts": 0, "moe_layers": "all", "router": "normal", "router_std": "0.02",
        "seed": 0, "dtype": "auto",
    }  # fmt: skip
    recipe = UpcycleRecipe.from_json(old)
    assert recipe == UpcycleRecipe("mixtral", shared_experts=0).settled(1)
    assert recipe.to_json() == old
    assert list(recipe.to_json()) == list(old)


@pytest.mark.parametrize(
    "change",
    [
        {"drop_ratio": ["0.5", 3]},
        {"drop_ratio": []},
        {"drop_ratio": ["0.5", "0-3=7"]},
        {"drop_ratio": ["0.5", f"{'9' * 5000}=0.5"]},
        {"drop_ratio": ["nan"]},
        {"drop_ratio": None},
        {"keep_experts_whole": "2"},
        {"keep_experts_whole": None},
        {"donor_weights": "0.7"},
        {"donor_weights": [0.7]},
        {"donor_weights": ["0.7"]},  # of no donor
        {"donor_weights": ["inf"]},
        {"donor_weights": None},
        {"unheard_of": 1},
    ],
)
def test_a_damaged_recipe_is_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="the recipe cannot be read") as caught:
        UpcycleRecipe.from_json(UpcycleRecipe("mixtral").to_json() | change)
    assert "\n" not in str(caught.value)
