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
from moetool.train.balance import aux, count_routes, global_aux, pooled_aux, z_loss
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


@pytest.mark.parametrize("name", ["aux", "global-aux", "pooled-aux", "z-loss"])
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
