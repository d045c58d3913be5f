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
_MOMENT = {"fp32": 4.0, "offload": 4.0, "bf16": 2.0, "8bit": 1 + 4 / 256}
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
class Sharing:
    """How the processes of a run shard its model.

    Attributes:
        num_processes: of the run.
        sharded: whether each holds a share of the weights (FSDP, ZeRO-3).
        zero_stage: of DeepSpeed, which shards moments, from 2 on gradients, in 3 weights; 0 without it.
    """

    num_processes: int = 1
    sharded: bool = False
    zero_stage: int = 0

    @property
    def whole(self) -> bool:
        """Whether each process holds all weights and moments."""
        return not self.sharded and not self.zero_stage

    def parts(self, stage: int) -> int:
        """The number of parts into which ZeRO shards something from a stage on; each process has one."""
        return self.num_processes if self.sharded or self.zero_stage >= stage else 1


@dataclass(frozen=True)
class Training:
    """The options of `moetool cpt` that decide how much memory training takes, under their names there.

    `compiled_loss` is whether --compile or --liger keeps the loss from holding anything in fp32, `whole_logits` whether
    a term of the loss reads the logits, which are then those of all tokens.
    """

    seq_len: int
    micro_batch_size: int
    precision: str
    moments: str = "fp32"
    master_weights: bool = True
    gradient_checkpointing: bool = False
    freeze_router: bool = False
    compiled_loss: bool = False
    whole_logits: bool = False


def estimate(model: Any, training: Training, sharing: Sharing) -> dict[str, int]:
    """Bytes that each process needs on its device.

    In fp32: weights, gradients and both moments, 16 bytes per parameter. In bf16 the weights of the forward come on top
    (2 bytes); `--moments` and `--no-master-weights` make it less. Sharded weights are gathered one layer at a time.
    Activations are an estimate: each matrix keeps its input and its output for the backward, each norm three rows in
    fp32, and the head its logits and their gradient. bf16 takes these some tokens at a time, unless a term of the loss
    reads them (what else it keeps is not known here) or the head does more than a product. DeepSpeed updates a second
    copy of a process's share of the weights, and in stage 3 keeps up to 1e9 gathered ones.

    Args:
        model: without weights, see `parameters`.
        training: its options.
        sharing: of its processes.

    Returns:
        `weights`, `gradients`, `optimizer`, `activations` and their sum, `total`; and `host`, which each process of
        `--moments offload` needs in host memory for master weights and moments.
    """
    total, _ = count_parameters(model)
    _, top_k = routing_size(model)
    trained = total - training.freeze_router * sum(p.numel() for n, p in model.named_parameters() if is_router(n))
    weights, gradients, moments = (sharing.parts(stage) for stage in (3, 2, 1))
    half = training.precision == "bf16"
    mixed = half and sharing.whole
    compute = BFLOAT16 if half else FLOAT32
    text = model.config.get_text_config()
    token, largest = 0, 0
    for name, parameter in model.named_parameters():
        if is_embedding(name):
            continue
        largest = max(largest, parameter.numel())
        if parameter.ndim == 1:
            token += 3 * FLOAT32 * parameter.numel()
        else:
            token += compute * (top_k if is_routed(name, parameter) else 1) * sum(parameter.shape[-2:])
    if training.gradient_checkpointing:  # the inputs of all layers, and all of one
        token = token // text.num_hidden_layers + text.num_hidden_layers * text.hidden_size * compute
    tokens = training.micro_batch_size * training.seq_len
    head = tokens * text.vocab_size * (2 * FLOAT32 + compute)
    if half and training.whole_logits:  # in fp32 they are kept for the term, beside those in bf16
        head += tokens * text.vocab_size * FLOAT32
    elif mixed and not _changes_logits(model):  # the logits of a chunk and their gradient, and that of the head
        between = 0 if training.compiled_loss else 3 * FLOAT32
        head = (2 * BFLOAT16 + between) * min(tokens * text.vocab_size, CHUNK_ELEMENTS)
        head += (FLOAT32 + BFLOAT16) * text.vocab_size * text.hidden_size
    offload = training.moments == "offload"
    masters = FLOAT32 if training.master_weights and not offload else 0
    kept = masters + BFLOAT16 if mixed else FLOAT32
    casts = BFLOAT16 * (2 * largest if sharing.sharded else total) if half and not mixed else 0
    copies = FLOAT32 * trained // sharing.num_processes if sharing.zero_stage else 0
    copies += FLOAT32 * min(total, 10**9) if sharing.zero_stage == 3 else 0
    optimizer = int(2 * _MOMENT[training.moments] * trained) // moments
    need = {
        "weights": kept * total // weights + casts + copies,
        "gradients": FLOAT32 * trained // gradients,
        "optimizer": 0 if offload else optimizer,
        "activations": token * tokens + head,
    }
    return {**need, "total": sum(need.values()), "host": FLOAT32 * trained + optimizer if offload else 0}


def _changes_logits(model: Any) -> bool:
    """Whether a head adds a bias or a family caps its logits: their loss is not taken in chunks."""
    head, text = model.get_output_embeddings(), model.config.get_text_config()
    return getattr(head, "bias", None) is not None or bool(getattr(text, "final_logit_softcapping", None))


def saving_bytes(model: Any, training: Training) -> int:
    """Bytes of host memory that the main process needs to save a step: weights, moments, and weights as they are saved.

    Args:
        model: without weights, see `parameters`.
        training: its options.
    """
    total, _ = count_parameters(model)
    return int((2 * FLOAT32 + 2 * _MOMENT[training.moments]) * total)


def smaller(model: Any, training: Training, sharing: Sharing, there: int) -> list[tuple[str, int]]:
    """The options with which a run that is too large would fit, and what it would need: what costs least comes first.

    Args:
        model: without weights, see `parameters`.
        training: that is too large.
        sharing: of its processes.
        there: bytes of the device.
    """
    steps: list[dict[str, Any]] = [{"gradient_checkpointing": True}, {"micro_batch_size": 1}]
    if sharing.whole:
        steps += [{"moments": "bf16"}, {"moments": "8bit"}]
        if training.precision == "bf16":
            steps += [{"master_weights": False}, {"moments": "offload", "master_weights": True}]
    fitting: list[tuple[str, int]] = []
    changes: dict[str, Any] = {}
    need = estimate(model, training, sharing)["total"]
    for change in steps:
        less = estimate(model, replace(training, **changes | change), sharing)["total"]
        if less >= need:
            continue
        changes, need = changes | change, less
        if need <= there:
            typed = [_typed(name, value) for name, value in changes.items() if value != getattr(training, name)]
            fitting.append((" ".join(typed), need))
    return fitting


def _typed(name: str, value: Any) -> str:
    """An option as it is typed."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option} {value}"
