"""What every operation shares: blocks, and the last block kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.reader import BlockFile
from moetool.surgery.fill import Fill, Piece, Place
from moetool.surgery.kinds import KINDS, Block, Cache
from moetool.surgery.rows import is_finite


def piece(start: int, size: int, name: str = "t", source: int = 0) -> Piece:
    return Piece(source, TensorInfo(name, "U8", (size,), "f", start, size))


def test_a_cache_keeps_the_last_block_of_each_key() -> None:
    cache, made = Cache(), list[int]()

    def make() -> torch.Tensor:
        made.append(1)
        return torch.ones(1)

    for key, of in (("rows", 1), ("rows", 1), ("made", 1), ("rows", 1), ("rows", 2), ("rows", 1)):
        cache.get(key, of, make)
    assert len(made) == 4  # rows of 1, made of 1, rows of 2, and rows of 1 again


def test_several_sources_are_averaged_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    rows = [torch.tensor([1.0, 256.0]), torch.tensor([2.0, 257.0]), torch.tensor([4.0, 258.0])]
    for number, row in enumerate(rows):
        (tmp_path / f"f{number}").write_bytes(row.numpy().tobytes())
    info = [TensorInfo("t", "F32", (1, 2), f"f{number}", 0, 8) for number in range(3)]
    fill = Fill("carried", tuple(Piece(n, i) for n, i in enumerate(info)), (Place("t"),), "BF16", (1, 2))
    with BlockFile(tmp_path) as reader:
        block = Block(fill, fill.places[0], 0, 0, 1, [reader] * 3)
        made = KINDS["carried"].make(block)
    # 7 / 3 = 2.3333 is nearest to 2.328125 in bf16, and 771 / 3 = 257 lies between 256 and 258: to even.
    assert made.tolist() == [[2.328125, 256.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found_anywhere(bad: float, dtype: torch.dtype) -> None:
    for size in (1, 7, 32, 1000, 100_003):
        numbers = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)
        assert is_finite(numbers)  # though their sum overflows
        for place in {0, size // 2, size - 1}:
            broken = numbers.clone()
            broken[place] = bad
            assert not is_finite(broken), (size, place)
    assert is_finite(torch.empty(0, dtype=dtype))
