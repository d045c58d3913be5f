"""What every operation shares: a file read from end to end, blocks, the last block kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moetool.checkpoint.reader import BlockFile, TensorInfo
from moetool.surgery.examine import _stretches
from moetool.surgery.fill import Fill, Piece, Place
from moetool.surgery.kinds import KINDS, Block, Cache


def piece(start: int, size: int, name: str = "t", source: int = 0) -> Piece:
    return Piece(source, TensorInfo(name, "U8", (size,), "f", start, size))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6), st.integers(0, 20))
def test_a_file_is_read_from_its_first_byte_to_its_last(parts: list[tuple[int, int]], rest: int) -> None:
    pieces: list[Piece] = []
    position = 0
    for gap, size in parts:
        pieces.append(piece(position + gap, size, f"t{len(pieces)}"))
        position += gap + size
    found = list(_stretches("f", position + rest, reversed(pieces)))
    ends = [0, *(info.start + info.size for info, _ in found)]
    assert [info.start for info, _ in found] == ends[:-1]
    assert ends[-1] == position + rest
    assert [p for _, used in found for p in used] == [p for p in pieces if p.info.size]


def test_tied_weights_are_looked_at_once_under_both_names() -> None:
    a, b = piece(8, 4, "head"), piece(8, 4, "embedding")
    assert [used for _, used in _stretches("f", 12, [a, b])] == [[], [a, b]]
    with pytest.raises(AssertionError, match="overlaps"):
        list(_stretches("f", 20, [piece(0, 8), piece(4, 8)]))


def test_a_cache_keeps_the_last_block_of_each_key() -> None:
    cache, made = Cache(), []

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
