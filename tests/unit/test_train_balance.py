"""Balance losses against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from moetool import registry
from moetool.checkpoint.model import load_model
from moetool.errors import ConfigError
from moetool.routing.capture import Route, RouterCapture
from moetool.train import balance
from moetool.train.balance import Aux, ZLoss, count_routes


def route(logits: list[list[float]], chosen: list[list[int]], layer: int = 0) -> Route:
    indices_TK = torch.tensor(chosen)
    return Route(layer, torch.tensor(logits, requires_grad=True), torch.ones(indices_TK.shape), indices_TK)


def test_aux_by_hand() -> None:
    # softmax of (ln 3, 0) is (3/4, 1/4); of (0, 0) it is (1/2, 1/2). P = (5/8, 3/8); both tokens chose
    # expert 0: f = (1, 0). E * sum f P = 2 * 5/8.
    (loss,) = Aux().losses([route([[math.log(3), 0.0], [0.0, 0.0]], [[0], [0]])])
    assert loss.item() == pytest.approx(1.25)
    # One token each way: f = (1/2, 1/2), so 2 * (5/8 + 3/8) / 2 = 1 whatever P is.
    (loss,) = Aux().losses([route([[math.log(3), 0.0], [0.0, 0.0]], [[0], [1]])])
    assert loss.item() == pytest.approx(1.0)


def test_aux_counts_all_k_routes_and_is_1_when_balanced() -> None:
    # 3 tokens, top-2 of 3: each expert has 2 of the 6 routes.
    (loss,) = Aux().losses([route([[0.0] * 3] * 3, [[0, 1], [1, 2], [2, 0]])])
    assert loss.item() == pytest.approx(1.0)
    # P = (1/2, 1/4, 1/4), f = (1/2, 1/2, 0): 3 * (1/4 + 1/8).
    (loss,) = Aux().losses([route([[math.log(2), 0.0, 0.0]] * 2, [[0, 1], [1, 0]])])
    assert loss.item() == pytest.approx(9 / 8)


def test_opposite_collapse_in_two_layers_is_not_balance() -> None:
    up, down = [[30.0, 0.0]] * 4, [[0.0, 30.0]] * 4
    losses_L = Aux().losses([route(up, [[0]] * 4, 0), route(down, [[1]] * 4, 1)])
    assert losses_L.tolist() == pytest.approx([2.0, 2.0])


def test_z_loss_by_hand() -> None:
    # logsumexp(0, 0) = ln 2; logsumexp(ln 3, 0) = ln 4.
    (loss,) = ZLoss().losses([route([[0.0, 0.0], [math.log(3), 0.0]], [[0], [0]])])
    assert loss.item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_aux_gradient_pushes_away_from_the_overloaded_expert() -> None:
    overloaded = route([[1.0, 0.0, 0.0]] * 3, [[0], [0], [0]])
    Aux().losses([overloaded]).sum().backward()
    gradient_TE = overloaded.logits_TE.grad
    assert gradient_TE is not None
    assert (gradient_TE[:, 0] > 0).all()
    assert (gradient_TE[:, 1:] < 0).all()
    # d/dz_0 of E * f_0 * P_0 with f = (1, 0, 0): 3 * p (1 - p) / T
    p = math.e / (math.e + 2)
    assert gradient_TE[0, 0].item() == pytest.approx(3 * p * (1 - p) / 3)


@pytest.mark.parametrize("name", balance.DEFAULT)
def test_balance_gradient_reaches_every_router_of_a_model(mixtral: Path, name: str) -> None:
    model = load_model(mixtral, "float32")
    capture = RouterCapture(model)
    with capture.collect() as routes:
        model(input_ids=torch.arange(40).reshape(2, 20), use_cache=False)
    registry.load("balance", name)().losses(routes).mean().backward()
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["auxx"], "did you mean 'aux'"),
        (["aux=-1"], "above 0"),
        (["aux=nan"], "above 0"),
        (["aux=much"], "above 0"),
        (["aux="], "above 0"),
        (["aux", "aux=1"], "twice"),
        (["none", "aux"], "stands alone"),
        (["none=1"], "no coefficient"),
    ],
)
def test_parse_refuses(values: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        balance.parse(values)
