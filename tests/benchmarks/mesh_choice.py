"""Which mesh to use for two models on 8, 16 and 64 GPUs: computed from bytes and published bandwidths, not measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import product
from typing import Any, NamedTuple

from moetool.cost.memory import Training, estimate
from moetool.cost.operations import flops_per_token
from moetool.cost.traffic import Group, Traffic, step_traffic, totals
from moetool.errors import ConfigError
from moetool.mesh import Mesh, check_model, check_sizes

NODE = 8  # GPUs that NVLink connects
NVLINK = 450e9  # bytes/s a direction and GPU: H100 SXM data sheet, 900 GB/s both ways
NETWORK = 50e9  # bytes/s a direction and GPU: one NDR InfiniBand port (400 Gb/s) for each GPU, as in a DGX H100
REACHED = 0.8  # of both: nccl-tests reach 360 GB/s in a node of 8 H100 (NVIDIA/nccl-tests#326)
PEAK = 989e12  # dense bf16 operations/s: H100 SXM data sheet
ALONE = 0.4  # of PEAK on one GPU; measured there: 0.37 and 0.48 (docs/benchmarks/cpt.md)
SPARE = 0.9  # of a GPU's memory: the estimate knows no fragmentation and no buffers of NCCL

SEQ_LEN, BATCH = 4096, 1024  # 4.2 M tokens a step
CARDS = {"H100, 80 GB": 80e9, "H200, 141 GB": 141e9}
GPUS = (8, 16, 64)


class Choice(NamedTuple):
    """A mesh and what it costs, computed.

    Attributes:
        mesh: of the GPUs.
        training: options.
        memory: bytes of each GPU, estimated.
        sent: bytes that each GPU sends in a step, by kind.
        crossing: of these, through its network port.
        alone: share of the step that is not communication, if nothing overlaps.
        overlapped: the same, if FSDP's traffic hides behind the arithmetic, and that of tokens and layers does not.
    """

    mesh: Mesh
    training: Training
    memory: int
    sent: dict[str, float]
    crossing: float
    alone: float
    overlapped: float


def models() -> dict[str, Any]:
    """The two models, without weights."""
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

    llama = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    qwen = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "vocab_size": 151936}
    qwen |= {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    qwen |= {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    configs = {
        "Llama-3.1-8B x 8": MixtralConfig(**llama, num_local_experts=8, num_experts_per_tok=2),
        "Qwen3-30B-A3B": Qwen3MoeConfig(**qwen),
    }
    with torch.device("meta"):
        return {name: AutoModelForCausalLM.from_config(config) for name, config in configs.items()}


def seconds(traffic: Traffic) -> float:
    """Time of collectives at REACHED of the published bandwidths.

    Rings of a group enter and leave a node through as many network ports as it has members there, each with its part.
    In an exchange, what goes to other nodes passes the GPU's own port.
    """
    return max(traffic.sent / NVLINK, crossing(traffic) / NETWORK) / REACHED


def crossing(traffic: Traffic) -> float:
    """Bytes that each GPU sends to other nodes."""
    group, inside = traffic.group, _inside(traffic.group)
    if inside == group.size:
        return 0
    if traffic.operation == "exchange":
        return traffic.payload * (group.size - inside) / group.size
    return traffic.sent / inside


def _inside(group: Group) -> int:
    """Members of a group in one node."""
    return max(1, min(group.size, NODE // group.stride))


def choice(model: Any, mesh: Mesh, training: Training, flops: int) -> Choice | None:
    """What a mesh costs in a step of BATCH sequences; None where no card has the memory.

    Args:
        model: without weights.
        mesh: of the GPUs.
        training: options.
        flops: operations of a token.
    """
    memory = estimate(model, training, mesh)["total"]
    if memory > SPARE * max(CARDS.values()):
        return None
    micro_batches = BATCH // training.micro_batch_size // mesh.data_parallel
    traffic = step_traffic(model, mesh, training, micro_batches)
    tokens = BATCH * training.seq_len / mesh.processes
    compute = flops * tokens / PEAK / ALONE
    hidden = sum(seconds(one) for one in traffic if one.kind in ("weights", "gradients", "replicas"))
    waited = sum(map(seconds, traffic)) - hidden
    return Choice(
        mesh,
        training,
        memory,
        totals(traffic),
        sum(map(crossing, traffic)),
        compute / (compute + hidden + waited),
        compute / (max(compute, hidden) + waited),
    )


def meshes(model: Any, gpus: int) -> Iterator[Mesh]:
    """All meshes of so many GPUs that `cpt` takes, with a `tp` of at most 4; but for whole weights."""
    powers = [2**n for n in range(7) if 2**n <= gpus]
    for tp, fsdp, ep in product((1, 2, 4), powers, powers):
        if gpus % (fsdp * tp):
            continue
        mesh = Mesh(fsdp, ep, tp, gpus // fsdp // tp)
        with suppress(ConfigError):
            check_sizes(mesh, gpus)
            check_model(mesh, model)
            if mesh.sharded:
                yield mesh


def choices(model: Any, gpus: int) -> list[Choice]:
    """All meshes and micro-batches, with gradient checkpointing, in bf16.

    First come those whose efficiency is within a twentieth of the best's; of these, what sends least over the network.
    """
    found, flops = [], flops_per_token(model, SEQ_LEN)
    for mesh in meshes(model, gpus):
        for size in (1, 2, 4, 8):
            training = Training(SEQ_LEN, size, "bf16", gradient_checkpointing=True)
            if BATCH % (size * mesh.data_parallel) or not (one := choice(model, mesh, training, flops)):
                break
            found.append(one)
    return sorted(found, key=lambda one: (-round(20 * one.overlapped), one.crossing, -round(one.alone, 2), one.memory))


def fitting(found: Sequence[Choice], memory: float) -> Choice | None:
    """The first that fits a GPU."""
    return next((one for one in found if one.memory <= SPARE * memory), None)


def table() -> str:
    """The recommendations as Markdown, beside plain FSDP2."""
    lines = [
        "| model | GPUs | card | mesh | micro-batch | memory | GB sent a step | GB over the network | efficiency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, model in models().items():
        for gpus in GPUS:
            found = choices(model, gpus)
            plain = [one for one in found if one.mesh == Mesh(gpus)]
            for card, memory in CARDS.items():
                start = f"| {name} | {gpus} | {card} |"
                for label, some in (("", found), (" (plain FSDP2)", plain)):
                    best = fitting(some, memory)
                    none = f"{'none fits' if some else 'refused: 8 experts'}{label} | | | | | |"
                    lines.append(f"{start} {_row(best, label) if best else none}")
    return "\n".join(lines)


def _row(one: Choice, label: str) -> str:
    mesh = one.mesh
    flags = {"--fsdp": mesh.fsdp, "--ep": mesh.ep, "--tp": mesh.tp, "--replicas": mesh.replicas}
    options = " ".join(f"{flag} {size}" for flag, size in flags.items() if size > 1)
    parts = ", ".join(f"{kind} {size / 1e9:,.0f}" for kind, size in one.sent.items() if size > 1e8)
    total = f"{sum(one.sent.values()) / 1e9:,.0f} ({parts})"
    cells = [f"`{options}`{label}", f"{one.training.micro_batch_size}", f"{one.memory / 1e9:.0f} GB", total]
    cells += [f"{one.crossing / 1e9:,.0f}", f"{one.alone:.0%} to {one.overlapped:.0%}"]
    return " | ".join(cells) + " |"
