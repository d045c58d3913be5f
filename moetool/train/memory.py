"""What a run needs of a device's memory and arithmetic, known before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moetool.checkpoint.memory import free_memory
from moetool.routing.capture import RouterCapture, has_routers
from moetool.routing.shape import outline
from moetool.train.config import TrainConfig
from moetool.train.loss import CHUNK_ELEMENTS

FLOAT32, BFLOAT16 = 4, 2  # bytes
# Of a moment: 8 bits, and an fp32 scale for each 256 of them (torchao).
_MOMENT = {"fp32": 4.0, "bf16": 2.0, "8bit": 1 + 4 / 256}

# Dense bf16 operations a second of tensor cores, from the vendors' data sheets (without sparsity).
_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def routing_size(model: Any) -> tuple[int, int]:
    """Routed experts a layer and experts a token of a model without weights; (1, 1) for a dense one.

    A block is run on torch's meta device, so that no family's names for the two need be known.
    """
    if not has_routers(model):
        return 1, 1
    if found := outline(model, RouterCapture(model)):
        return found.num_experts, found.top_k
    experts = [p.shape[0] for name, p in model.named_parameters() if _routed(name, p)]
    return max(experts, default=1), getattr(model.config.get_text_config(), "num_experts_per_tok", 1)


def parameters(model: Any) -> tuple[int, int]:
    """Parameters of a model, in all and those that one token uses."""
    num_experts, top_k = routing_size(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if _routed(name, p))
    return total, total - experts + experts * top_k // num_experts


def estimate(model: Any, config: TrainConfig, num_processes: int, sharded: bool, zero_stage: int = 0) -> dict[str, int]:
    """Bytes that each process needs on its device.

    In fp32: weights, gradients and both moments, 16 bytes a parameter. In bf16 the weights of the forward come on top
    (2 bytes); `--moments` and `--no-master-weights` make it less. Sharded weights are gathered a layer at a time.
    Activations are an estimate: each matrix keeps its input and its output for the backward, each norm three rows in
    fp32, and the head its logits and their gradient, which bf16 takes some tokens at a time. DeepSpeed updates a second
    copy of a process's share of the weights, and in stage 3 keeps up to 1e9 gathered ones.

    Args:
        model: without weights.
        config: resolved.
        num_processes: of the run.
        sharded: whether each holds a share of the weights (FSDP, ZeRO-3).
        zero_stage: of DeepSpeed; 0 without it.

    Returns:
        `weights`, `gradients`, `optimizer`, `activations` and their sum, `total`.
    """
    total, _ = parameters(model)
    _, top_k = routing_size(model)
    trained = total - config.freeze_router * sum(p.numel() for n, p in model.named_parameters() if _router(n))
    weights, gradients, moments = (num_processes if sharded or zero_stage >= least else 1 for least in (3, 2, 1))
    half = config.precision == "bf16"
    mixed = half and not sharded and not zero_stage
    compute = BFLOAT16 if half else FLOAT32
    text = model.config.get_text_config()
    token, largest = 0, 0
    for name, parameter in model.named_parameters():
        if _embedding(name):
            continue
        largest = max(largest, parameter.numel())
        if parameter.ndim == 1:
            token += 3 * FLOAT32 * parameter.numel()
        else:
            token += compute * (top_k if _routed(name, parameter) else 1) * sum(parameter.shape[-2:])
    if config.gradient_checkpointing:  # the inputs of all layers, and all of one
        token = token // text.num_hidden_layers + text.num_hidden_layers * text.hidden_size * compute
    tokens = config.micro_batch_size * config.seq_len
    head = tokens * text.vocab_size * (2 * FLOAT32 + compute)
    if mixed:  # the logits of a chunk and their gradient, and that of the head
        between = 0 if config.compile or config.liger else 3 * FLOAT32
        head = (2 * BFLOAT16 + between) * min(tokens * text.vocab_size, CHUNK_ELEMENTS)
        head += (FLOAT32 + BFLOAT16) * text.vocab_size * text.hidden_size
    masters = FLOAT32 if config.master_weights else 0
    kept = masters + BFLOAT16 if mixed else FLOAT32
    casts = BFLOAT16 * (2 * largest if sharded else total) if half and not mixed else 0
    copies = FLOAT32 * trained // num_processes if zero_stage else 0
    copies += FLOAT32 * min(total, 10**9) if zero_stage == 3 else 0
    need = {
        "weights": kept * total // weights + casts + copies,
        "gradients": FLOAT32 * trained // gradients,
        "optimizer": int(2 * _MOMENT[config.moments] * trained) // moments,
        "activations": token * tokens + head,
    }
    return {**need, "total": sum(need.values())}


def smaller(
    model: Any, config: TrainConfig, there: int, num_processes: int, sharded: bool, zero_stage: int = 0
) -> list[tuple[str, int]]:
    """The options with which a run that is too large would fit, and what it would need: what costs least comes first.

    Args:
        model: without weights.
        config: resolved.
        there: bytes of the device.
        num_processes: of the run.
        sharded: whether each holds a share of the weights.
        zero_stage: of DeepSpeed; 0 without it.
    """
    steps: dict[str, dict[str, Any]] = {
        "--gradient-checkpointing": {"gradient_checkpointing": True},
        "--micro-batch-size 1": {"micro_batch_size": 1},
    }
    if not sharded and not zero_stage:
        steps |= {f"--moments {moments}": {"moments": moments} for moments in ("bf16", "8bit")}
        steps |= {"--no-master-weights": {"master_weights": False}} if config.precision == "bf16" else {}
    how = num_processes, sharded, zero_stage
    fitting: list[tuple[str, int]] = []
    options: list[str] = []
    need = estimate(model, config, *how)["total"]
    for option, change in steps.items():
        changed = replace(config, **change)
        if (less := estimate(model, changed, *how)["total"]) >= need:
            continue
        config, need = changed, less
        options = [one for one in options if one.split()[0] != option.split()[0]] + [option]
        if need <= there:
            fitting.append((" ".join(options), need))
    return fitting


def flops_per_token(model: Any, seq_len: int) -> int:
    """Operations that training on one token takes: 6 a parameter that it uses, and attention.

    Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B: 6 N + 12 L H Q S, here without the input
    embedding, which is looked up. What gradient checkpointing computes twice counts once.
    """
    config = model.config.get_text_config()
    _, active = parameters(model)
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(
        6 * (active - looked_up) + 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * seq_len
    )


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second that a device can do in bf16; None where it is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_FLOPS.items() if known in name), None)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory, or that the machine has free; None where that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return free_memory(device.type)


def _routed(name: str, parameter: Any) -> bool:
    return ".experts." in name and parameter.ndim == 3


def _router(name: str) -> bool:
    return name.endswith((".gate.weight", ".router.weight", ".router.layer.weight"))


def _embedding(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))
