"""Balance losses against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetool import registry
from moetool.checkpoint.model import load_model
from moetool.errors import ConfigError
from moetool.routing.capture import Route, RouterCapture
from moetool.train import balance
from moetool.train.balance import AdaptiveAux, aux, count_routes, global_aux, pooled_aux, seq_aux, z_loss
from moetool.train.coupling import Erc, erc, proxies
from moetool.train.terms import Forward
from tests import tiny


def route(logits: list[list[float]], chosen: list[list[int]], layer: int = 0) -> Route:
    indices_TK = torch.tensor(chosen)
    return Route(layer, torch.tensor(logits, requires_grad=True), torch.ones(indices_TK.shape), indices_TK)


def losses(term: Callable[[Forward], torch.Tensor], routes: list[Route]) -> torch.Tensor:
    """Of a step of one micro-batch on one process."""
    return term(tiny.forward(routes, count_routes(routes)))


def collapsed() -> list[Route]:
    """Two layers of two experts: one sends everything to the first, the other to the second."""
    up, down = [[30.0, 0.0]] * 4, [[0.0, 30.0]] * 4
    return [route(up, [[0]] * 4, 0), route(down, [[1]] * 4, 1)]


def test_aux_by_hand() -> None:
    # softmax of (ln 3, 0) is (3/4, 1/4); of (0, 0) it is (1/2, 1/2). P = (5/8, 3/8); both tokens chose
    # expert 0: f = (1, 0). E * sum f P = 2 * 5/8.
    (loss,) = losses(aux, [route([[math.log(3), 0.0], [0.0, 0.0]], [[0], [0]])])
    assert loss.item() == pytest.approx(1.25)
    # One token each way: f = (1/2, 1/2), so 2 * (5/8 + 3/8) / 2 = 1 whatever P is.
    (loss,) = losses(aux, [route([[math.log(3), 0.0], [0.0, 0.0]], [[0], [1]])])
    assert loss.item() == pytest.approx(1.0)


def test_aux_counts_all_k_routes_and_is_1_when_balanced() -> None:
    # 3 tokens, top-2 of 3: each expert has 2 of the 6 routes.
    (loss,) = losses(aux, [route([[0.0] * 3] * 3, [[0, 1], [1, 2], [2, 0]])])
    assert loss.item() == pytest.approx(1.0)
    # P = (1/2, 1/4, 1/4), f = (1/2, 1/2, 0): 3 * (1/4 + 1/8).
    (loss,) = losses(aux, [route([[math.log(2), 0.0, 0.0]] * 2, [[0, 1], [1, 0]])])
    assert loss.item() == pytest.approx(9 / 8)


def test_opposite_collapse_in_two_layers_is_not_balance() -> None:
    losses_L = losses(aux, collapsed())
    assert losses_L.tolist() == pytest.approx([2.0, 2.0])


def test_opposite_collapse_is_balance_once_layers_are_pooled() -> None:
    assert losses(pooled_aux, collapsed()).tolist() == pytest.approx([1.0])


def test_pooled_aux_by_hand() -> None:
    # Layer 0: P = (3/4, 1/4), both tokens to expert 0; layer 1: P = (1/2, 1/2), one each.
    # Pooled: P = (5/8, 3/8), f = (3/4, 1/4): 2 * (15/32 + 3/32).
    routes = [route([[math.log(3), 0.0]] * 2, [[0], [0]], 0), route([[0.0, 0.0]] * 2, [[0], [1]], 1)]
    assert losses(pooled_aux, routes).tolist() == pytest.approx([9 / 8])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_transformers_loss_is_pooled_aux_times_k(top_k: int) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = [torch.randn(50, 5, generator=torch.Generator().manual_seed(layer)) for layer in range(3)]
    routes = [route(rows.tolist(), rows.topk(top_k).indices.tolist(), i) for i, rows in enumerate(logits)]
    expected = load_balancing_loss_func(tuple(logits), 5, top_k)
    assert top_k * losses(pooled_aux, routes).item() == pytest.approx(expected.item(), rel=1e-5)


def test_global_aux_takes_its_load_from_the_step_and_its_probabilities_from_the_micro_batch() -> None:
    # This micro-batch sends all to expert 0, an earlier one (or another process) sent as much to expert 1:
    # f = (1/2, 1/2), so the value is 1 and there is no gradient, where aux has 2 * 3/4 and one.
    routes = [route([[math.log(3), 0.0]] * 2, [[0], [0]])]
    step_counts_LE = count_routes(routes) + torch.tensor([[0, 2]])
    (loss,) = global_aux(tiny.forward(routes, count_routes(routes), step_counts_LE))
    assert loss.item() == pytest.approx(1.0)
    loss.backward()
    gradient_TE = routes[0].logits_TE.grad
    assert gradient_TE is not None
    assert gradient_TE.abs().max().item() == pytest.approx(0.0, abs=1e-7)
    assert losses(aux, routes).item() == pytest.approx(1.5)
    # Counts 6 to 2: f = (3/4, 1/4), P = (3/4, 1/4): 2 * 10/16.
    assert global_aux(tiny.forward(routes, count_routes(routes), torch.tensor([[6, 2]]))).item() == pytest.approx(1.25)


def test_seq_aux_by_hand() -> None:
    # Two sequences of two tokens. The first sends both to expert 0 with P = (3/4, 1/4): 2 * 3/4. The second sends both
    # to expert 1 with P = (1/2, 1/2): 2 * 1/2. Together they look balanced: aux is 1.
    routes = [route([[math.log(3), 0.0]] * 2 + [[0.0, 0.0]] * 2, [[0], [0], [1], [1]])]
    counts_LE = count_routes(routes)
    assert seq_aux(tiny.forward(routes, counts_LE, sequences=2)).tolist() == pytest.approx([1.25])
    assert seq_aux(tiny.forward(routes, counts_LE)).tolist() == pytest.approx([1.0])
    # Top-2 of 3 over 2 tokens, sigmoid scores 1/2, 1/4, 1/4: P = (1/2, 1/4, 1/4). Routes 2, 1, 1 of K T = 4, so
    # f = 3/4 * (2, 1, 1) and the loss 3/4 * (1 + 1/4 + 1/4).
    logits = [[0.0, -math.log(3), -math.log(3)]] * 2
    sigmoid = replace(route(logits, [[0, 1], [2, 0]]), scoring="sigmoid")
    assert losses(seq_aux, [sigmoid]).tolist() == pytest.approx([9 / 8])


def adaptive(most: float, layers: int) -> AdaptiveAux:
    capture = RouterCapture.__new__(RouterCapture)  # of which only the layers are read
    capture.layers = list(range(layers))
    return AdaptiveAux(torch.nn.Identity(), capture, most)


def coefficients(strategy: AdaptiveAux) -> list[float]:
    return strategy.state["adaptive-aux"].tolist()


def test_adaptive_coefficients_by_hand() -> None:
    strategy = adaptive(0.01, 2)
    assert coefficients(strategy) == [0.01, 0.01]
    # Layer 0 uses 2 of 8 experts: d = 2 * (1/2 - 1.25/8) = 0.6875, a fifth of which is above 0.01. Layer 1 is balanced.
    counts_LE = torch.tensor([[4, 4, 0, 0, 0, 0, 0, 0], [1] * 8])
    for step in range(68):
        strategy.update(counts_LE, step + 1)
    assert coefficients(strategy)[0] == pytest.approx(0.01, rel=1e-12)
    assert coefficients(strategy)[1] > 0.005  # 0.99 ** 68 = 0.5049, 0.99 ** 69 = 0.4998
    strategy.update(counts_LE, 69)
    assert coefficients(strategy)[1] == pytest.approx(0.01 * 0.49984, rel=1e-4)
    # Loads of 2/5 and thrice 1/5: d = 2/5 - 1.25/4 = 0.0875, so a moves by a hundredth of the way to 0.0175.
    strategy = adaptive(0.1, 1)
    strategy.update(torch.tensor([[4, 2, 2, 2]]), 1)
    assert coefficients(strategy) == pytest.approx([0.099 + 0.000175])


def test_adaptive_aux_begins_as_aux_and_weighs_layers_before_their_mean() -> None:
    routes = collapsed()
    routes[1] = route([[0.0, 30.0]] * 4, [[0], [1], [0], [1]], 1)  # whose load is balanced
    strategy = adaptive(0.01, 2)
    assert strategy.term is not None
    assert strategy.term.coefficient == 0.01
    assert torch.equal(losses(strategy.term.values, routes), losses(aux, routes))
    for step in range(69):
        strategy.update(count_routes(routes), step + 1)
    # Layer 0: d = 1 - 1.25/2, so its 2 is kept; layer 1: 1, halved.
    assert losses(strategy.term.values, routes).tolist() == pytest.approx([2.0, 0.5], rel=1e-3)


def test_proxies_by_hand() -> None:
    # Distances 4 (rows 0 and 1) and 100 (row 2 to row 1): epsilon 4/2/5, 4/2/3, 100/2/103.
    rows_ED = torch.tensor([[3.0, 4.0], [3.0, 0.0], [103.0, 0.0]])
    assert proxies(rows_ED, torch.full((3, 2), 0.5)).tolist() == rows_ED.tolist()
    torch.testing.assert_close(
        proxies(rows_ED, torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])),
        torch.tensor([[4.2, 2.4], [1.0, 0.0], [153.0, 0.0]]),
    )
    assert proxies(torch.zeros(2, 3), torch.ones(2, 3)).tolist() == torch.zeros(2, 3).tolist()  # --router zeros


def test_erc_by_hand() -> None:
    # M = ((3, 10), (8, 20)): the norms of (3), (8, 6), (8), (12, 16). Proxy 0 moves expert 1 more than its own, by 7;
    # expert 0 is moved by proxy 1 more than by its own, by 5: (7 + 5) / 4.
    gates_EFD = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [2.0, 0.0]]])
    proxies_ED = torch.tensor([[3.0, 4.0], [8.0, 6.0]])
    assert erc(proxies_ED, gates_EFD).item() == pytest.approx(3.0)
    # Experts that only their own proxy moves cost nothing.
    assert erc(torch.eye(2), torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])).item() == 0


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_erc_teaches_routers_and_gates_and_nothing_else(tmp_path: Path, family: str) -> None:
    model = load_model(getattr(tiny, f"save_{family}")(tmp_path), "float32")
    term = Erc(model, RouterCapture(model), 1.0).term
    assert term is not None
    nothing = tiny.forward([], torch.zeros(0, 0))
    one, again = (term.values(replace(nothing, batch=replace(nothing.batch, seed=seed))) for seed in (1, 1))
    other = term.values(replace(nothing, batch=replace(nothing.batch, seed=2**64 - 1)))
    assert torch.equal(one, again)  # the noise is the micro-batch's
    assert (one != other).all()
    one.mean().backward()
    taught = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert taught == {n for n, _ in model.named_parameters() if n.endswith(("mlp.gate.weight", "experts.gate_up_proj"))}
    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            gate, up = parameter.grad.chunk(2, dim=1)
            assert gate.abs().max() > 0
            assert up.abs().max() == 0


def test_erc_is_refused_where_experts_are_stored_in_another_way() -> None:
    from tests.unit.test_train_selection import meta_model

    for family in ("gpt_oss", "llama4_text"):
        model = meta_model(family)
        with pytest.raises(ConfigError, match="--balance erc: "):
            Erc(model, RouterCapture(model), 1.0)


def test_sigmoid_scores_are_normalised_over_all_experts() -> None:
    # sigmoid(0) = 1/2, sigmoid(-ln 3) = 1/4: P = (2/3, 1/3), both tokens chose expert 0: 2 * 2/3.
    sigmoid = replace(route([[0.0, -math.log(3)]] * 2, [[0], [0]]), scoring="sigmoid")
    for term in (aux, global_aux, pooled_aux):
        assert losses(term, [sigmoid]).item() == pytest.approx(4 / 3)


def test_z_loss_by_hand() -> None:
    # logsumexp(0, 0) = ln 2; logsumexp(ln 3, 0) = ln 4.
    (loss,) = losses(z_loss, [route([[0.0, 0.0], [math.log(3), 0.0]], [[0], [0]])])
    assert loss.item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_aux_gradient_pushes_away_from_the_overloaded_expert() -> None:
    overloaded = route([[1.0, 0.0, 0.0]] * 3, [[0], [0], [0]])
    losses(aux, [overloaded]).sum().backward()
    gradient_TE = overloaded.logits_TE.grad
    assert gradient_TE is not None
    assert (gradient_TE[:, 0] > 0).all()
    assert (gradient_TE[:, 1:] < 0).all()
    # d/dz_0 of E * f_0 * P_0 with f = (1, 0, 0): 3 * p (1 - p) / T
    p = math.e / (math.e + 2)
    assert gradient_TE[0, 0].item() == pytest.approx(3 * p * (1 - p) / 3)


@pytest.mark.parametrize("name", ["aux", "global-aux", "pooled-aux", "seq-aux", "z-loss"])
def test_balance_gradient_reaches_every_router_of_a_model(mixtral: Path, name: str) -> None:
    model = load_model(mixtral, "float32")
    capture = RouterCapture(model)
    with capture.collect() as routes:
        model(input_ids=torch.arange(40).reshape(2, 20), use_cache=False)
    losses(registry.load("balance", name).values, routes).mean().backward()
    for router in capture.routers.values():
        gradient = router.weight.grad
        assert isinstance(gradient, torch.Tensor)
        assert gradient.abs().max() > 0


def test_count_routes() -> None:
    counts_LE = count_routes([route([[0.0] * 3] * 2, [[0, 2], [2, 1]]), route([[0.0] * 3] * 2, [[0, 1], [0, 1]])])
    assert counts_LE.tolist() == [[1, 1, 2], [2, 2, 0]]


def test_parse() -> None:
    assert balance.parse([]) == {"aux": 0.01, "z-loss": 0.001}
    assert balance.parse(["aux=0.5"]) == {"aux": 0.5}
    assert balance.parse(["z-loss", "aux=1"]) == {"z-loss": 0.001, "aux": 1.0}
    assert balance.parse(["none"]) == {}
    assert balance.parse(["sinkhorn", "z-loss"]) == {"sinkhorn": 0.0, "z-loss": 0.001}
    assert balance.parse(["global-aux", "pooled-aux", "loss-free"]) == {
        "global-aux": 0.01, "pooled-aux": 0.04, "loss-free": 0.001
    }  # fmt: skip
    assert balance.parse(["adaptive-aux", "seq-aux", "erc"]) == {"adaptive-aux": 0.01, "seq-aux": 1e-4, "erc": 1.0}
    assert balance.parse(["adaptive-aux=0.02"]) == {"adaptive-aux": 0.02}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["auxx"], "did you mean 'aux'"),
        (["aux=-1"], "above 0"),
        (["aux=nan"], "above 0"),
        (["aux=much"], "above 0"),
        (["aux="], "above 0"),
        (["aux", "aux=1"], "twice"),
        (["none", "aux"], "cannot be combined with others"),
        (["none=1"], "no coefficient"),
        (["sinkhorn=1"], "no coefficient"),
        (["sinkhorn=0"], "no coefficient"),
        (["sinkhorn", "loss-free"], "give one of them"),
        (["loss-free=0"], "above 0"),
    ],
)
def test_parse_refuses(values: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        balance.parse(values)
