"""Properties of the balance strategies for any number of tokens, experts and layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moetool.routing.capture import Route
from moetool.train.balance import aux, count_routes, global_aux, pooled_aux, seq_aux, z_loss
from moetool.train.coupling import erc, proxies
from moetool.train.selection import sinkhorn
from tests import tiny

sizes = st.tuples(st.integers(1, 4), st.integers(1, 60), st.integers(2, 9), st.integers(0, 2**31))
scorings = st.sampled_from(["softmax", "sigmoid"])


def logits_LTE(size: tuple[int, int, int, int], scale: float = 3.0) -> Tensor:
    layers, tokens, experts, seed = size
    return scale * torch.randn(layers, tokens, experts, generator=torch.Generator().manual_seed(seed))


def routes(logits_LTE: Tensor, indices_LTK: Tensor, scoring: str = "softmax") -> list[Route]:
    return [
        Route(layer, rows, torch.ones(chosen.shape), chosen, scoring)
        for layer, (rows, chosen) in enumerate(zip(logits_LTE, indices_LTK, strict=True))
    ]


def top(size: tuple[int, int, int, int], scoring: str = "softmax") -> list[Route]:
    logits = logits_LTE(size)
    return routes(logits, logits.topk(1 + size[3] % size[2], dim=-1).indices, scoring)


@given(size=sizes, scale=st.sampled_from([0.0, 0.1, 1.0, 5.0, 300.0]))
def test_sinkhorn_gives_every_expert_the_same_share(size: tuple[int, int, int, int], scale: float) -> None:
    logits_TE = logits_LTE(size, scale)[0]
    matrix_TE = sinkhorn(logits_TE).exp()
    # float32 knows a logit of 500 to 3e-5.
    atol = 1e-6 if scale < 300 else 1e-4
    torch.testing.assert_close(matrix_TE.sum(dim=0), torch.full((size[2],), 1 / size[2]), atol=atol, rtol=0)
    if scale <= 1:  # flat enough for the tokens to be even as well
        share = torch.full((size[1],), 1 / size[1])
        torch.testing.assert_close(matrix_TE.sum(dim=1), share, atol=0, rtol=0.02)


@given(size=sizes, shift=st.floats(-50, 50))
def test_sinkhorn_chooses_the_same_whatever_is_added_to_all_logits(
    size: tuple[int, int, int, int], shift: float
) -> None:
    logits_TE = logits_LTE(size)[0]
    torch.testing.assert_close(sinkhorn(logits_TE + shift), sinkhorn(logits_TE), atol=1e-3, rtol=1e-4)


@given(size=sizes)
def test_sinkhorn_of_equal_logits_is_uniform(size: tuple[int, int, int, int]) -> None:
    matrix_TE = sinkhorn(torch.zeros(size[1], size[2])).exp()
    torch.testing.assert_close(matrix_TE, torch.full_like(matrix_TE, 1 / matrix_TE.numel()))


@given(size=sizes, scoring=scorings)
def test_uniform_load_is_1(size: tuple[int, int, int, int], scoring: str) -> None:
    layers, tokens, experts, _ = size
    logits = logits_LTE((layers, tokens * experts, experts, size[3]))
    # Token t chooses expert t mod E and the next one: each expert has two of every E tokens.
    first = torch.arange(tokens * experts).expand(layers, -1)
    balanced = routes(logits, torch.stack([first, first + 1], dim=-1) % experts, scoring)
    for term in (aux, global_aux, pooled_aux, seq_aux):
        losses = term(tiny.forward(balanced, count_routes(balanced)))
        torch.testing.assert_close(losses, torch.ones_like(losses), atol=1e-5, rtol=0)


@given(size=sizes, scoring=scorings)
def test_aux_lies_between_0_and_the_number_of_experts(size: tuple[int, int, int, int], scoring: str) -> None:
    made = top(size, scoring)
    counts_LE = count_routes(made)
    assert counts_LE.sum().item() == sum(route.indices_TK.numel() for route in made)
    for term in (aux, pooled_aux, seq_aux):
        losses = term(tiny.forward(made, counts_LE))
        assert (losses >= 0).all()
        assert (losses <= size[2] + 1e-4).all()


@given(size=sizes)
def test_global_aux_over_one_micro_batch_is_aux(size: tuple[int, int, int, int]) -> None:
    made = top(size)
    counts_LE = count_routes(made)
    assert torch.equal(global_aux(tiny.forward(made, counts_LE)), aux(tiny.forward(made, counts_LE)))


@given(size=sizes, parts=st.integers(1, 4))
def test_global_aux_over_parts_is_aux_of_the_whole(size: tuple[int, int, int, int], parts: int) -> None:
    layers, tokens, experts, seed = size
    whole = top((layers, tokens * parts, experts, seed))
    counts_LE = count_routes(whole)
    split = [
        [Route(r.layer, r.logits_TE[s], r.weights_TK[s], r.indices_TK[s], r.scoring) for r in whole]
        for s in (slice(i * tokens, (i + 1) * tokens) for i in range(parts))
    ]
    mean = torch.stack([global_aux(tiny.forward(part, counts_LE)) for part in split]).mean(dim=0)
    torch.testing.assert_close(mean, aux(tiny.forward(whole, counts_LE)), atol=1e-5, rtol=1e-5)


@given(size=sizes, sequences=st.integers(1, 4), scoring=scorings)
def test_seq_aux_is_the_mean_of_aux_over_sequences(
    size: tuple[int, int, int, int], sequences: int, scoring: str
) -> None:
    layers, tokens, experts, seed = size
    whole = top((layers, tokens * sequences, experts, seed), scoring)
    alone = []
    for i in range(sequences):
        s = slice(i * tokens, (i + 1) * tokens)
        part = [Route(r.layer, r.logits_TE[s], r.weights_TK[s], r.indices_TK[s], r.scoring) for r in whole]
        alone.append(aux(tiny.forward(part, count_routes(part))))
    together = seq_aux(tiny.forward(whole, count_routes(whole), sequences=sequences))
    torch.testing.assert_close(together, torch.stack(alone).mean(dim=0), atol=1e-5, rtol=1e-5)


@given(size=sizes, scale=st.sampled_from([1e-3, 1.0, 100.0]))
def test_a_proxy_stays_nearest_to_its_own_row(size: tuple[int, int, int, int], scale: float) -> None:
    """Appendix B of the paper."""
    _, hidden, experts, seed = size
    generator = torch.Generator().manual_seed(seed)
    rows_ED = scale * torch.randn(experts, hidden, generator=generator, dtype=torch.float64)
    noise_ED = torch.rand(experts, hidden, generator=generator, dtype=torch.float64).round()  # as far as it may
    apart_EE = torch.cdist(proxies(rows_ED, noise_ED), rows_ED)
    assert (apart_EE.diagonal() <= apart_EE.min(dim=1).values + 1e-9 * scale).all()


@given(size=sizes, scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_erc_is_the_published_pseudocode(size: tuple[int, int, int, int], scale: float) -> None:
    """Written out over pairs; it is at least 0, and grows with its matrices."""
    width, hidden, E, seed = size
    generator = torch.Generator().manual_seed(seed)
    proxies_ED, gates_EFD = (
        torch.randn(E, hidden, generator=generator),
        torch.randn(E, width, hidden, generator=generator),
    )
    M = [[float((gates_EFD[j] @ proxies_ED[i]).norm()) for j in range(E)] for i in range(E)]
    pairs = [(i, j) for i in range(E) for j in range(E) if i != j]
    expected = sum(max(M[i][j] - M[i][i], 0) + max(M[j][i] - M[i][i], 0) for i, j in pairs) / E**2
    torch.testing.assert_close(erc(proxies_ED, gates_EFD).item(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(erc(proxies_ED, scale * gates_EFD).item(), scale * expected, atol=1e-4, rtol=1e-4)


@given(size=sizes)
def test_pooled_aux_of_one_layer_is_aux(size: tuple[int, int, int, int]) -> None:
    made = top((1, *size[1:]))
    counts_LE = count_routes(made)
    torch.testing.assert_close(pooled_aux(tiny.forward(made, counts_LE)), aux(tiny.forward(made, counts_LE)))


@given(size=sizes, shift=st.floats(0.5, 20))
def test_z_loss_grows_with_the_logits(size: tuple[int, int, int, int], shift: float) -> None:
    logits = logits_LTE(size).abs()
    indices = logits.topk(1, dim=-1).indices
    small, large = (
        z_loss(tiny.forward(routes(rows, indices), torch.zeros(0, 0, dtype=torch.int64)))
        for rows in (logits, logits + shift)
    )
    assert (large > small).all()
    assert small.shape == (size[0],)


@pytest.mark.parametrize("tokens", [256, 2048])
def test_sinkhorns_iterations_suffice(tokens: int) -> None:
    """Sums of tokens after the fixed iterations, for logits as skewed as a collapsing router's."""
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(tokens, 8, generator=generator) + 3 * torch.randn(8, generator=generator)
    share_T = sinkhorn(logits_TE).exp().sum(dim=1) * tokens
    assert (share_T - 1).abs().max() < 5e-3
