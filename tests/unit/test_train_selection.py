"""Strategies that act on the choice of experts: numbers worked out by hand, and the families' own weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moetool.checkpoint.model import load_model
from moetool.errors import ConfigError
from moetool.routing.capture import RouterCapture, has_routers
from moetool.train import balance
from moetool.train.balance import count_routes
from moetool.train.config import TrainConfig
from moetool.train.selection import How, LossFree, Sinkhorn, Weighting, find_weighting, selection_biases, sinkhorn
from tests import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 8,
    "shared_expert_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "first_k_dense_replace": 0,
    "moe_layer_start_index": 0, "n_group": 1, "topk_group": 1, "num_local_experts": 4, "num_experts": 4,
    "moe_num_experts": 4, "n_shared_experts": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def meta_model(family: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(family, **(SIZES | changes))
    if hasattr(config, "n_routed_experts"):
        config.n_routed_experts = 4
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_sinkhorn_by_hand() -> None:
    # C = ((3, 1), (1, 1)) tends to d0 C d1 with ad/bc = 3 kept and all sums 1/2: a = d, b = c = 1/2 - a,
    # a / (1/2 - a) = sqrt 3.
    matrix_TE = sinkhorn(torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]), iterations=50).exp()
    a = math.sqrt(3) / 2 / (1 + math.sqrt(3))
    torch.testing.assert_close(matrix_TE, torch.tensor([[a, 0.5 - a], [0.5 - a, a]]))


def test_sinkhorn_is_the_published_iteration() -> None:
    logits_TE = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) * 2
    cost = logits_TE.double().exp()
    d1 = 1 / (5 * cost.sum(dim=0))
    for _ in range(3):
        d0 = (1 / 64) / (cost * d1).sum(dim=1)
        d1 = (1 / 5) / (cost * d0[:, None]).sum(dim=0)
    torch.testing.assert_close(
        sinkhorn(logits_TE, iterations=3).exp().double(), d1 * cost * d0[:, None], rtol=1e-4, atol=1e-8
    )


def test_sinkhorn_balances_what_softmax_would_send_to_one_expert() -> None:
    logits_TE = torch.randn(512, 8, generator=torch.Generator().manual_seed(0)) + 4 * torch.eye(8)[0]
    assert (logits_TE.argmax(dim=-1) == 0).float().mean() > 0.9
    load_E = torch.bincount(sinkhorn(logits_TE).argmax(dim=-1), minlength=8) / 512
    assert load_E.max() < 1.3 / 8


def test_sinkhorn_of_logits_beyond_exp() -> None:
    matrix_TE = sinkhorn(torch.tensor([[500.0, 0.0], [0.0, -500.0], [90.0, 100.0], [-1e4, -1e4]])).exp()
    assert torch.isfinite(matrix_TE).all()
    torch.testing.assert_close(matrix_TE.sum(dim=0), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("mixtral", {}, Weighting("softmax", True, 1.0)),
        ("qwen2_moe", {"norm_topk_prob": False}, Weighting("softmax", False, 1.0)),
        ("qwen3_moe", {"norm_topk_prob": True}, Weighting("softmax", True, 1.0)),
        ("flex_olmo", {}, Weighting("softmax", False, 1.0)),
        ("granitemoe", {}, Weighting("softmax", True, 1.0)),  # a softmax of the chosen logits: the same
        ("hunyuan_v1_moe", {}, Weighting("softmax", True, 1.0)),
        ("ernie4_5_moe", {}, Weighting("softmax", True, 1.0)),
        ("deepseek_v2", {"routed_scaling_factor": 16.0}, Weighting("softmax", False, 16.0)),
        ("glm4_moe", {"routed_scaling_factor": 2.5}, Weighting("sigmoid", True, 2.5)),
        ("glm4_moe", {"norm_topk_prob": False}, Weighting("sigmoid", False, 1.0)),
        ("minimax_m2", {}, Weighting("sigmoid", True, 1.0)),  # the block hands its bias to the router
    ],
)
def test_weights_are_the_familys_own(family: str, changes: dict[str, Any], expected: Weighting) -> None:
    model = meta_model(family, **changes)
    capture = RouterCapture(model)
    for layer, router in capture.routers.items():
        assert find_weighting(router, capture.scoring[layer], "{}") == expected


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_sinkhorn_hook_changes_indices_in_training_alone(tmp_path: Path, family: str) -> None:
    folder = getattr(tiny, f"save_{family}")(tmp_path / "model", num_experts_per_tok=1)
    tokens = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(0))
    model = load_model(folder, "float32")
    capture = RouterCapture(model)
    for router in capture.routers.values():  # one expert draws most tokens
        dict(router.named_parameters())["weight"].data[0] *= 4
    Sinkhorn(model, capture)
    with capture.collect() as evaluated:
        model(input_ids=tokens)
    model.train()
    with capture.collect() as trained:
        model(input_ids=tokens)
    first = trained[0]  # its input is the same in both
    torch.testing.assert_close(first.logits_TE, evaluated[0].logits_TE)
    assert torch.equal(first.indices_TK, sinkhorn(first.logits_TE).topk(1, dim=-1).indices)
    counts_E = count_routes(trained)[0]
    assert counts_E.max() < count_routes(evaluated)[0].max()
    assert counts_E.max() <= 1.3 * 128 / 4
    # Where the choice is the same, so is the weight.
    same_T = (first.indices_TK == evaluated[0].indices_TK).squeeze(1)
    assert same_T.any()
    assert not same_T.all()
    torch.testing.assert_close(first.weights_TK[same_T], evaluated[0].weights_TK[same_T])


def test_sinkhorn_weights_carry_the_routers_gradient(mixtral: Path) -> None:
    model = load_model(mixtral, "float32").train()
    capture = RouterCapture(model)
    Sinkhorn(model, capture)
    model(input_ids=torch.arange(40).reshape(2, 20)).logits.square().mean().backward()
    for router in capture.routers.values():
        gradient = router.weight.grad
        assert isinstance(gradient, torch.Tensor)
        assert gradient.abs().max() > 0


def test_sinkhorn_is_refused_where_weights_or_groups_are_the_familys_secret() -> None:
    phimoe = meta_model("phimoe")
    with pytest.raises(ConfigError, match="the weights that PhimoeTopKRouter would give to other"):
        Sinkhorn(phimoe, RouterCapture(phimoe))
    grouped = meta_model("glm4_moe", n_group=2, topk_group=1)
    with pytest.raises(ConfigError, match="within groups"):
        Sinkhorn(grouped, RouterCapture(grouped))


@pytest.mark.parametrize("family", ["glm4_moe", "ernie4_5_moe", "minimax_m2", "solar_open"])
def test_loss_free_moves_the_stored_bias_by_the_sign_of_the_error(family: str) -> None:
    model = meta_model(family).to_empty(device="cpu")
    capture = RouterCapture(model)
    places = selection_biases(model, capture.routers)
    for module, name in places:
        getattr(module, name).data.fill_(1.0)
    # Mean 5: expert 0 is over, 1 under, 2 and 3 are at it.
    counts_LE = torch.tensor([[9, 1, 5, 5], [5, 5, 5, 5]], dtype=torch.float64)
    LossFree(model, capture, 0.25).update(counts_LE, 1)
    first, second = (getattr(module, name).detach().flatten() for module, name in places)
    assert first.tolist() == [0.75, 1.25, 1.0, 1.0]
    assert second.tolist() == [1.0] * 4
    assert first.dtype == torch.float32


def test_loss_free_is_centred_and_ends() -> None:
    model = meta_model("glm4_moe").to_empty(device="cpu")
    capture = RouterCapture(model)
    places = selection_biases(model, capture.routers)

    def moved(how: How, step: int) -> list[float]:
        for module, name in places:
            getattr(module, name).data.fill_(1.0)
        # Mean 5: one expert is over, three are under. Signs -1, 1, 1, 1, whose mean is 1/2.
        LossFree(model, capture, 0.25, how).update(torch.tensor([[8, 4, 4, 4], [5, 5, 5, 5]]), step)
        first, second = (getattr(module, name).tolist() for module, name in places)
        assert second == [1.0] * 4
        return list(first)

    assert moved(How(), 1000) == [0.625, 1.125, 1.125, 1.125]
    assert moved(How(centred=False), 1) == [0.75, 1.25, 1.25, 1.25]
    assert moved(How(last_move=3), 3) == [0.625, 1.125, 1.125, 1.125]
    assert moved(How(last_move=3), 4) == [1.0] * 4


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
def test_loss_free_is_refused_where_the_bias_would_be_lost(family: str) -> None:
    model = meta_model(family)
    with pytest.raises(ConfigError, match=f"'{family}' cannot store a selection bias.*glm4_moe, dots1.*aux"):
        LossFree(model, RouterCapture(model), 0.001)


def test_options_that_contradict_the_model(tmp_path: Path) -> None:
    def config(strategies: list[str], freeze_router: bool = False) -> TrainConfig:
        given = balance.parse(strategies)
        return TrainConfig(
            tmp_path, tmp_path / "out", {"new": "x"}, max_steps=1, balance=given, freeze_router=freeze_router
        )

    glm = meta_model("glm4_moe")
    balance.check(config(["loss-free", "aux", "z-loss"]), glm)
    balance.check(config(["sinkhorn", "z-loss"]), glm)
    balance.check(config(["loss-free"], freeze_router=True), glm)
    balance.check(config(["sinkhorn"], freeze_router=True), glm)
    with pytest.raises(
        ConfigError, match=r"does not learn from --balance global-aux, z-loss; only sinkhorn, loss-free, erc and none"
    ):
        balance.check(config(["loss-free", "global-aux", "z-loss"], freeze_router=True), glm)
    with pytest.raises(ConfigError, match="cannot store"):
        balance.check(config(["loss-free"]), meta_model("mixtral"))
    dense = meta_model("llama")
    assert not has_routers(dense)
    with pytest.raises(ConfigError, match="dense model without a router"):
        balance.check(config(["none"], freeze_router=True), dense)
    balance.check(config(["none"]), dense)
