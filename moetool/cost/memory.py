"""The memory to load and to train a model, known before any weights are read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from moetool.checkpoint.model import skeleton
from moetool.checkpoint.reader import CheckpointReader
from moetool.cost.parameters import Sizes, is_embedding, is_routed, sizes_of, trained_names
from moetool.cost.shares import gathered_elements, parts_of, shard_elements
from moetool.layers import layer_of
from moetool.mesh import ONE, Mesh
from moetool.option import flag

FLOAT32, BFLOAT16 = 4, 2  # bytes
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of a moment: 8 bits, and an fp32 scale for each 256 of them (torchao).
_MOMENT = {"fp32": 4.0, "offload": 4.0, "bf16": 2.0, "8bit": 1 + 4 / 256}
CHUNK_ELEMENTS = 2**28  # logits that the loss in bf16 computes at a time: half a GiB


def weight_bytes(folder: Path, dtype: str = "auto", mesh: Mesh = ONE) -> int:
    """Bytes of a checkpoint's weights in the memory of each process that runs it.

    In a mesh these are its shards, and what FSDP gathers: two layers, and embeddings and head.

    Args:
        folder: a safetensors checkpoint.
        dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        mesh: of the processes that share it.

    Raises:
        CheckpointError: it is not a readable checkpoint.
    """
    need = sum(size for _, size in _tensors(folder, dtype))
    if mesh.whole:
        return need
    sizes = sizes_of(skeleton(folder))
    held = sum(shard_elements(sizes, mesh).values())
    layer, ends = gathered_elements(sizes, mesh) if mesh.sharded else (0, 0)
    return int(need * (held + 2 * layer + ends) / sizes.total)


def layer_bytes(folder: Path, dtype: str = "auto") -> int:
    """Bytes of a checkpoint's weights in memory where its decoder layers are read one at a time.

    These are what is in no layer, and the largest layer. While the gates and ups of its experts are put into one
    tensor, they are there twice: two thirds of a layer of experts more.

    Args:
        folder: a safetensors checkpoint.
        dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.

    Raises:
        CheckpointError: it is not a readable checkpoint.
    """
    return one_layer(_tensors(folder, dtype))


def _tensors(folder: Path, dtype: str) -> list[tuple[str, int]]:
    """The tensors of a checkpoint by name, with their bytes in a dtype."""
    with CheckpointReader(folder) as reader:
        tensors = reader.tensors.values()
    return [(info.name, info.size if dtype == "auto" else info.num_elements * _BYTES[dtype]) for info in tensors]


def one_layer(tensors: Iterable[tuple[str, int]]) -> int:
    """Bytes of tensors outside decoder layers, and of the largest layer, as in `layer_bytes`; from (name, bytes)."""
    layers: Counter[int | None] = Counter()
    for name, size in tensors:
        layers[layer_of(name)] += size
    outside = layers.pop(None, 0)
    return outside + max(layers.values(), default=0) * 5 // 3


def hidden_bytes(folder: Path, dtype: str, tokens: int) -> int:
    """Bytes of the hidden states of tokens between two layers.

    Args:
        folder: a safetensors checkpoint.
        dtype: `auto` (as most weights are saved), `float32`, `bfloat16` or `float16`.
        tokens: how many.

    Raises:
        CheckpointError: it is not a readable checkpoint.
    """
    with CheckpointReader(folder) as reader:
        width = reader.config.get("hidden_size")
        largest = max(reader.tensors.values(), key=lambda info: info.size)
    each = _BYTES.get(dtype, largest.size // max(1, largest.num_elements))
    return tokens * each * width if isinstance(width, int) else 0


@dataclass(frozen=True)
class Training:
    """The options of `moetool cpt` that decide how much memory training takes, under their names there.

    `compiled_loss` is whether --compile or --liger keeps the loss from holding anything in fp32, `whole_logits` whether
    a term of the loss reads the logits, which are then those of all tokens, `coupled` whether one takes the gradient of
    all gate matrices before the model's own, `rounds` whether bf16 cannot hold the weights that are not trained,
    `teacher` the sizes of one, or None.
    """

    seq_len: int
    micro_batch_size: int
    precision: str
    moments: str = "fp32"
    master_weights: bool = True
    gradient_checkpointing: bool = False
    freeze_router: bool = False
    train_only: str = "everything"
    router_gradient: str = "sparse"
    compiled_loss: bool = False
    whole_logits: bool = False
    coupled: bool = False
    rounds: bool = False
    teacher: Sizes | None = None

    def trained(self, sizes: Sizes) -> frozenset[str]:
        """The names of the parameters that are trained."""
        return trained_names(sizes.shapes, sizes.routers, self.train_only, self.freeze_router)


@lru_cache(maxsize=256)
def _token_bytes(sizes: Sizes, mesh: Mesh, compute: int) -> float:
    """Bytes that all layers keep of each token for the backward."""
    token: float = 0
    hidden, top_k, parts = sizes.hidden_size, sizes.top_k, parts_of(sizes, mesh)
    for name, shape in sizes.shapes.items():
        if is_embedding(name):
            continue
        if len(shape) == 1:
            token += 3 * FLOAT32 * shape[0]
        else:
            token += compute * _token_elements(name, shape, hidden, top_k, mesh, parts[name])
            if mesh.ep > 1 and is_routed(name, shape):  # of two matrices: sent and come back
                token += compute * top_k * hidden / mesh.tp
    return token


def _token_elements(name: str, shape: tuple[int, ...], hidden: int, top_k: int, mesh: Mesh, parts: int) -> float:
    """Elements that a matrix keeps of each token: its input and output.

    Tensor parallelism divides all but the residual stream; of tokens that go to experts, each process sends its share.
    """
    sides = shape[-2:]
    if is_routed(name, shape) and mesh.ep > 1:
        return float(top_k * sum(sides) / mesh.tp)
    one = sum(side if side == hidden else side / parts for side in sides)
    return float(one * (top_k if is_routed(name, shape) else 1))


def estimate(sizes: Sizes, training: Training, mesh: Mesh = ONE) -> dict[str, int]:
    """Bytes that each process needs on its device.

    In fp32: weights, gradients and both moments, 16 bytes per parameter. In bf16 the weights of the forward come on top
    (2 bytes); `--moments` and `--no-master-weights` make it less. A mesh shards all of these. FSDP then gathers two
    layers' weights at a time, in bf16 if that is the precision, and one layer's gradient, which it reduces in fp32;
    embeddings and head stay gathered. Activations are an estimate: each matrix keeps its input and its output for the
    backward, each norm three rows in fp32, tokens that are sent to experts of other processes both ways, and the head
    its logits and their gradient. bf16, or a teacher, takes these some tokens at a time, unless a term of the loss
    reads them (what else it keeps is not known here), the head does more than a product, or tensor parallelism divides
    it.

    Args:
        sizes: of the model.
        training: its options.
        mesh: of its processes.

    Returns:
        `weights`, `gradients`, `optimizer`, `activations`, `teacher` if there is one, and their sum, `total`; and
        `host`, which each process of `--moments offload` needs in host memory for master weights and moments.
    """
    shards, hidden = shard_elements(sizes, mesh), sizes.hidden_size
    names = training.trained(sizes)
    held, trained = sum(shards.values()), sum(size for name, size in shards.items() if name in names)
    half = training.precision == "bf16"
    compute = BFLOAT16 if half else FLOAT32
    token = _token_bytes(sizes, mesh, compute)
    if training.gradient_checkpointing:  # the inputs of all layers, and all of one
        token = token // sizes.num_layers + sizes.num_layers * hidden * compute
    tokens = training.micro_batch_size * training.seq_len
    head = tokens * sizes.vocab_size * (2 * FLOAT32 + compute)
    if half and training.whole_logits:  # in fp32 they are kept for the term, beside those in bf16
        head += tokens * sizes.vocab_size * FLOAT32
    elif (half or training.teacher is not None) and mesh.tp == 1 and not sizes.changes_logits:
        # Those of a chunk and their gradient, and the head's.
        between = 0 if training.compiled_loss else 3 * FLOAT32
        head = (2 * compute + between) * min(tokens * sizes.vocab_size, CHUNK_ELEMENTS)
        head += (FLOAT32 + compute) * sizes.vocab_size * hidden * any(map(is_embedding, names))
    if training.coupled:
        gates = (shape for name, shape in sizes.shapes.items() if name.endswith(".gate_up_proj"))
        head += compute * sum(map(math.prod, gates))
    routed = {name: shape for name, shape in sizes.shapes.items() if is_routed(name, shape)}
    if training.router_gradient == "dense":  # what a layer's experts keep, once more in the backward
        parts = parts_of(sizes, mesh)
        layer_elements = sum(_token_elements(n, s, hidden, sizes.top_k, mesh, parts[n]) for n, s in routed.items())
        head += int(tokens * compute * layer_elements / sizes.num_layers)
    if training.router_gradient == "default":  # averages and the sums of a step
        head += 2 * FLOAT32 * hidden * sum(s[0] for name, s in routed.items() if name.endswith("down_proj"))
    offload = training.moments == "offload"
    # Beside bf16 weights: of those that are trained, and of the others what bf16 cannot hold.
    masters = FLOAT32 * (trained * training.master_weights + (held - trained) * training.rounds)
    layer, ends = gathered_elements(sizes, mesh) if mesh.sharded else (0, 0)
    optimizer = int(2 * _MOMENT[training.moments] * trained)
    need = {
        "weights": (masters * (not offload) + BFLOAT16 * held if half and mesh.whole else FLOAT32 * held)
        + compute * (2 * layer + ends),
        "gradients": FLOAT32 * trained + (compute + FLOAT32) * max(layer, ends),
        "optimizer": 0 if offload else optimizer,
        "activations": int(token * tokens) + head,
    }
    if training.teacher is not None:
        need["teacher"] = _teacher_bytes(training.teacher, training, compute, mesh)
    return {**need, "total": sum(need.values()), "host": masters + optimizer if offload else 0}


def _teacher_bytes(teacher: Sizes, training: Training, compute: int, mesh: Mesh) -> int:
    """Bytes that a teacher needs: its weights, what one layer makes of the tokens, its hidden states and logits.

    A mesh shards the weights in fp32. The logits are those of a chunk, and in fp32 four times as many for the
    comparison; all tokens' where the head does more than a product.
    """
    tokens = training.micro_batch_size * training.seq_len
    weights = compute * teacher.total
    if not mesh.whole:
        layer, ends = gathered_elements(teacher, mesh) if mesh.sharded else (0, 0)
        weights = FLOAT32 * sum(shard_elements(teacher, mesh).values()) + compute * (2 * layer + ends)
    layer_of_token = _token_bytes(teacher, mesh, compute) / teacher.num_layers
    chunk = min(tokens * teacher.vocab_size, CHUNK_ELEMENTS)
    made = tokens * teacher.vocab_size if teacher.changes_logits else chunk
    between = 0 if training.compiled_loss else 4 * FLOAT32
    states = int(tokens * (layer_of_token + compute * teacher.hidden_size))
    return weights + states + int(compute * made + between * chunk)


def loading_bytes(sizes: Sizes, mesh: Mesh = ONE, gpu: bool = False) -> int:
    """Bytes of host memory that each process needs to load a model in fp32.

    Whole weights are read ahead, and copied to a GPU when all are there: measured, 2.3 times their bytes. Of a mesh a
    process reads one tensor at a time, into its shards on the device.

    Args:
        sizes: of the model.
        mesh: of its processes.
        gpu: whether the device has memory of its own.
    """
    held = shard_elements(sizes, mesh).values()
    return FLOAT32 * (2 * sum(held) if mesh.whole else (0 if gpu else sum(held)) + 2 * max(held))


def saving_bytes(sizes: Sizes, training: Training, num_processes: int, pinned: bool = False) -> int:
    """Bytes of host memory that each process needs to save a step.

    A copy of its share of the weights and of the moments of those that are trained, and one tensor that it writes: as
    it comes in, and as it is saved.

    Args:
        sizes: of the model.
        training: its options.
        num_processes: of the run; each copies as much, whether it holds all weights or a share.
        pinned: whether a GPU copies into that memory, of which torch takes a power of two for each tensor (torch's
            `CachingHostAllocator`, pytorch issue 150517): up to twice as much.
    """
    largest = max(map(math.prod, sizes.shapes.values()))
    trained = training.trained(sizes)
    if not pinned:
        copied = FLOAT32 * sizes.total + 2 * _MOMENT[training.moments] * sizes.count(trained)[0]
        return int(copied / num_processes) + 2 * FLOAT32 * largest
    blocks = 0
    for name, shape in sizes.shapes.items():
        moments = [_MOMENT[training.moments]] * 2 if name in trained else []
        for each in (FLOAT32, *moments):
            blocks += 2 ** math.ceil(math.log2(each * math.prod(shape) / num_processes))
    return blocks + 2 * FLOAT32 * largest


def smaller(sizes: Sizes, training: Training, there: int, mesh: Mesh = ONE) -> list[tuple[str, dict[str, int]]]:
    """The options with which a run that is too large would fit, and the estimate; the cheapest first.

    Args:
        sizes: of the model.
        training: that is too large.
        there: bytes of the device.
        mesh: of its processes.
    """
    steps: list[dict[str, Any]] = [{"gradient_checkpointing": True}, {"micro_batch_size": 1}]
    if mesh.whole:
        steps += [{"moments": "bf16"}, {"moments": "8bit"}]
        if training.precision == "bf16":
            steps += [{"master_weights": False}, {"moments": "offload", "master_weights": True}]
    fitting: list[tuple[str, dict[str, int]]] = []
    changes: dict[str, Any] = {}
    need = estimate(sizes, training, mesh)
    for change in steps:
        less = estimate(sizes, replace(training, **changes | change), mesh)
        if less["total"] >= need["total"]:
            continue
        changes, need = changes | change, less
        if need["total"] <= there:
            typed = [_typed(name, value) for name, value in changes.items() if value != getattr(training, name)]
            fitting.append((" ".join(typed), need))
    return fitting


def in_gb(need: Mapping[str, int]) -> str:
    """An estimate in words; `--moments offload` needs host memory, too."""
    host = f", and {need['host'] / 1e9:.3g} GB of host memory" if need["host"] else ""
    return f"{need['total'] / 1e9:.3g} GB{host}"


def _typed(name: str, value: Any) -> str:
    """An option as it is typed."""
    typed = flag(name)
    if isinstance(value, bool):
        return typed if value else f"--no-{typed[2:]}"
    return f"{typed} {value}"
