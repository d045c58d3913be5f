"""A joint scaling law of dense, upcycled and from-scratch training, and its valid range.

Liew, Kato, Takase 2025 (Scaling Laws for Upcycling Mixture-of-Experts Language Models, arXiv 2502.03009), equation 12
with the constants of table 2. D1 are tokens of dense pretraining, D2 tokens of training after it, N1 parameters of the
dense model; losses are in nats per token of their corpus. Upcycling there is a plain copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

SOURCE = "Liew, Kato, Takase 2025, arXiv 2502.03009, equation 12 and table 2"
END = 0.165  # E, which the three laws have in common
# The declared range. The paper trained Mixtral-like models of 8 experts, top-2, of up to 8 x 1 B on a corpus of 368 B
# tokens; twice the size and three times the tokens are still generous. Below a billion training tokens the curve of
# upcycling rises without bound, where a real start is exact.
PARAMETERS = (1e8, 2e9)
DENSE_TOKENS = (1e9, 1e12)
TRAIN_TOKENS = (1e9, 368e9)
EXPERTS, TOP_K = 8, 2
FAR = 1e15  # tokens; a crossing beyond is none


def dense_loss(tokens: float, parameters: float) -> float:
    """Loss of a dense model.

    Args:
        tokens: of its training.
        parameters: of the model.
    """
    return 8.83 * math.pow(tokens, -0.088) + 12.3 * math.pow(parameters, -0.116) + END


def scratch_loss(tokens: float, parameters: float) -> float:
    """Loss of a Mixture of Experts that is trained from random weights.

    Args:
        tokens: of its training.
        parameters: of a dense model of its depth and width.
    """
    return 32.0 * math.pow(tokens, -0.161) + 7.05 * math.pow(parameters, -0.080) + END


def upcycled_loss(dense_tokens: float, tokens: float, parameters: float) -> float:
    """Loss of a Mixture of Experts made of copies of a dense model, after further training.

    Args:
        dense_tokens: of the dense model's training.
        tokens: of the training after that.
        parameters: of the dense model.
    """
    learned = 16.3 * math.pow(dense_tokens, -0.043) * math.pow(tokens, _slope(dense_tokens))
    return learned + 8.53 * math.pow(parameters, -0.112) + END


def _slope(dense_tokens: float) -> float:
    return -0.085 + 7.98e-4 * math.log(dense_tokens)


@dataclass(frozen=True)
class Verdict:
    """The law's predictions for a case inside its range.

    Attributes:
        start: loss of the dense model as it is.
        dense: of the dense model after as many more tokens.
        upcycled: of copies after them.
        scratch: of a Mixture of Experts that has seen nothing else.
        break_even: training tokens from which copies are below the dense model as it was; None if never.
        beats_dense: training tokens from which copies are below the dense model trained as long; None if never.
        scratch_wins: training tokens from which a Mixture of Experts from scratch is below copies; None if never.
    """

    start: float
    dense: float
    upcycled: float
    scratch: float
    break_even: float | None
    beats_dense: float | None
    scratch_wins: float | None


def outside(
    parameters: float,
    dense_tokens: float,
    tokens: float,
    num_experts: int,
    top_k: int,
    granularity: int,
    shared: int,
    dense_layers: int = 0,
) -> list[str]:
    """Why a case is outside the range in which the law was fitted; empty where it is inside.

    Args:
        parameters: of the dense model.
        dense_tokens: of its training.
        tokens: of the training after that.
        num_experts: of a layer.
        top_k: experts of a token.
        granularity: parts of a dense FFN.
        shared: experts that every token uses.
        dense_layers: layers that get no experts.
    """
    found = []
    for what, value, (low, high), much in (
        ("parameters", parameters, PARAMETERS, "0.1 to 2 B"),
        ("dense tokens", dense_tokens, DENSE_TOKENS, "1 B to 1 T"),
        ("training tokens", tokens, TRAIN_TOKENS, "1 to 368 B"),
    ):
        if not low <= value <= high:
            found.append(f"{_short(value)} {what}, and the law holds for {much}")
    if (num_experts, top_k, granularity, shared) != (EXPERTS, TOP_K, 1, 0):
        finer = f" of 1/{granularity} FFN" if granularity > 1 else ""
        more = f" and {shared} shared" if shared else ""
        found.append(
            f"{num_experts} experts{finer}, top-{top_k}{more}, and the law is that of {EXPERTS} whole ones, top-{TOP_K}"
        )
    if dense_layers:
        found.append(f"{dense_layers} layers without experts, and the law is that of experts in all")
    return found


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def verdict(parameters: float, dense_tokens: float, tokens: float) -> Verdict:
    """The losses and crossings of a case; whether they may be believed is for `outside` to say.

    Args:
        parameters: of the dense model.
        dense_tokens: of its training.
        tokens: of the training after that.
    """
    start = dense_loss(dense_tokens, parameters)
    return Verdict(
        start=start,
        dense=dense_loss(dense_tokens + tokens, parameters),
        upcycled=upcycled_loss(dense_tokens, tokens, parameters),
        scratch=scratch_loss(tokens, parameters),
        break_even=first(lambda D2: upcycled_loss(dense_tokens, D2, parameters) - start),
        beats_dense=first(
            lambda D2: upcycled_loss(dense_tokens, D2, parameters) - dense_loss(dense_tokens + D2, parameters)
        ),
        scratch_wins=first(lambda D2: scratch_loss(D2, parameters) - upcycled_loss(dense_tokens, D2, parameters)),
    )


def first(above: Callable[[float], float]) -> float | None:
    """The first number of tokens at which a difference is no longer above zero; None where it stays above.

    Found on a grid of a thirtieth of a decade from a million tokens on, then by bisection.

    Args:
        above: training tokens -> the difference of two losses.
    """
    low = 1e6
    if above(low) <= 0:
        return low
    while low < FAR:
        high = low * 10 ** (1 / 30)
        if above(high) <= 0:
            for _ in range(50):
                middle = math.sqrt(low * high)
                low, high = (low, middle) if above(middle) <= 0 else (middle, high)
            return high
        low = high
    return None
