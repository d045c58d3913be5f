"""Which elements of a tensor a process holds, where processes shard it.

A region is, for each dimension, the positions that are held: half-open runs, in the order in which they are held. All
elements whose positions are in the runs of every dimension are held, and no others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, pairwise, product
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

Runs = tuple[tuple[int, int], ...]
Region = tuple[Runs, ...]


def region(tensor: Tensor) -> Region:
    """This process's region of a tensor, which may be a DTensor with any sharding; nothing is sent.

    Torch itself splits: a dimension is sharded as a vector of its positions is. So this is right for strided shards
    and uneven ones too, of which torch's own offsets tell less.

    Raises:
        ValueError: the processes hold summands of it.
    """
    if not isinstance(tensor, DTensor):
        return everything(tensor.shape)
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"a tensor is not held, but summed: {tensor.placements}")
    return tuple(
        _runs(size, tensor.device_mesh, tuple(_along(dim, placement) for placement in tensor.placements))
        for dim, size in enumerate(tensor.shape)
    )


def everything(shape: tuple[int, ...]) -> Region:
    """The region that is all of a tensor."""
    return tuple(((0, size),) if size else () for size in shape)


def _along(dim: int, placement: Any) -> Any:
    """The placement of the vector of a dimension's positions."""
    if getattr(placement, "dim", None) != dim:
        return Replicate()
    if hasattr(placement, "split_factor"):
        return type(placement)(0, split_factor=placement.split_factor)
    return type(placement)(0)


@lru_cache(4096)
def _runs(size: int, mesh: Any, placements: tuple[Any, ...]) -> Runs:
    held = distribute_tensor(torch.arange(size), mesh, placements, src_data_rank=None).to_local().cpu()
    cuts = (held.diff() != 1).nonzero().flatten() + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in held.tensor_split(cuts) if len(run))


def extent(held: Region) -> tuple[int, ...]:
    """The shape of the region."""
    return tuple(sum(stop - start for start, stop in runs) for runs in held)


def num_elements(held: Region) -> int:
    """How many elements are held."""
    return math.prod(extent(held))


def boxes(held: Region) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """The boxes of which a region consists, as slices of the whole tensor and of the held part."""
    for box in product(
        *(zip(runs, pairwise(accumulate((b - a for a, b in runs), initial=0)), strict=True) for runs in held)
    ):
        yield tuple(slice(*there) for there, _ in box), tuple(slice(*here) for _, here in box)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, as a plain one."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed(held: Tensor, like: Tensor) -> Tensor:
    """This process's part as a tensor placed and sharded like another; nothing is sent."""
    held = held.to(like.device)
    if not isinstance(like, DTensor):
        return held
    return DTensor.from_local(
        held, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
