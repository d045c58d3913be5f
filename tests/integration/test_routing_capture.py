"""The hooks on real (tiny, random) models of several families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moetool.checkpoint.model import load_model
from moetool.errors import CheckpointError
from moetool.routing.capture import Route, RouterCapture, has_routers
from moetool.routing.stats import RoutingStats

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.3,
}
# family: the settings that it needs besides, its layers with a router, its scoring
FAMILIES: dict[str, tuple[dict[str, Any], list[int], str]] = {
    "mixtral": ({"num_local_experts": 4}, [0, 1, 2], "softmax"),
    "qwen3_moe": ({"num_experts": 4, "mlp_only_layers": [1]}, [0, 2], "softmax"),
    "glm4_moe": ({"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}, [1, 2], "sigmoid"),
    "granitemoe": ({"num_local_experts": 4}, [0, 1, 2], "softmax"),
    "gpt_oss": ({"num_local_experts": 4}, [0, 1, 2], "softmax"),
    "deepseek_v3": (
        {
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        [1, 2],
        "sigmoid",
    ),
    "hunyuan_v1_moe": ({"num_experts": 4, "moe_topk": 2}, [0, 1, 2], "softmax"),
    "ernie4_5_moe": ({"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}, [1, 2], "softmax"),
}


def build(family: str) -> Any:
    settings, _, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SMALL | settings)))
    assert sum(p.numel() for p in model.parameters()) < 1_000_000, "a default of the family is not overridden"
    with torch.no_grad():  # some families start with routers at zero, where every choice is a tie
        for module in RouterCapture(model).routers.values():
            for name, parameter in module.named_parameters():
                if name.endswith("weight"):
                    parameter.normal_()
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    _, layers, scoring = FAMILIES[family]
    model = build(family)
    capture = RouterCapture(model)
    assert capture.layers == layers
    ids = torch.randint(1, 64, (2, 9))
    with torch.no_grad(), capture.collect() as routes:
        logits = model(ids, output_router_logits=True)
    assert [route.layer for route in routes] == layers
    for route in routes:
        assert route.scoring == scoring
        assert (route.logits_TE.dtype, route.indices_TK.dtype) == (torch.float32, torch.int64)
        assert (tuple(route.logits_TE.shape), tuple(route.indices_TK.shape)) == ((18, 4), (18, 2))
        assert torch.allclose(route.probabilities_TE().sum(dim=-1), torch.ones(18))
        # No selection bias here: the choices are the best of the scores.
        best = route.logits_TE.topk(2).indices.sort().values
        assert torch.equal(route.indices_TK.sort().values, best)
    if getattr(logits, "router_logits", None):
        for route, theirs in zip(routes, logits.router_logits, strict=True):
            assert torch.allclose(route.logits_TE, theirs.float().reshape(18, 4), atol=1e-6)


def test_choices_are_read_after_a_selection_bias() -> None:
    model = build("glm4_moe")
    capture = RouterCapture(model)
    router: Any
    for router in capture.routers.values():
        router.e_score_correction_bias[3] = 10.0
    with torch.no_grad(), capture.collect() as routes:
        model(torch.randint(1, 64, (2, 9)))
    stats = RoutingStats.like(routes)
    stats.update(routes)
    assert stats.counts_LE[:, 3].tolist() == [18, 18]
    assert stats.probability_LE[:, 3].max() < 18


def test_collects_only_inside(mixtral: Any) -> None:
    model = load_model(mixtral)
    capture = RouterCapture(model)
    ids = torch.randint(0, 300, (1, 8))
    model(ids)
    with capture.collect() as routes:
        pass
    assert routes == []
    seen: list[Route] = []
    with capture.collect(seen.append) as routes:
        model(ids)
    model(ids)
    assert [route.layer for route in seen] == [0, 1]
    assert routes == []


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_checkpointing_counts_once_and_keeps_the_gradient(mixtral: Any, compiled: bool) -> None:
    ids = torch.arange(48).reshape(2, 24)
    counts: list[Any] = []
    gradients: list[Any] = []
    for checkpointing in (False, True):
        model = load_model(mixtral).train()
        capture = RouterCapture(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        forward = torch.compile(model, backend="eager") if compiled else model
        with capture.collect() as routes:
            loss = forward(ids, labels=ids, use_cache=False).loss
        balance = torch.stack([route.probabilities_TE()[:, 0].mean() for route in routes]).sum()
        (loss + balance).backward()
        stats = RoutingStats.like(routes)
        stats.update(routes)
        assert stats.num_tokens == 48
        counts.append(stats.counts_LE)
        routers: list[Any] = list(capture.routers.values())
        gradients.append([router.weight.grad.clone() for router in routers])
        torch.compiler.reset()
    assert (counts[0] == counts[1]).all()
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.norm() > 0
        assert torch.allclose(plain, recomputed, atol=1e-6)


class ProbabilityTopKRouter(torch.nn.Module):
    """As in the transformers versions that returned probabilities under the name of logits."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        probabilities = hidden.softmax(dim=-1)
        weights, indices = probabilities.topk(2)
        return probabilities, weights, indices


class LogitsOnlyRouter(torch.nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def test_probabilities_are_recognised() -> None:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([ProbabilityTopKRouter()])})
    hidden = torch.randn(5, 4)
    with RouterCapture(model).collect() as routes:
        model["layers"][0](hidden)  # type: ignore[index]
    assert torch.allclose(routes[0].probabilities_TE(), hidden.softmax(dim=-1))


def test_refusals(llama: Any) -> None:
    dense = load_model(llama)
    assert not has_routers(dense)
    with pytest.raises(CheckpointError, match="without a router"):
        RouterCapture(dense)
    foreign = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([LogitsOnlyRouter()])})
    with RouterCapture(foreign).collect(), pytest.raises(CheckpointError, match="layer 0: LogitsOnlyRouter"):
        foreign["layers"][0](torch.randn(5, 4))  # type: ignore[index]
    two = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleList([LogitsOnlyRouter()] * 1)])})
    two["layers"][0].append(ProbabilityTopKRouter())  # type: ignore[index]
    with pytest.raises(CheckpointError, match="two routers"):
        RouterCapture(two)
