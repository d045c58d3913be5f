"""What holds for the sums of any tokens: parts add up to the whole, in any order."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetool.calibration.sums import InputSums, UnitSums


@st.composite
def parts(draw: Any) -> list[torch.Tensor]:
    """Rows of tokens, cut into parts of which some are empty."""
    sizes = draw(st.lists(st.integers(0, 7), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    return [scale * torch.randn(size, 6, generator=generator) for size in sizes]


@pytest.mark.parametrize("kind", [InputSums, UnitSums])
@given(parts())
@settings(max_examples=60)
def test_parts_add_up(kind: Any, rows: list[torch.Tensor]) -> None:
    whole = kind.of(torch.cat(rows))
    for order in (rows, rows[::-1]):
        added = reduce(add, (kind.of(part) for part in order))
        for name, value in vars(whole).items():
            scale = float(torch.cat(rows).abs().max() ** 2) if sum(map(len, rows)) else 0
            assert torch.allclose(getattr(added, name), value, rtol=1e-5, atol=1e-5 * scale)


@given(parts())
@settings(max_examples=60)
def test_the_second_moment_is_symmetric_and_not_negative(rows: list[torch.Tensor]) -> None:
    sums = InputSums.of(torch.cat(rows))
    scale = float(sums.second_DD.diagonal().sum())
    assert torch.allclose(sums.second_DD, sums.second_DD.T, atol=1e-6 * scale)
    assert float(torch.linalg.eigvalsh(sums.second_DD.double()).min()) >= -1e-5 * scale
