"""Memory that a model takes when it is loaded and while it is trained, known before any weights are read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moetool.checkpoint.reader import CheckpointReader
from moetool.cost.parameters import count_parameters, is_embedding, is_routed, is_router, routing_size
from moetool.mesh import Mesh

FLOAT32, BFLOAT16 = 4, 2  # bytes
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of a moment: 8 bits, and an fp32 scale for each 256 of them (torchao).
_MOMENT = {"fp32": 4.0, "offload": 4.0, "bf16": 2.0, "8bit": 1 + 4 / 256}
_ONE = Mesh()
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


def shard_elements(name: str, parameter: Any, mesh: Mesh) -> int:
    """The most elements of a parameter that a process of a mesh holds.

    FSDP deals out rows (of experts: experts), so that some processes hold one more than others. Tensor parallelism
    divides every matrix but the routers' and, where `ep` spreads them, the experts'.
    """
    rows, rest = int(parameter.shape[0]), math.prod(map(int, parameter.shape[1:]))
    if is_routed(name, parameter) and mesh.ep > 1:
        return math.ceil(rows / mesh.ep / mesh.efsdp) * rest
    divided = parameter.ndim > 1 and not is_router(name)
    return math.ceil(rows / mesh.fsdp) * rest // (mesh.tp if divided else 1)


def _gathered_elements(model: Any, mesh: Mesh) -> tuple[int, int]:
    """What FSDP gathers for a forward: the elements of the largest layer, and of the embeddings and the head."""
    layers: Counter[str] = Counter()
    ends = 0
    for name, parameter in model.named_parameters():
        held = parameter.numel() // (mesh.ep if is_routed(name, parameter) and mesh.ep > 1 else mesh.tp)
        if is_embedding(name):
            ends += held
        else:
            number = next((part for part in name.split(".") if part.isdigit()), "")
            layers[number] += held
    return max(layers.values()), ends


def _token_elements(name: str, parameter: Any, hidden: int, top_k: int, mesh: Mesh) -> float:
    """Elements that a matrix keeps of each token: its input and output.

    Tensor parallelism divides all but the residual stream; of tokens that go to experts, each process sends its share.
    """
    sizes = [int(size) for size in parameter.shape[-2:]]
    if not is_routed(name, parameter):
        return sum(size if size == hidden else size / mesh.tp for size in sizes)
    if mesh.ep > 1:
        return float(top_k * sum(sizes) / mesh.tp)
    return float(top_k * sum(size if size == hidden else size / mesh.tp for size in sizes))


def estimate(model: Any, training: Training, mesh: Mesh = _ONE) -> dict[str, int]:
    """Bytes that each process needs on its device.

    In fp32: weights, gradients and both moments, 16 bytes per parameter. In bf16 the weights of the forward come on top
    (2 bytes); `--moments` and `--no-master-weights` make it less. A mesh shards all of these. FSDP then gathers two
    layers' weights at a time, in bf16 if that is the precision, and one layer's gradient, which it reduces in fp32;
    embeddings and head stay gathered. Activations are an estimate: each matrix keeps its input and its output for the
    backward, each norm three rows in fp32, tokens that are sent to experts of other processes both ways, and the head
    its logits and their gradient. bf16 takes these some tokens at a time, unless a term of the loss reads them (what
    else it keeps is not known here), the head does more than a product, or tensor parallelism divides it.

    Args:
        model: without weights, see `parameters`.
        training: its options.
        mesh: of its processes.

    Returns:
        `weights`, `gradients`, `optimizer`, `activations` and their sum, `total`; and `host`, which each process of
        `--moments offload` needs in host memory for master weights and moments.
    """
    total, _ = count_parameters(model)
    _, top_k = routing_size(model)
    held = trained = total
    if not mesh.whole:
        shards = {name: shard_elements(name, parameter, mesh) for name, parameter in model.named_parameters()}
        held = trained = sum(shards.values())
    if training.freeze_router:
        trained -= sum(p.numel() if mesh.whole else shards[n] for n, p in model.named_parameters() if is_router(n))
    half = training.precision == "bf16"
    compute = BFLOAT16 if half else FLOAT32
    text = model.config.get_text_config()
    token: float = 0
    hidden = text.hidden_size
    for name, parameter in model.named_parameters():
        if is_embedding(name):
            continue
        if parameter.ndim == 1:
            token += 3 * FLOAT32 * parameter.numel()
        else:
            token += compute * _token_elements(name, parameter, hidden, top_k, mesh)
            if mesh.ep > 1 and is_routed(name, parameter):  # of two matrices: sent and come back
                token += compute * top_k * hidden / mesh.tp
    if training.gradient_checkpointing:  # the inputs of all layers, and all of one
        token = token // text.num_hidden_layers + text.num_hidden_layers * hidden * compute
    tokens = training.micro_batch_size * training.seq_len
    head = tokens * text.vocab_size * (2 * FLOAT32 + compute)
    if half and training.whole_logits:  # in fp32 they are kept for the term, beside those in bf16
        head += tokens * text.vocab_size * FLOAT32
    elif half and mesh.tp == 1 and not _changes_logits(model):  # those of a chunk and their gradient, and the head's
        between = 0 if training.compiled_loss else 3 * FLOAT32
        head = (2 * BFLOAT16 + between) * min(tokens * text.vocab_size, CHUNK_ELEMENTS)
        head += (FLOAT32 + BFLOAT16) * text.vocab_size * hidden
    offload = training.moments == "offload"
    masters = FLOAT32 if training.master_weights and not offload else 0
    layer, ends = _gathered_elements(model, mesh) if mesh.sharded else (0, 0)
    optimizer = int(2 * _MOMENT[training.moments] * trained)
    need = {
        "weights": (masters + BFLOAT16 if half and mesh.whole else FLOAT32) * held + compute * (2 * layer + ends),
        "gradients": FLOAT32 * trained + (compute + FLOAT32) * max(layer, ends),
        "optimizer": 0 if offload else optimizer,
        "activations": int(token * tokens) + head,
    }
    return {**need, "total": sum(need.values()), "host": FLOAT32 * trained + optimizer if offload else 0}


def _changes_logits(model: Any) -> bool:
    """Whether a head adds a bias or a family caps its logits: their loss is not taken in chunks."""
    head, text = model.get_output_embeddings(), model.config.get_text_config()
    return getattr(head, "bias", None) is not None or bool(getattr(text, "final_logit_softcapping", None))


def loading_bytes(model: Any, mesh: Mesh = _ONE, gpu: bool = False) -> int:
    """Bytes of host memory that each process needs to load a model in fp32.

    Whole weights are read ahead, and copied to a GPU when all are there: measured, 2.3 times their bytes. Of a mesh a
    process reads one tensor at a time, into its shards on the device.

    Args:
        model: without weights, see `parameters`.
        mesh: of its processes.
        gpu: whether the device has memory of its own.
    """
    held = [shard_elements(name, parameter, mesh) for name, parameter in model.named_parameters()]
    return FLOAT32 * (2 * sum(held) if mesh.whole else (0 if gpu else sum(held)) + 2 * max(held))


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


def smaller(model: Any, training: Training, there: int, mesh: Mesh = _ONE) -> list[tuple[str, int]]:
    """The options with which a run that is too large would fit, and what it would need: what costs least comes first.

    Args:
        model: without weights, see `parameters`.
        training: that is too large.
        there: bytes of the device.
        mesh: of its processes.
    """
    steps: list[dict[str, Any]] = [{"gradient_checkpointing": True}, {"micro_batch_size": 1}]
    if mesh.whole:
        steps += [{"moments": "bf16"}, {"moments": "8bit"}]
        if training.precision == "bf16":
            steps += [{"master_weights": False}, {"moments": "offload", "master_weights": True}]
    fitting: list[tuple[str, int]] = []
    changes: dict[str, Any] = {}
    need = estimate(model, training, mesh)["total"]
    for change in steps:
        less = estimate(model, replace(training, **changes | change), mesh)["total"]
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
