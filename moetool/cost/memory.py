"""Memory that a model takes when it is loaded and while it is trained, known before any weights are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moetool.checkpoint.reader import CheckpointReader
from moetool.cost.parameters import count_parameters, is_embedding, is_routed, is_router, routing_size

FLOAT32, BFLOAT16 = 4, 2  # bytes
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of a moment: 8 bits, and an fp32 scale for each 256 of them (torchao).
_MOMENT = {"fp32": 4.0, "bf16": 2.0, "8bit": 1 + 4 / 256}
CHUNK_ELEMENTS = 2**28  # logits that the loss in bf16 computes at a time: half a GiB


def weight_bytes(folder: Path, dtype: str = "auto") -> int:
    """Bytes of a checkpoint's weights in memory.

    Args:
        folder: a safetensors checkpoint.
        dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.

    Raises:
        CheckpointError: it is not a readable checkpoint.
    """
    with CheckpointReader(folder) as reader:
        return sum(
            info.size if dtype == "auto" else info.num_elements * _BYTES[dtype] for info in reader.tensors.values()
        )


@dataclass(frozen=True)
class Training:
    """The options of `moetool cpt` that decide how much memory training takes, under their names there.

    `compiled_loss` is whether --compile or --liger keeps the loss from holding anything in fp32.
    """

    seq_len: int
    micro_batch_size: int
    precision: str
    moments: str = "fp32"
    master_weights: bool = True
    gradient_checkpointing: bool = False
    freeze_router: bool = False
    compiled_loss: bool = False


def estimate(model: Any, training: Training) -> dict[str, int]:
    """Bytes that each process needs on its device.

    In fp32: weights, gradients and both moments, 16 bytes per parameter. In bf16 the weights of the forward come on top
    (2 bytes); `--moments` and `--no-master-weights` make it less. Activations are an estimate: each matrix keeps its
    input and its output for the backward, each norm three rows in fp32, and the head its logits and their gradient,
    which bf16 takes some tokens at a time.

    Args:
        model: without weights, see `parameters`.
        training: its options.

    Returns:
        `weights`, `gradients`, `optimizer`, `activations` and their sum, `total`.
    """
    total, _ = count_parameters(model)
    _, top_k = routing_size(model)
    trained = total - training.freeze_router * sum(p.numel() for n, p in model.named_parameters() if is_router(n))
    half = training.precision == "bf16"
    compute = BFLOAT16 if half else FLOAT32
    text = model.config.get_text_config()
    token = 0
    for name, parameter in model.named_parameters():
        if is_embedding(name):
            continue
        if parameter.ndim == 1:
            token += 3 * FLOAT32 * parameter.numel()
        else:
            token += compute * (top_k if is_routed(name, parameter) else 1) * sum(parameter.shape[-2:])
    if training.gradient_checkpointing:  # the inputs of all layers, and all of one
        token = token // text.num_hidden_layers + text.num_hidden_layers * text.hidden_size * compute
    tokens = training.micro_batch_size * training.seq_len
    head = tokens * text.vocab_size * (2 * FLOAT32 + compute)
    if half:  # the logits of a chunk and their gradient, and that of the head
        between = 0 if training.compiled_loss else 3 * FLOAT32
        head = (2 * BFLOAT16 + between) * min(tokens * text.vocab_size, CHUNK_ELEMENTS)
        head += (FLOAT32 + BFLOAT16) * text.vocab_size * text.hidden_size
    masters = FLOAT32 if training.master_weights else 0
    need = {
        "weights": (masters + BFLOAT16 if half else FLOAT32) * total,
        "gradients": FLOAT32 * trained,
        "optimizer": int(2 * _MOMENT[training.moments] * trained),
        "activations": token * tokens + head,
    }
    return {**need, "total": sum(need.values())}


def saving_bytes(model: Any, training: Training, num_processes: int) -> int:
    """Bytes of host memory that each process needs to save a step.

    A copy of its share of the weights and moments, and one tensor that it writes: as it comes in, and as it is saved.

    Args:
        model: without weights, see `parameters`.
        training: its options.
        num_processes: of the run; each copies as much, whether it holds all weights or a share.
    """
    total, _ = count_parameters(model)
    largest: int = max(parameter.numel() for parameter in model.parameters())
    return int((FLOAT32 + 2 * _MOMENT[training.moments]) * total / num_processes) + 2 * FLOAT32 * largest


def smaller(model: Any, training: Training, there: int) -> list[tuple[str, int]]:
    """The options with which a run that is too large would fit, and what it would need: what costs least comes first.

    Args:
        model: without weights, see `parameters`.
        training: that is too large.
        there: bytes of the device.
    """
    steps: list[tuple[str, str, dict[str, Any]]] = [
        ("--gradient-checkpointing", "", {"gradient_checkpointing": True}),
        ("--micro-batch-size", " 1", {"micro_batch_size": 1}),
    ]
    steps += [("--moments", f" {moments}", {"moments": moments}) for moments in ("bf16", "8bit")]
    steps += [("--no-master-weights", "", {"master_weights": False})] if training.precision == "bf16" else []
    fitting: list[tuple[str, int]] = []
    options: dict[str, str] = {}
    need = estimate(model, training)["total"]
    for option, value, change in steps:
        changed = replace(training, **change)
        if (less := estimate(model, changed)["total"]) >= need:
            continue
        training, need = changed, less
        options[option] = value
        if need <= there:
            fitting.append((" ".join(name + text for name, text in options.items()), need))
    return fitting
