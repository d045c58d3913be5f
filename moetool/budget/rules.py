"""Rules of thumb from papers: whether to upcycle, and with which learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MUCH_LESS = 0.1  # what "much less than" of the rule means here; the paper gives no number


def skywork(moe: float, dense: float) -> Literal["upcycle", "open", "from scratch"]:
    """Skywork-MoE's rule (Wei et al. 2024, arXiv 2406.06563, section 3).

    Upcycle if the training of the Mixture of Experts costs much less than that of the dense model did; train from
    scratch if it costs twice as much or more.

    Args:
        moe: operations of the training of the Mixture of Experts.
        dense: operations of the training that the dense model has had.
    """
    if moe >= 2 * dense:
        return "from scratch"
    return "upcycle" if moe <= MUCH_LESS * dense else "open"


@dataclass(frozen=True)
class Finding:
    """The statement of one source."""

    source: str
    says: str


ON_UPCYCLING = (
    Finding(
        "Skywork-MoE (arXiv 2406.06563)",
        "with a budget of 100 B tokens, from scratch already tied with upcycling a dense model of 300 B tokens",
    ),
    Finding(
        "Sparse Upcycling (arXiv 2212.05055)", "pays off if about 50 % of the dense model's cost is spent on top of it"
    ),
    Finding(
        "Drop-Upcycling (arXiv 2502.19261)",
        "redrawing half of each expert beat plain copies, and training from scratch over the whole 500 B tokens after"
        " 1 T dense tokens; no scaling law covers it",
    ),
)
# Sources of the peak learning rate, and where they disagree.
ON_LEARNING_RATE = (
    Finding(
        "OLMoE (issue 15 of its repository)",
        "the dense peak, 4e-4: the loss rose for about 20 B tokens, and was back where it had been after 120,000 steps",
    ),
    Finding("Sparse Upcycling (arXiv 2212.05055)", "the dense run's final rate as the peak"),
    Finding(
        "Sarashina2-8x70B (SB Intuitions)",
        "the dense run's final rate, decayed further: a higher rate raises the loss early, a lower one gains little"
        " in the end",
    ),
    Finding(
        "Skywork-MoE (arXiv 2406.06563)", "a rate that is large at first was better than a small constant one, by 3 x"
    ),
    Finding("Drop-Upcycling (arXiv 2502.19261)", "2e-4, after a dense peak of 3e-4; 500 B tokens"),
)


@dataclass(frozen=True)
class LearningRate:
    """Advice on the peak learning rate.

    Attributes:
        between: the ends of the advised range, relative to the dense run, in words.
        why: what decides.
    """

    between: str
    why: str


def learning_rate(tokens: float) -> LearningRate:
    """Where between the ends of the dense run's schedule the peak should lie.

    Args:
        tokens: of the training after upcycling.
    """
    if tokens < 20e9:
        return LearningRate(
            "between the final rate and half the peak of the dense run",
            "below 20 B tokens a run has no time to recover from the rise that a high rate causes",
        )
    if tokens > 100e9:
        return LearningRate(
            "near the peak of the dense run", "above 100 B tokens a run recovers from the rise that a high rate causes"
        )
    return LearningRate(
        "between half the peak and the peak of the dense run",
        "between 20 and 100 B tokens the sources disagree most; compare two rates in a short run",
    )
