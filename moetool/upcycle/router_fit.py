"""A router's rows from its inputs on text: balanced, or sending each donor's text to that donor's experts.

Shapes: T tokens, D hidden, G groups of experts, N donors, V directions. A group has one row, and is one expert unless
experts hold parts of an FFN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moetool.measured import RouterRows

SAMPLE = 16_384  # tokens whose inputs are kept, of all texts together, about as many of each
SAMPLE_BYTES = 2**28
RIDGE = 1e-2  # of the mean squared input
# Logit of all but a thousandth of the tokens. Sigmoids of large logits, and sums of scores and a bias, are so close
# together that they tie in fp32, and a tie splits a group.
LARGEST, LARGEST_SCORE = 16.0, 4.0
BESIDE = 0.1  # spread of the logits of a donor's experts, relative to that between donors
ROUNDS = 200
BALANCED = 2**19  # logits that are balanced: fewer tokens where there are many groups
CLOSE = 0.01  # to the balanced share, relative


@dataclass
class Inputs:
    """A router's inputs from one text.

    Attributes:
        tokens: how many.
        sum_D: their sum, float64.
        second_DD: the sum of x x^T, float64; None where it is not needed.
        sample: some of them, float32 (T, D) each.
    """

    sum_D: Tensor
    second_DD: Tensor | None
    tokens: int = 0
    sample: list[Tensor] = field(default_factory=list)

    @classmethod
    def zeros(cls, hidden: int, second: bool) -> Inputs:
        """The inputs of no tokens."""
        square_DD = torch.zeros(hidden, hidden, dtype=torch.float64) if second else None
        return cls(torch.zeros(hidden, dtype=torch.float64), square_DD)

    def add(self, hidden_TD: Tensor, every: int) -> None:
        """More tokens, of which each `every`-th is kept."""
        hidden_TD = hidden_TD.float()
        first = -self.tokens % every
        self.tokens += len(hidden_TD)
        self.sum_D += hidden_TD.sum(0).double().cpu()
        if self.second_DD is not None:
            self.second_DD += (hidden_TD.T @ hidden_TD).double().cpu()
        self.sample.append(hidden_TD[first::every].cpu())

    @property
    def sample_TD(self) -> Tensor:
        """The sample."""
        return torch.cat(self.sample)


@dataclass(frozen=True)
class Wanted:
    """The goal of fitting a router.

    Attributes:
        donor_G: int64, the donor of each group; all 0 for `balanced`.
        chosen: groups per token.
        score: logits (T, G) -> what is ranked, in the same order.
        close: whether what is ranked of large logits is close together.
        biased: whether the family has a selection bias, which then makes the balance.
    """

    donor_G: Tensor
    chosen: int
    score: Callable[[Tensor], Tensor]
    close: bool
    biased: bool


def fit(drawn_GD: Tensor, texts: Sequence[Inputs], wanted: Wanted) -> RouterRows:
    """Rows that are balanced on some texts, of which each has the same weight.

    Without donors, the mean input's direction is taken out of random rows, so that logits have mean 0; each row gets
    the same spread of logits, the mean of what the random rows have; and each logit is shifted until the groups get
    equal shares of the tokens. The shift is a multiple of the direction that is most like an intercept (ridge
    regression of 1 on the inputs; the mean's own direction moves many tokens the wrong way where it holds little of
    their energy, as before the first layer), or a selection bias.

    With donors, text n is the domain of donor n. Ridge regression of the domains, one-hot, on the inputs, without an
    intercept, gives a row per donor: W = (mean x x^T + lambda I)^-1 mean x y^T, with lambda a hundredth of the mean
    squared input (the closed form of DUME, arXiv 2603.29765, with a lambda that has the inputs' scale). One factor
    makes the softmax of W x as good a probability of the domain as it can be. A donor's groups share that row, and
    have balanced random rows beside it by which they share the donor's tokens.

    Args:
        drawn_GD: random rows.
        texts: what the router receives.
        wanted: what it is for.
    """
    mean_D = torch.stack([text.sum_D / text.tokens for text in texts]).mean(0).bfloat16()
    num_donors = int(wanted.donor_G.max()) + 1
    ridge_ND = ridge(texts).bfloat16() if num_donors > 1 else torch.empty(0, len(mean_D), dtype=torch.bfloat16)
    samples = [text.sample_TD for text in texts]
    # Of each text as many, so that each counts the same; those of a shorter one several times.
    size = max(len(sample_TD) for sample_TD in samples)
    hidden_TD = torch.cat([sample_TD[torch.arange(size) * len(sample_TD) // size] for sample_TD in samples])
    donors_TG, sharpness = torch.zeros(len(hidden_TD), len(drawn_GD), dtype=torch.float64), 0.0
    if num_donors > 1:
        donors_TN = (hidden_TD @ ridge_ND.float().T).double()
        labels_T = torch.arange(len(texts)).repeat_interleave(size)
        sharpness = sharpest(donors_TN, labels_T, LARGEST_SCORE if wanted.close else LARGEST)
        donors_TG = sharpness * donors_TN[:, wanted.donor_G]
    length = float(mean_D.double().square().sum().clamp_min(torch.finfo(torch.float64).tiny))
    along_T = (hidden_TD @ mean_D.float()).double()
    onto_G = drawn_GD.double() @ mean_D.double() / length
    random_TG = (hidden_TD @ drawn_GD.T).double()
    centred_TG = random_TG - along_T[:, None] * onto_G
    spread_G = centred_TG.std(0)
    target = float(random_TG.std(0).mean())
    if num_donors > 1:
        target = min(target, BESIDE * float((donors_TG - donors_TG.mean(1, keepdim=True)).square().mean().sqrt()))
    factor_G = torch.where(spread_G > 0, target / spread_G, 0.0)
    if num_donors == len(drawn_GD):
        factor_G = torch.zeros_like(factor_G)  # one group each: nothing to share
    logits_TG = donors_TG + factor_G * centred_TG
    one_D = intercept(hidden_TD).bfloat16()
    slope_T = None if wanted.biased else (hidden_TD @ one_D.float()).double()
    every = -(-logits_TG.numel() // BALANCED)
    shift_G = balance(logits_TG[::every], None if slope_T is None else slope_T[::every], wanted)
    plain_GV = torch.stack([-factor_G * onto_G, torch.zeros_like(shift_G) if wanted.biased else shift_G], dim=1)
    donor_mix_GN = sharpness * torch.nn.functional.one_hot(wanted.donor_G, num_donors)[:, : len(ridge_ND)].double()
    mix_GV = torch.cat([plain_GV, donor_mix_GN], dim=1)
    bias_G = shift_G.float() if wanted.biased else None
    return RouterRows(torch.cat([mean_D[None], one_D[None], ridge_ND]), factor_G, mix_GV, bias_G)


def ridge(texts: Sequence[Inputs]) -> Tensor:
    """(N, D) float64, the ridge regression of which text an input is of; rows sum to 0, because a constant that all
    logits have in common changes no softmax."""
    second_DD = torch.stack([_second(text) / text.tokens for text in texts]).mean(0)
    means_ND = torch.stack([text.sum_D / text.tokens for text in texts]) / len(texts)
    penalty = RIDGE * second_DD.diagonal().mean()
    if penalty == 0:  # nothing but zeros reaches the router
        return torch.zeros_like(means_ND)
    ridge_DD = second_DD + penalty * torch.eye(len(second_DD), dtype=torch.float64)
    rows_ND: Tensor = torch.linalg.solve(ridge_DD, means_ND.T).T
    return rows_ND - rows_ND.mean(0)


def intercept(hidden_TD: Tensor) -> Tensor:
    """(D,) float64, the direction v with v . x as near to 1 as ridge regression makes it."""
    second_DD = (hidden_TD.T @ hidden_TD).double() / len(hidden_TD)
    penalty = RIDGE * second_DD.diagonal().mean()
    if penalty == 0:
        return torch.zeros(len(second_DD), dtype=torch.float64)
    found_D: Tensor = torch.linalg.solve(
        second_DD + penalty * torch.eye(len(second_DD), dtype=torch.float64), hidden_TD.double().mean(0)
    )
    return found_D


def _second(text: Inputs) -> Tensor:
    assert text.second_DD is not None
    return text.second_DD


def sharpest(logits_TN: Tensor, labels_T: Tensor, largest: float) -> float:
    """The factor by which the softmax of logits predicts labels best, in cross-entropy; it is convex in the factor.

    Args:
        logits_TN: float64.
        labels_T: int64.
        largest: size of a logit that all but a thousandth of the tokens may get.
    """
    size = float(torch.quantile(logits_TN.abs().max(1).values, 0.999))
    low, high = 0.0, largest / size if size > 0 else 0.0
    golden = (math.sqrt(5) - 1) / 2

    def loss(factor: float) -> float:
        return float(torch.nn.functional.cross_entropy(factor * logits_TN, labels_T))

    for _ in range(60):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return (low + high) / 2


def balance(logits_TG: Tensor, slope_T: Tensor | None, wanted: Wanted) -> Tensor:
    """(G,) float64, shifts with which the groups of each donor get equal shares of the tokens that go to the donor.

    A group with too large a share is shifted down, one with too small a share up, in proportion to what it is off.

    Args:
        logits_TG: float64.
        slope_T: by what a shift of 1 moves a token's logits; None: it moves what is ranked, by 1.
        wanted: see there.
    """
    G, donor_G = logits_TG.shape[1], wanted.donor_G
    members_N = torch.bincount(donor_G).double()
    share = wanted.chosen / G

    def ranked(shift_G: Tensor) -> Tensor:
        if slope_T is None:
            return wanted.score(logits_TG) + shift_G
        return wanted.score(logits_TG + slope_T[:, None] * shift_G)

    shift_G = torch.zeros(G, dtype=torch.float64)
    best_G, best = shift_G, math.inf
    start = ranked(shift_G) if slope_T is None else logits_TG
    step = float((start - start.mean(1, keepdim=True)).std()) / 4
    for _ in range(ROUNDS):
        chosen_TK = ranked(shift_G).topk(wanted.chosen, dim=-1).indices
        load_G = torch.bincount(chosen_TK.flatten(), minlength=G).double() / len(logits_TG)
        equal_N = torch.zeros_like(members_N).index_add_(0, donor_G, load_G) / members_N
        off_G = load_G - equal_N[donor_G]
        if float(off_G.abs().max()) < best:
            best_G, best = shift_G, float(off_G.abs().max())
        if best < max(CLOSE * share, 3 / len(logits_TG)):  # or a few tokens
            break
        shift_G = shift_G - step * off_G / share
    return best_G
