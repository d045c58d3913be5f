"""What a run is said to need before it loads anything."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig

from moetool.checkpoint.model import skeleton
from moetool.cost import devices, memory
from moetool.cost.memory import Training
from moetool.cost.operations import flops_per_token
from moetool.cost.parameters import routing_size, sizes_of
from moetool.mesh import Mesh
from moetool.routing.capture import RouterCapture
from moetool.train import mixed
from moetool.train.batches import MicroBatch
from moetool.train.config import TrainConfig
from moetool.train.loss import chunked_loss, whole_loss
from moetool.train.run_plan import memory_warnings, validation_warnings

SIZES: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(num_local_experts=8, **SIZES)),
}


def training(**changes: Any) -> Training:
    values: dict[str, Any] = {"seq_len": 128, "micro_batch_size": 2, "precision": "fp32"}
    return Training(**(values | changes))


def test_parameters_by_hand(mixtral: Path, llama: Path) -> None:
    # 2 layers: q and o 32x32, k and v 32x16, two norms of 32; ends 300x32 each and a norm.
    attention, ends = 2 * (2 * 1024 + 2 * 512 + 64), 2 * 9600 + 32
    expert = 3 * 32 * 64
    assert sizes_of(skeleton(llama)).count() == (attention + ends + 2 * expert,) * 2
    moe = attention + ends + 2 * 4 * 32
    assert sizes_of(skeleton(mixtral)).count() == (moe + 2 * 4 * expert, moe + 2 * 2 * expert)
    assert routing_size(skeleton(mixtral)) == (4, 2)
    active = moe + 2 * 2 * expert
    assert flops_per_token(sizes_of(skeleton(mixtral)), 16) == 6 * (active - 9600) + 12 * 2 * 32 * 16


def test_weights_and_moments_are_16_bytes_a_parameter(mixtral: Path) -> None:
    sizes = sizes_of(skeleton(mixtral))
    total, active = sizes.count()
    need = memory.estimate(sizes, training())
    assert [need[name] for name in ("weights", "gradients", "optimizer")] == [4 * total, 4 * total, 8 * total]
    assert need["total"] == 16 * total + need["activations"]
    largest = max(map(math.prod, sizes.shapes.values()))
    assert memory.saving_bytes(sizes, training(), 1) == 12 * total + 8 * largest
    assert memory.saving_bytes(sizes, training(), 4) == 3 * total + 8 * largest
    # Pinned, each tensor takes a power of two: all are one but embeddings and head, 300 x 32 x 4 = 38,400 bytes.
    assert memory.saving_bytes(sizes, training(), 1, pinned=True) == 12 * total + 6 * (65_536 - 38_400) + 8 * largest
    assert memory.estimate(sizes, training(precision="bf16"))["weights"] == 6 * total
    frozen = memory.estimate(sizes, training(freeze_router=True))
    assert need["gradients"] - frozen["gradients"] == 4 * 2 * 4 * 32
    for kind, trained in (("routers", 2 * 4 * 32), ("experts", 2 * 4 * 3 * 32 * 64)):
        part = memory.estimate(sizes, training(train_only=kind))
        assert [part[name] for name in ("weights", "gradients", "optimizer")] == [4 * total, 4 * trained, 8 * trained]
        assert memory.saving_bytes(sizes, training(train_only=kind), 1) == 4 * total + 8 * trained + 8 * largest
        # In bf16, fp32 weights lie beside those that are trained, and beside the others if bf16 cannot hold them.
        run = training(train_only=kind, precision="bf16")
        assert memory.estimate(sizes, run)["weights"] == 2 * total + 4 * trained
        assert memory.estimate(sizes, replace(run, rounds=True))["weights"] == 6 * total
        offload = memory.estimate(sizes, replace(run, moments="offload"))
        assert [offload["weights"], offload["host"]] == [2 * total, 12 * trained]
        learning = trained if kind == "routers" else trained // 2
        attention = 12 * 2 * 32 * 16
        names = run.trained(sizes)
        assert flops_per_token(sizes, 16, names) == 4 * (active - 9600) + 2 * learning + attention
    assert flops_per_token(sizes, 16, training().trained(sizes)) == flops_per_token(sizes, 16)
    coupled = memory.estimate(sizes, training(coupled=True))  # the gradient of the gates and ups once more
    assert coupled["activations"] - need["activations"] == 4 * 2 * 4 * 2 * 32 * 64
    half = memory.estimate(sizes, training(micro_batch_size=1))
    assert need["activations"] == 2 * half["activations"]
    less = memory.estimate(sizes, training(gradient_checkpointing=True))
    assert less["activations"] < need["activations"]


def test_what_is_kept_of_weights_and_moments(mixtral: Path) -> None:
    sizes = sizes_of(skeleton(mixtral))
    total = sizes.total
    for moments, masters, weights, optimizer in (
        ("fp32", True, 6, 8), ("bf16", True, 6, 4), ("8bit", True, 6, 2 + 8 / 256), ("8bit", False, 2, 2 + 8 / 256),
    ):  # fmt: skip
        run = training(precision="bf16", moments=moments, master_weights=masters)
        need = memory.estimate(sizes, run)
        assert [need["weights"], need["gradients"]] == [weights * total, 4 * total]
        assert [need["optimizer"], need["host"]] == [int(optimizer * total), 0]
    offloaded = training(precision="bf16", moments="offload")
    need = memory.estimate(sizes, offloaded)
    assert [need[name] for name in ("weights", "gradients", "optimizer")] == [2 * total, 4 * total, 0]
    assert need["host"] == 12 * total
    assert memory.saving_bytes(sizes, offloaded, 1) == 12 * total + 8 * max(map(math.prod, sizes.shapes.values()))
    run = training(precision="bf16", micro_batch_size=2)
    every = memory.smaller(sizes, run, 10**12)
    assert [options for options, _ in every] == [
        "--gradient-checkpointing",
        "--gradient-checkpointing --micro-batch-size 1",
        "--gradient-checkpointing --micro-batch-size 1 --moments bf16",
        "--gradient-checkpointing --micro-batch-size 1 --moments 8bit",
        "--gradient-checkpointing --micro-batch-size 1 --moments 8bit --no-master-weights",
        "--gradient-checkpointing --micro-batch-size 1 --moments offload",
    ]
    totals = [need["total"] for _, need in every]
    assert totals == sorted(totals, reverse=True)
    assert memory.smaller(sizes, run, totals[-1]) == every[-1:]
    assert memory.in_gb({"total": 45 * 10**9, "host": 825 * 10**8}) == "45 GB, and 82.5 GB of host memory"
    assert memory.in_gb(every[0][1]) == f"{totals[0] / 1e9:.3g} GB"
    eight = training(precision="bf16", micro_batch_size=1, gradient_checkpointing=True, moments="8bit")
    assert [options for options, _ in memory.smaller(sizes, eight, 10**12)] == [
        "--no-master-weights",
        "--moments offload",
    ]
    rounded = replace(eight, master_weights=False)
    assert [options for options, _ in memory.smaller(sizes, rounded, 10**12)] == ["--moments offload --master-weights"]
    assert [options for options, _ in memory.smaller(sizes, run, 10**12, Mesh(fsdp=2))] == [
        "--gradient-checkpointing",
        "--gradient-checkpointing --micro-batch-size 1",
    ]


def test_logits_of_all_tokens_count_where_they_are_made() -> None:
    """In bf16 a chunk of them is enough, unless a term of the loss reads them or the family changes them."""
    kind, settings = MODELS["llama"]
    with torch.device("meta"):
        model = kind(settings)
    tokens, vocabulary = 2 * 4096 * 64, 1000  # two chunks' worth

    def need(of: Any = model, **changes: Any) -> int:
        run = training(seq_len=4096, micro_batch_size=128, precision="bf16", **changes)
        return memory.estimate(sizes_of(of), run)["activations"]

    assert tokens * vocabulary > memory.CHUNK_ELEMENTS
    head = (4 + 12) * memory.CHUNK_ELEMENTS + 6 * vocabulary * 128
    assert need(whole_logits=True) - need() == (2 + 4 + 4 + 4) * tokens * vocabulary - head
    model.config.final_logit_softcapping = 30.0
    capped = need()
    del model.config.final_logit_softcapping
    assert capped - need() == (2 + 4 + 4) * tokens * vocabulary - head
    model.lm_head.bias = torch.nn.Parameter(torch.empty(vocabulary, device="meta"))
    assert need() > capped  # by the bias, which is counted as a norm is
    exact = training(precision="fp32")
    sizes = sizes_of(model)
    assert memory.estimate(sizes, exact) == memory.estimate(sizes, replace(exact, whole_logits=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", MODELS)
def test_activations_are_near_what_autograd_keeps(family: str, precision: str) -> None:
    kind, settings = MODELS[family]
    vocab_size = 16 if precision == "bf16" else 1000  # the loss in chunks keeps no logits, which the estimate counts
    settings = type(settings)(**{**settings.to_dict(), "vocab_size": vocab_size})
    model = kind(settings).train()
    with torch.device("meta"):
        empty = kind(settings)
    if precision == "bf16":
        mixed.cast(model, RouterCapture(model) if family == "mixtral" else None)
    language_loss = (chunked_loss(model) if precision == "bf16" else None) or whole_loss
    estimated = memory.estimate(sizes_of(empty), training(precision=precision))["activations"]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(vocab_size, (2, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = language_loss(model, MicroBatch(tokens, tokens, None), torch.device("cpu"))
    assert loss.requires_grad
    assert 0.7 < estimated / sum(kept.values()) < 1.4


def test_another_familys_router_is_read() -> None:
    settings = Qwen3MoeConfig(
        num_experts=6, num_experts_per_tok=3, moe_intermediate_size=16, hidden_size=32, num_hidden_layers=1
    )
    from transformers import Qwen3MoeForCausalLM

    with torch.device("meta"):
        assert routing_size(Qwen3MoeForCausalLM(settings)) == (6, 3)


def test_a_device_that_is_too_small_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetool.cost.devices.device_memory", lambda device: 80 * 10**9)
    cuda = torch.device("cuda")
    assert memory_warnings({"total": 70 * 10**9, "host": 0}, cuda, lambda there: []) == []
    (warning,) = memory_warnings(
        {"total": 120 * 10**9, "host": 0}, cuda, lambda there: [("--moments 8bit", {"total": there - 10**9, "host": 0})]
    )
    assert (
        "needs about 120 GB per process, but cuda has 80 GB; it fits with --moments 8bit (79 GB); or shard" in warning
    )
    (warning,) = memory_warnings({"total": 120 * 10**9, "host": 0}, cuda, lambda there: [])
    assert "no option makes it fit" in warning
    monkeypatch.setattr("moetool.cost.devices.free_memory", lambda device: 64 * 10**9)
    (warning,) = memory_warnings({"total": 70 * 10**9, "host": 82 * 10**9}, cuda, lambda there: [])
    assert "need about 82 GB of host memory per process, but 64 GB are free; use --moments 8bit" in warning
    assert devices.peak_flops(torch.device("cpu"), "bf16") is None


def test_validation_that_takes_longer_than_training_is_warned_of() -> None:
    run = TrainConfig(Path("m"), Path("o"), train={}, max_steps=1, max_tokens=10**6, eval_every=1)
    assert validation_warnings({"a": 10**6, "b": 5 * 10**5}, run) == []
    (warning,) = validation_warnings({"a": 10**6, "b": 10**6}, run)
    assert "validating 2 times on 2.0e+06 tokens takes about 1.3 times as long as training" in warning
    assert validation_warnings({"a": 9 * 10**5}, replace(run, max_tokens=10**3)) == []  # seconds
