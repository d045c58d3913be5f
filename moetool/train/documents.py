"""Several documents in a sequence: transformers keeps them apart, but must not ask the device whether there are some.

It asks in every forward (`find_packed_sequence_indices`), and then the host waits until the device has done all that it
was given. The batch knows the answer while its positions are in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import masking_utils


@contextmanager
def told(positions_BS: Tensor | None) -> Iterator[None]:
    """Tell transformers while a batch runs.

    Args:
        positions_BS: of each token in its document, on the CPU; None: all of a sequence are one document.
    """
    several = positions_BS is not None and bool((positions_BS.diff(dim=-1) != 1).any())
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _number if several else _one
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def _one(position_ids: Tensor) -> None:
    """There is one document in each sequence."""


def _number(position_ids: Tensor) -> Tensor:
    """The number of each token's document in its sequence, as transformers counts them."""
    return (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
