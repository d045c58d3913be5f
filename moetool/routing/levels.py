"""The balance of a layer's load in one word: balanced, skewed or collapsed.

Top-k cannot load fewer than K experts, so entropy never falls below log K / log E: what is judged is where it lies
between that floor (0) and balance (1), the layer's spread. The bounds are where this tool draws the line, not laws: of
the released 8 x 1.5B models of the Drop-Upcycling authors, the one upcycled by plain copying (mean entropy 0.44, spread
0.16) falls under `collapsed`, those from scratch (0.73, 0.60) and with drop ratio 0.5 (0.76, 0.64) under `skewed`.

Shapes: E experts. K is the top-k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# An expert is dead when its load is below this share of the balanced load 1 / E. With eight experts
# that is 1 % of the routes, the bound under which the released Drop-Upcycling models were examined;
# as a share of the balanced load it means the same for 8 and for 128 experts.
DEAD_LOAD = 0.08

COLLAPSED_SPREAD = 0.4
BALANCED_SPREAD = 0.85
BALANCED_MRI_NORMALIZED = 2.0


def spread(entropy: float, num_experts: int, top_k: int) -> float:
    """The entropy of a load between its floor (0) and balance (1).

    Args:
        entropy: divided by log E, as everywhere.
        num_experts: E.
        top_k: K, below E.
    """
    floor = math.log(top_k) / math.log(num_experts)
    return (entropy - floor) / (1 - floor)


def level(entropy: float, mri: float, num_dead: int, num_experts: int, top_k: int) -> str:
    """The word for a layer.

    Args:
        entropy: of its load, divided by log E.
        mri: largest share of tokens that an expert receives.
        num_dead: how many experts are dead.
        num_experts: E.
        top_k: K.
    """
    if top_k >= num_experts:
        return "balanced"
    even = spread(entropy, num_experts, top_k)
    if even < COLLAPSED_SPREAD:
        return "collapsed"
    skewed = even < BALANCED_SPREAD or mri * num_experts / top_k > BALANCED_MRI_NORMALIZED or num_dead > 0
    return "skewed" if skewed else "balanced"


def level_of_load(load_E: Sequence[float], top_k: int) -> str:
    """The word for a layer, from its load: the experts' shares of its routes, which sum to 1."""
    E = len(load_E)
    if top_k >= E:
        return "balanced"
    entropy = -sum(share * math.log(share) for share in load_E if share > 0) / math.log(E)
    dead = sum(share < DEAD_LOAD / E for share in load_E)
    return level(entropy, max(load_E) * top_k, dead, E, top_k)
