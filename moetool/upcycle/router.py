"""How a router's rows start: shape (experts, hidden), fp32, from a generator of the layer's own."""

from __future__ import annotations

import torch


def normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    """Normal with mean 0."""
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


def uniform(shape: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    """Uniform with mean 0, as in the Drop-Upcycling runs: U(-a, a) with a = std x sqrt(3)."""
    bound = std * 3**0.5
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def zeros(shape: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    """All zeros: every token goes to the same first experts until training separates them."""
    return torch.zeros(shape, dtype=torch.float32)


def orthogonal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    """Orthogonal rows (columns, where there are more experts than hidden dimensions), entries of this rms."""
    rows = torch.empty(shape, dtype=torch.float32)
    return torch.nn.init.orthogonal_(rows, gain=std * max(shape) ** 0.5, generator=generator)
