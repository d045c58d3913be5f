"""Units of a dense FFN by contribution: how it is recorded, how they are split, and which are redrawn.

Integers alone decide what is rebuilt from a recipe, so that every machine has the same sets.

Shapes: F units, G shards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moetool.errors import CheckpointError
from moetool.measured import unpacked

if TYPE_CHECKING:
    import torch

STEPS = 16  # of a code, for each factor of 2 between contributions
LAST = 255  # the code of contributions that are 2^-16 of the largest, or less
FRACTION = 28  # bits of a logarithm behind the point
WEIGHT = 12  # bits of a weight behind the point


def shard_dtype(parts: int) -> torch.dtype:
    """The smallest type that holds the number of a shard."""
    import torch

    return torch.uint8 if parts <= 256 else torch.int32


def order_of(recorded: Any, units: int, parts: int, layer: int) -> torch.Tensor:
    """The units of a dense FFN shard by shard, ascending within each: int64 (F,), position -> unit.

    Args:
        recorded: the packed shard of each unit.
        units: F.
        parts: G.
        layer: for errors.

    Raises:
        CheckpointError: it is absent, or its shards are not of equal size.
    """
    import torch

    if recorded is None:
        raise CheckpointError(f"moetool.json: measured has no split of layer {layer}; it was edited")
    shard_F = unpacked(recorded, shard_dtype(parts), (units,)).long()
    sizes = torch.bincount(shard_F.clamp(min=0), minlength=parts).tolist()
    if sizes != [units // parts] * parts:
        raise CheckpointError(f"moetool.json: the split of layer {layer} is not one into equal parts; it was edited")
    return shard_F.argsort(stable=True)


def contribution_codes(contribution_F: torch.Tensor) -> torch.Tensor:
    """uint8 (F,): c such that a contribution is about 2^(-c / 16) of the largest one; 255 where it is less than that.

    Args:
        contribution_F: not negative.
    """
    import torch

    ratio_F = contribution_F.double() / contribution_F.max().double().clamp(min=torch.finfo(torch.float64).tiny)
    steps_F = (-STEPS * ratio_F.clamp(min=2.0**-20).log2()).round()
    return steps_F.clamp(0, LAST).to(torch.uint8)


def least_used(codes_F: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """A random choice of units, without replacement, those of small contributions more often: int64, ascending.

    Each draw takes one of the units that are left with a probability inversely proportional to its contribution.

    Args:
        codes_F: contributions, see `contribution_codes`.
        count: units to choose.
        draw: of this choice's own.
    """
    return keys(codes_F, draw).sort(stable=True).indices[:count].sort().values


def keys(codes_F: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """int64 (F,): E / weight, of which the smallest are chosen; E is exponential, a weight one over a contribution.

    That is Gumbel top-k (Efraimidis and Spirakis 2006). E = -log2 u has 28 bits behind the point, weights have 12: no
    product reaches 2^62, and none is rounded.
    """
    import torch

    uniform_F = torch.randint(1, 2**31, codes_F.shape, generator=draw)
    roots = [round(2 ** (step / STEPS) * 2**WEIGHT) for step in range(STEPS)]
    inverse = torch.tensor([roots[step % STEPS] << step // STEPS for step in range(LAST + 1)])
    return _minus_log2(uniform_F) * inverse[LAST - codes_F.long()]


def _minus_log2(uniform_F: torch.Tensor) -> torch.Tensor:
    """-log2(u / 2^31) in units of 2^-28, for integers 0 < u < 2^31, in integers: a bit for each squaring."""
    import torch

    mantissa_F, exponent_F = torch.frexp(uniform_F.double())  # exact: u has 31 bits
    x_F = (mantissa_F * 2**31).long()  # in [2^30, 2^31), stands for [1, 2)
    log_F = exponent_F.long() - 1
    for _ in range(FRACTION):
        x_F = (x_F * x_F) >> 30
        bit_F = x_F >> 31
        log_F = 2 * log_F + bit_F
        x_F = x_F >> bit_F
    return (31 << FRACTION) - log_F
