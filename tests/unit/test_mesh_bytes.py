"""The closed form of what a mesh sends, by hand, and the bandwidths behind the recommendations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moetool.budget.meshes import NETWORK, REACHED, Cluster, crossing, seconds
from moetool.cost.devices import GPUS
from moetool.cost.memory import Training
from moetool.cost.parameters import sizes_of
from moetool.cost.traffic import Group, Traffic, step_traffic, totals
from moetool.errors import ConfigError
from moetool.mesh import Mesh, check_model

H, F, E, K, V, T = 32, 48, 8, 2, 64, 16
EXPERT = 3 * H * F
LAYER = 4 * H * H + E * H + 2 * H
HEAD = V * H + H


@pytest.fixture(scope="module")
def model() -> Any:
    config = MixtralConfig(
        vocab_size=V, hidden_size=H, intermediate_size=F, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=E, num_experts_per_tok=K,
    )  # fmt: skip
    with torch.device("meta"):
        return MixtralForCausalLM(config)


def sums(model: Any, mesh: Mesh, what: str = "payload", micro_batches: int = 1, **options: Any) -> dict[str, float]:
    training = Training(seq_len=T, micro_batch_size=1, **({"precision": "fp32"} | options))
    return totals(step_traffic(sizes_of(model), mesh, training, micro_batches), what)


def test_fsdp_gathers_twice_but_for_the_head_and_reduces_once(model: Any) -> None:
    found = sums(model, Mesh(fsdp=4), micro_batches=3)
    layer = LAYER + E * EXPERT
    assert found["weights"] == 3 * 4 * (2 * V * H + 2 * layer + HEAD)
    assert found["gradients"] == 3 * 4 * (V * H + layer + HEAD)


def test_unevenly_dealt_experts_are_padded(model: Any) -> None:
    even, uneven = (sums(model, Mesh(fsdp=size))["gradients"] for size in (4, 3))
    assert uneven - even >= 4 * EXPERT  # a ninth one


@pytest.mark.parametrize(
    ("mesh", "instead"),
    [
        (Mesh(fsdp=16), "use --fsdp 8 with"),
        (Mesh(fsdp=16, ep=8), "use --fsdp 8 with"),
        (Mesh(fsdp=16, ep=4, tp=2), "use --fsdp 4 with"),
        (Mesh(fsdp=6), "use --fsdp 3 with"),
    ],
)
def test_a_process_without_experts_is_refused(model: Any, mesh: Mesh, instead: str) -> None:
    with pytest.raises(ConfigError, match=instead):
        check_model(mesh, model)


@pytest.mark.parametrize("mesh", [Mesh(fsdp=8), Mesh(fsdp=8, tp=4), Mesh(fsdp=8, ep=8), Mesh(fsdp=3), Mesh()])
def test_meshes_that_leave_none_without_experts(model: Any, mesh: Mesh) -> None:
    check_model(mesh, model)


def test_experts_exchange_tokens_and_are_not_gathered(model: Any) -> None:
    found = sums(model, Mesh(fsdp=4, ep=4), micro_batches=3)
    assert found["tokens forward"] == found["tokens backward"] == 3 * 2 * 4 * T * K * H
    assert found["split sizes"] == 3 * 8 * E
    assert found["weights"] == 3 * 4 * (2 * V * H + 2 * LAYER + HEAD)
    again = sums(model, Mesh(fsdp=4, ep=4), micro_batches=3, gradient_checkpointing=True)
    assert again["tokens backward"] == 2 * again["tokens forward"]


def test_replicas_sum_their_shards_once_a_step(model: Any) -> None:
    once, thrice = (sums(model, Mesh(fsdp=2, replicas=2), micro_batches=n) for n in (1, 3))
    assert once["replicas"] == thrice["replicas"] == once["gradients"] / 2


def test_bf16_halves_weights_but_not_routers_and_gradients(model: Any) -> None:
    half, full = (sums(model, Mesh(fsdp=4), precision=precision) for precision in ("bf16", "fp32"))
    assert half["weights"] == full["weights"] / 2 + 2 * 2 * E * H
    assert half["gradients"] == full["gradients"]


def test_whole_weights_sum_all_gradients_once(model: Any) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = sums(model, Mesh(replicas=4), "sent", micro_batches=3)
    assert found["gradients"] == 2 * 3 / 4 * 4 * parameters
    assert found.keys() == {"gradients", "metrics"}


@pytest.mark.parametrize(
    ("operation", "group", "sent", "across"),
    [
        ("gather", Group(8, 1), 7 / 8, 0),
        ("gather", Group(16, 1), 15 / 16, 15 / 16 / 8),  # eight rings, each through a port of its own
        ("reduce", Group(8, 8), 2 * 7 / 8, 2 * 7 / 8),  # one GPU of each node
        ("reduce", Group(4, 4), 2 * 3 / 4, 3 / 4),  # two of each of two nodes
        ("exchange", Group(16, 1), 15 / 16, 1 / 2),
    ],
)
def test_bandwidths(operation: str, group: Group, sent: float, across: float) -> None:
    traffic = Traffic("any", operation, 1e9, group, 1)
    assert traffic.sent == pytest.approx(1e9 * sent)
    assert crossing(traffic, 8) == pytest.approx(1e9 * across)
    assert seconds(traffic, Cluster(GPUS["h100"], 64)) == pytest.approx(
        1e9 * max(sent / 450e9, across / NETWORK) / REACHED
    )
