"""Merging experts: units aligned, groups formed, means taken, each against numbers by hand."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetool.calibration.experts import layers_with_experts
from moetool.checkpoint.model import load_model
from moetool.errors import CheckpointError
from moetool.prune.align import align
from moetool.prune.group import Group, group_up, read_groups, recorded_groups
from moetool.prune.merge import distances
from moetool.prune.plan import plan_pruning
from moetool.surgery.apply import prove, write_out
from moetool.surgery.sources import open_sources
from tests import tiny


def expert(units: int, hidden: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((units, hidden), (units, hidden), (hidden, units))
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def permuted(one: list[Tensor], order: Tensor) -> list[Tensor]:
    gate, up, down = one
    return [gate[order], up[order], down[:, order]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_a_permuted_copy_is_aligned_exactly(dtype: torch.dtype, size: float) -> None:
    one = [matrix * size for matrix in expert(40, 600, 0, dtype)]  # more columns than are multiplied at once
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    found = align(one, permuted(one, order))
    assert found.tolist() == order.argsort().tolist()
    assert all(torch.equal(a, b) for a, b in zip(permuted(permuted(one, order), found), one, strict=True))


def test_the_alignment_is_the_nearest_of_all() -> None:
    for seed in range(5):
        one, other = expert(5, 3, seed), expert(5, 3, seed + 100)
        far = {
            order: sum(
                float((a - b).double().square().sum())
                for a, b in zip(one, permuted(other, torch.tensor(order)), strict=True)
            )
            for order in permutations(range(5))
        }
        assert tuple(align(one, other).tolist()) == min(far, key=lambda order: far[order])


def test_the_alignment_does_not_depend_on_the_order_of_sums() -> None:
    """Products of rounded weights are whole numbers, so a machine that adds them up otherwise finds the same."""
    one, other = expert(64, 256, 0), expert(64, 256, 1)
    shuffled = torch.randperm(256, generator=torch.Generator().manual_seed(2))

    def other_order(matrices: list[Tensor]) -> list[Tensor]:
        gate, up, down = matrices
        return [gate[:, shuffled], up[:, shuffled], down[shuffled]]

    found = align(one, other)
    assert torch.equal(found, align(other_order(one), other_order(other)))
    torch.set_num_threads(2)
    try:
        assert torch.equal(found, align(one, other))
    finally:
        torch.set_num_threads(1)
    zeros = [torch.zeros_like(matrix) for matrix in one]
    assert sorted(align(zeros, zeros).tolist()) == list(range(64))


def matrix(size: int, near: dict[tuple[int, int], float]) -> Tensor:
    distance_EE = torch.ones(size, size)
    for (a, b), distance in near.items():
        distance_EE[a, b] = distance_EE[b, a] = distance
    return distance_EE


def test_groups_by_hand() -> None:
    # 0 and 3 are kept. 3 is more salient, so it takes all of the others, 0 none: a group has room for 16.
    saliency = [3.0, 1.0, 1.0, 6.0, 2.0]
    near = matrix(5, {(0, 1): 0.1, (3, 4): 0.2, (3, 2): 0.3})
    (one,) = group_up(near, [0, 3], saliency, [range(5)], [])
    assert one == Group([3, 4, 2, 1], [0.6, 0.2, 0.1, 0.1])
    # Two groups of the router do not mix.
    two = group_up(near, [0, 3], saliency, [range(3), range(3, 5)], [])
    assert two == [Group([0, 1, 2], [0.6, 0.2, 0.2]), Group([3, 4], [0.75, 0.25])]
    # Nothing is merged into 3, so 0 takes all.
    alone = Group([0, 1, 2, 4], [0.428572, 0.142857, 0.142857, 0.285714])  # 3, 1, 1 and 2 of 7
    assert group_up(near, [0, 3], saliency, [range(5)], [3]) == [alone]
    # An expert without saliency is in no group, and a kept one without it takes none.
    assert group_up(near, [0, 3], [3.0, 0.0, 0.0, 6.0, 0.0], [range(5)], []) == []
    assert group_up(near, [0, 3], [0.0, 1.0, 0.0, 0.0, 0.0], [range(5)], []) == []


def test_a_group_has_16_experts_and_the_next_goes_on() -> None:
    saliency = [float(40 - expert) for expert in range(40)]
    near = matrix(40, {(0, expert): expert / 100 for expert in range(3, 40)})
    groups = group_up(near, [0, 1, 2], saliency, [range(40)], [])
    assert [group.experts for group in groups] == [[0, *range(3, 18)], [1, *range(18, 33)], [2, *range(33, 40)]]
    for group in groups:
        assert sum(group.weights) == pytest.approx(1, abs=1e-12)
        shares = np.array([saliency[expert] for expert in group.experts])
        assert np.allclose(group.weights, shares / shares.sum(), atol=1e-5)
    # Of 37 experts two groups have room for 30: the others are left out.
    assert sum(len(group.experts) for group in group_up(near, [0, 1], saliency, [range(40)], [])) == 32


def test_groups_are_read_as_they_were_recorded() -> None:
    kept = {0: [0, 3], 2: [1, 2]}
    groups = {0: [Group([3, 4, 2], [0.5, 0.25, 0.25])], 2: []}
    recorded = recorded_groups(groups)
    assert read_groups(recorded, kept, 5) == groups
    good = {"experts": [3, 4], "weights": [0.5, 0.5]}
    several: tuple[Any, ...] = (
        None, 3, [], [[]], {"0": []}, [[good], None], [[3], []], [[good | {"experts": [4, 3]}], []],
        [[good | {"experts": [3, 5]}], []], [[good | {"experts": [3, 0]}], []], [[good | {"experts": [3, 4, 4]}], []],
        [[good | {"weights": [0.5]}], []], [[good | {"weights": [0.5, 0.6]}], []], [[good, good], []],
        [[good | {"weights": [float("nan"), 0.5]}], []], [[good | {"experts": [3], "weights": [1.0]}], []],
        [[{"experts": [3, 4]}], []],
    )  # fmt: skip
    for damaged in several:
        with pytest.raises(CheckpointError, match="merged experts of an entry cannot be read"):
            read_groups(damaged, kept, 5)


def test_distances_by_hand(mixtral: Path) -> None:
    layer = layers_with_experts(load_model(mixtral).eval())[0]
    hidden_TD = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = distances(layer, hidden_TD).double().numpy()
    w = load_file(mixtral / "model.safetensors")
    prefix = "model.layers.0.block_sparse_moe"
    x = hidden_TD.double()
    means, profiles = [], []
    for e in range(4):
        gate, up, down = (w[f"{prefix}.experts.{e}.{name}.weight"].double() for name in ("w1", "w3", "w2"))
        outputs = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        means.append(outputs.mean(0).numpy())
        profile = (x @ w[f"{prefix}.gate.weight"][e].double()).numpy()
        profiles.append(profile / np.sqrt((profile**2).sum()))
    apart = np.array([[np.sqrt(((a - b) ** 2).sum()) for a in profiles] for b in profiles])
    for i in range(4):
        assert found[i, i] == pytest.approx(0, abs=1e-5)
        for j in range(4):
            cosine = means[i] @ means[j] / np.sqrt((means[i] ** 2).sum() * (means[j] ** 2).sum())
            wanted = 1 - ((1 + cosine) / 2 + 1 - apart[i, j] / apart.max()) / 2
            assert found[i, j] == pytest.approx(wanted, abs=1e-5)


def three_units(folder: Path) -> Path:
    """A Mixtral of one layer with three experts of three units; the second has those of the first in another order."""
    sizes: dict[str, Any] = {"hidden_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4}
    counts: dict[str, Any] = {
        "num_hidden_layers": 1,
        "intermediate_size": 3,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
    }
    tiny.save_mixtral(folder, **sizes, **counts)
    tensors = load_file(folder / "model.safetensors")
    by_hand = {
        "0.w1": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]],
        "0.w3": [[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]],
        "0.w2": [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]],
        # Its units are the third of the other, the first and the second, each a little off.
        "1.w1": [[0, 0, 3, 0], [1, 0, 0, 1], [0, 1, 0, 0]],
        "1.w3": [[0, 0, 2, 0], [2, 0, 0, 0], [0, 2, 0, 4]],
        "1.w2": [[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 8]],
    }
    for name, rows in by_hand.items():
        number, projection = name.split(".")
        key = f"model.layers.0.block_sparse_moe.experts.{number}.{projection}.weight"
        assert tensors[key].shape == torch.tensor(rows).shape
        tensors[key] = torch.tensor(rows, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_merge_of_two_experts_of_three_units_by_hand(tmp_path: Path) -> None:
    folder, out = three_units(tmp_path / "moe"), tmp_path / "out"
    before = load_file(folder / "model.safetensors")
    with open_sources([str(folder)], out) as sources:
        groups = {0: [Group([0, 1], [0.75, 0.25])]}
        plan = plan_pruning(sources.readers, {"keep_experts": 2, "merge": "ream"}, {0: [0, 2]}, 10**9, groups)
        write_out(plan, sources, out, 1, {}, False, lambda *_: None)
        assert prove(plan, sources, out, "full", 1, lambda *_: None).tensors == len(plan.tensors)
    after = load_file(out / "model.safetensors")
    prefix = "model.layers.0.block_sparse_moe"
    wanted = {  # three quarters of the first and a quarter of the second, whose units are taken in the order 1, 2, 0
        "w1": [[1, 0, 0, 0.25], [0, 1, 0, 0], [0, 0, 1.5, 0]],
        "w3": [[2, 0, 0, 0], [0, 2, 0, 1], [0, 0, 2, 0]],
        "w2": [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 2, 0]],
    }
    for name, rows in wanted.items():
        assert after[f"{prefix}.experts.0.{name}.weight"].tolist() == rows
        kept = before[f"{prefix}.experts.2.{name}.weight"]
        assert torch.equal(after[f"{prefix}.experts.1.{name}.weight"], kept)
    assert torch.equal(after[f"{prefix}.gate.weight"], before[f"{prefix}.gate.weight"][[0, 2]])
