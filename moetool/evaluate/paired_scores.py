"""Scores side by side: standard errors, and differences paired over the same documents.

N documents. A score is a function of all documents; its linearisation gives each document an
influence u_i with sum(u) = 0, and the standard error of the score is sqrt(N / (N - 1) sum(u_i^2))
(the delta method; for a mean it is the usual one). Both models see the same documents, so the
difference of their scores has the influences u_i - v_i: a document's difficulty for both models cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from lm_eval.api import metrics as lm

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Items = Sequence[Any]

# Metrics without a closed form (F1, BLEU, a task's own aggregation) use a bootstrap. With many documents, where each
# resample can take seconds, they use the spread over groups of documents, which costs one pass.
BOOTSTRAP = 200
MANY, GROUPS = 2000, 50
NOISE = 2.0  # a difference counts if it is larger than this many standard errors


def influences(aggregation: Callable[[Items], float], items: Items) -> Array | None:
    """The influence of each document on a score, (N,), or None where no formula is known.

    Args:
        aggregation: lm-eval's aggregation of the metric.
        items: one value per document, a number or (log-likelihood, weight).
    """
    try:
        values = np.asarray(items, dtype=np.float64) if aggregation in _NUMERIC else None
    except ValueError:  # a saved result may hold anything
        values = None
    if values is None or values.shape[1:] != (() if aggregation in (lm.mean, lm.perplexity) else (2,)):
        return None
    if aggregation is lm.mean:
        influence: Array = (values - values.mean()) / len(values)
    elif aggregation is lm.perplexity:  # exp(-mean)
        influence = -math.exp(-values.mean()) * (values - values.mean()) / len(values)
    else:  # a ratio R = -sum(log-likelihood) / sum(weight): u_i = (-l_i - R w_i) / sum(w)
        loglikelihood, weight = values.T
        ratio = -loglikelihood.sum() / weight.sum()
        influence = (-loglikelihood - ratio * weight) / weight.sum()
        # bits per byte = R / ln 2; perplexity = exp(R), whose derivative is itself.
        influence *= 1 / math.log(2) if aggregation is lm.bits_per_byte else math.exp(ratio)
    return influence


_NUMERIC = (lm.mean, lm.perplexity, lm.bits_per_byte, lm.weighted_perplexity)


def standard_error(influence: Array) -> float | None:
    """sqrt(N / (N - 1) sum(u_i^2)); None for fewer than two documents."""
    n = len(influence)
    return math.sqrt(n / (n - 1) * float((influence**2).sum())) if n > 1 else None


def paired_difference(
    aggregation: Callable[[Items], float], items: Mapping[Any, Any], baseline: Mapping[Any, Any]
) -> tuple[float, float | None]:
    """The difference of two models' scores on the documents that both answered, and its standard error.

    Args:
        aggregation: lm-eval's aggregation of the metric.
        items: document -> its value for the model.
        baseline: document -> its value for the baseline.

    Returns:
        score - baseline's score, and its standard error (None if there is no estimate).
    """
    common = [document for document in items if document in baseline]
    if not common:
        return math.nan, None
    ours, theirs = [items[d] for d in common], [baseline[d] for d in common]
    difference = float(aggregation(ours)) - float(aggregation(theirs))
    u, v = influences(aggregation, ours), influences(aggregation, theirs)
    if u is not None and v is not None:
        return difference, standard_error(u - v)
    if len(common) < 2:
        return difference, None
    draw = np.random.default_rng(0)
    if len(common) > MANY:
        chosen = np.array_split(draw.permutation(len(common)), GROUPS)
    else:
        chosen = [draw.integers(len(common), size=len(common)) for _ in range(BOOTSTRAP)]
    spread = np.std(
        [float(aggregation([ours[i] for i in c])) - float(aggregation([theirs[i] for i in c])) for c in chosen], ddof=1
    )
    return difference, float(spread / math.sqrt(GROUPS) if len(common) > MANY else spread)


def combine(
    parts: Sequence[tuple[float, float | None]], weights: Sequence[float] | None = None
) -> tuple[float, float | None]:
    """The weighted mean of independent estimates (value, standard error), and its standard error.

    sqrt(sum (w_i s_i)^2) with weights that sum to 1; None if a part has none.
    """
    weights = weights or [1.0] * len(parts)
    total = sum(weights)
    value = sum(w * v for w, (v, _) in zip(weights, parts, strict=True)) / total
    errors = [error for _, error in parts]
    if any(error is None for error in errors):
        return value, None
    return value, math.sqrt(sum((w * (e or 0.0)) ** 2 for w, e in zip(weights, errors, strict=True))) / total


def outside_noise(difference: float, error: float | None) -> bool:
    """Whether a difference is larger than `NOISE` standard errors."""
    return error is not None and abs(difference) > NOISE * error
