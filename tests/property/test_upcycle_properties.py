"""What holds for every method, router, layout and header."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moetool import registry
from moetool.checkpoint.header import read_header
from moetool.checkpoint.shard import TensorLayout, layout_shards
from moetool.errors import CheckpointError, ConfigError
from moetool.recipe import UpcycleRecipe, generator
from moetool.surgery.fill import Fill, Place
from moetool.units import redrawn_units
from moetool.upcycle.init import Slice
from moetool.values import parse_size

ratios = st.decimals(0, 1, places=3)


@pytest.mark.parametrize("name", registry.names("method"))
@given(data=st.data())
def test_a_method_changes_the_units_at_most_and_draws_from_its_generator_only(name: str, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    axis = data.draw(st.sampled_from([0, 1]))
    size = (rows, columns)[axis]
    units = torch.tensor(sorted(data.draw(st.sets(st.integers(0, size - 1)))), dtype=torch.int64)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    block = torch.randn(rows, columns).to(dtype)
    before = block.clone()
    method = registry.load("method", name)
    made = method(Slice(block, units, axis, (0.5, 2.0), generator(0, "key")))
    assert torch.equal(block, before)
    assert (made.dtype, made.shape) == (block.dtype, block.shape)
    kept = torch.ones(size, dtype=torch.bool)
    kept[units] = False
    assert torch.equal(made[kept] if axis == 0 else made[:, kept], block[kept] if axis == 0 else block[:, kept])
    torch.rand(1)  # the global generator plays no part
    assert torch.equal(made, method(Slice(block, units, axis, (0.5, 2.0), generator(0, "key"))))


@pytest.mark.parametrize("name", registry.names("router"))
@given(experts=st.integers(2, 16), hidden=st.integers(1, 64), seed=st.integers(0, 2**31))
def test_a_router_is_finite_and_reproducible(name: str, experts: int, hidden: int, seed: int) -> None:
    draw = registry.load("router", name)
    rows = draw((experts, hidden), 0.02, generator(seed, "router"))
    assert rows.shape == (experts, hidden)
    assert rows.dtype == torch.float32
    assert torch.isfinite(rows).all()
    assert torch.equal(rows, draw((experts, hidden), 0.02, generator(seed, "router")))


@given(ratio=ratios, units=st.integers(1, 300), expert=st.integers(0, 7))
def test_a_set_has_floor_of_ratio_times_units_members(ratio: Decimal, units: int, expert: int) -> None:
    recipe = UpcycleRecipe("mixtral", drop_ratio=ratio)
    drawn = redrawn_units(recipe, 0, expert, "gate", units).tolist()
    assert len(drawn) == len(set(drawn)) == (int(ratio * 1000) * units) // 1000
    assert drawn == sorted(drawn)
    assert all(0 <= unit < units for unit in drawn)


tensors = st.lists(
    st.tuples(st.sampled_from(["F32", "BF16", "F16"]), st.lists(st.integers(0, 9), max_size=3)), min_size=1, max_size=12
)


@given(entries=tensors, limit=st.integers(1, 4000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_layout_is_what_a_reader_finds(entries: list[Any], limit: int, tmp_path: Path) -> None:
    layouts = [TensorLayout(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(entries)]
    shards = layout_shards(layouts, limit)
    assert [name for shard in shards for name in shard.starts] == [t.name for t in layouts]
    for shard in shards:
        path = tmp_path / shard.name
        path.write_bytes(shard.header + bytes(shard.size - len(shard.header)))
        found, length = read_header(path)
        assert length == len(shard.header)
        assert {name: info.start for name, info in found.items()} == dict(shard.starts)
        size = sum(found[name].size for name in shard.starts)
        assert size <= limit or sum(found[name].size > 0 for name in shard.starts) == 1


@given(rows=st.integers(0, 5000), columns=st.integers(0, 3000))
def test_blocks_cover_every_row_once(rows: int, columns: int) -> None:
    fill = Fill("carried", (), (Place("x"),), "F32", (rows, columns))
    covered = [row for start, stop in fill.blocks for row in range(start, stop)]
    assert covered == (list(range(rows)) if columns else [])


@given(raw=st.binary(max_size=200), length=st.integers(0, 2**64 - 1) | st.integers(0, 300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_any_bytes_give_tensors_or_one_error(raw: bytes, length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + raw)
    try:
        read_header(path)
    except CheckpointError as error:
        assert "x.safetensors" in str(error)  # noqa: PT017


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)
entry = st.fixed_dictionaries(
    {"dtype": st.just("F32") | json_values, "shape": json_values, "data_offsets": json_values}
)


@given(header=st.dictionaries(st.text(max_size=5), entry | json_values, max_size=3), data=st.binary(max_size=16))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_any_header_gives_tensors_or_one_error(header: dict[str, Any], data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    try:
        found, _ = read_header(path)
    except CheckpointError as error:
        assert "x.safetensors" in str(error)  # noqa: PT017
    else:
        assert sum(info.size for info in found.values()) == len(data)


@given(number=st.integers(1, 999), unit=st.sampled_from(["KB", "MB", "GB", "kb", "G"]))
def test_sizes_are_decimal(number: int, unit: str) -> None:
    factor = {"K": 10**3, "M": 10**6, "G": 10**9}[unit.upper().removesuffix("B")]
    assert parse_size(f"{number}{unit}") == number * factor


@given(number=st.integers(1, 10**8), unit=st.sampled_from(["", "B"]))
def test_a_size_in_bytes_is_at_least_a_megabyte(number: int, unit: str) -> None:
    if number >= 10**6:
        assert parse_size(f"{number}{unit}") == number
    else:
        with pytest.raises(ConfigError, match="GB were meant"):
            parse_size(f"{number}{unit}")
