"""The meshes that a model fits on, their traffic, and the best one, from bytes and published bandwidths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product

from moetool.cost.devices import Gpu
from moetool.cost.memory import Training, estimate, loading_bytes, saving_bytes
from moetool.cost.operations import flops_per_token
from moetool.cost.parameters import Sizes
from moetool.cost.traffic import Group, Traffic, step_traffic, totals
from moetool.errors import ConfigError
from moetool.mesh import Mesh, check_division, check_sizes

NETWORK = 50e9  # bytes/s a direction and GPU: one NDR InfiniBand port (400 Gb/s) for each GPU, as in a DGX H100
REACHED = 0.8  # of links and network: nccl-tests reach 360 GB/s in a node of 8 H100 (NVIDIA/nccl-tests#326)
ALONE = 0.4  # of a GPU's peak on one GPU; measured on an H100: 0.37 and 0.48 (docs/benchmarks/cpt.md)
SPARE = 0.9  # of a GPU's memory: the estimate knows no fragmentation and no buffers of NCCL
MICRO_BATCHES = (1, 2, 4, 8)
MAX_TP = 8
MOST_GPUS = 2048  # to try, where fewer are too few


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run.

    Attributes:
        gpu: their kind.
        num_gpus: all of them.
        node: GPUs of a machine.
    """

    gpu: Gpu
    num_gpus: int
    node: int = 8

    @property
    def room(self) -> float:
        """Bytes of a GPU that a run may take by the estimate."""
        return SPARE * self.gpu.memory

    @property
    def per_machine(self) -> int:
        """Processes of one machine."""
        return min(self.node, self.num_gpus)


@dataclass(frozen=True)
class Choice:
    """A mesh and what it costs, computed.

    Attributes:
        mesh: of the GPUs.
        training: options.
        memory: bytes of each GPU by what takes them, and `total`; see `cost.memory.estimate`.
        loading: bytes of each machine's memory while weights are loaded.
        saving: the same while a step is saved.
        sent: bytes that each GPU sends in a step, by kind.
        crossing: of these, through its network port.
        alone: share of the step that is not communication, if nothing overlaps.
        overlapped: the same, if FSDP's traffic hides behind the arithmetic, and that of tokens and layers does not.
    """

    mesh: Mesh
    training: Training
    memory: dict[str, int]
    loading: int
    saving: int
    sent: dict[str, float]
    crossing: float
    alone: float
    overlapped: float


def seconds(traffic: Traffic, cluster: Cluster) -> float:
    """Time of collectives at REACHED of the published bandwidths.

    Rings of a group enter and leave a machine through as many network ports as it has members there, each with its
    part. In an exchange, what goes to other machines passes the GPU's own port.
    """
    return max(traffic.sent / cluster.gpu.link, crossing(traffic, cluster.node) / NETWORK) / REACHED


def crossing(traffic: Traffic, node: int) -> float:
    """Bytes that each GPU sends to other machines.

    Args:
        traffic: of one kind.
        node: GPUs of a machine.
    """
    group = traffic.group
    inside = _inside(group, node)
    if inside == group.size:
        return 0
    if traffic.operation == "exchange":
        return traffic.payload * (group.size - inside) / group.size
    return traffic.sent / inside


def _inside(group: Group, node: int) -> int:
    """Members of a group in one machine."""
    return max(1, min(group.size, node // group.stride))


def meshes(sizes: Sizes, cluster: Cluster) -> Iterator[Mesh]:
    """All meshes of a cluster that `cpt` takes; those of whole weights come first.

    `tp` stays within a machine, and needs fsdp or replicas above 1 (docs/multi-gpu.md).

    Args:
        sizes: of the model.
        cluster: its GPUs.
    """
    gpus = cluster.num_gpus
    yield Mesh(replicas=gpus)
    parts = [n for n in range(1, gpus + 1) if gpus % n == 0]
    plans = {"--tp": bool(sizes.tp_plan), "--ep": bool(sizes.spread), "--fsdp": bool(sizes.fsdp_plan)}
    heads = sizes.num_heads, sizes.num_key_value_heads
    counts = sizes.expert_counts
    spread = [ep for ep in parts if ep == 1 or (counts and not any(number % ep for number in counts))]
    for tp, fsdp, ep in product([tp for tp in parts if tp <= min(MAX_TP, cluster.node)], parts, spread):
        if gpus % (fsdp * tp):
            continue
        mesh = Mesh(fsdp, ep, tp, gpus // fsdp // tp)
        with suppress(ConfigError):
            check_sizes(mesh, gpus)
            if mesh.sharded:
                check_division(mesh, sizes.family, counts, heads, plans)
                yield mesh


def run_options(mesh: Mesh, seq_len: int, micro_batch_size: int) -> Training:
    """The options of `cpt` that a plan assumes: bf16, checkpointing, and layers compiled where that is the default."""
    compiled = mesh.whole
    return Training(seq_len, micro_batch_size, "bf16", gradient_checkpointing=True, compiled_loss=compiled)


def choices(sizes: Sizes, cluster: Cluster, seq_len: int, batch: int) -> list[Choice]:
    """All meshes and micro-batches that fit, the recommended one first.

    First come those whose efficiency is within a twentieth of the best's; of these, what sends least over the network.
    Where both are equal, the larger micro-batch: kernels are then larger, which this efficiency does not know.

    Args:
        sizes: of the model.
        cluster: its GPUs.
        seq_len: tokens of a sequence.
        batch: sequences of a step.
    """
    found: list[Choice] = []
    flops = flops_per_token(sizes, seq_len)
    for mesh in meshes(sizes, cluster):
        for size in MICRO_BATCHES:
            training = run_options(mesh, seq_len, size)
            if batch % (size * mesh.data_parallel) or estimate(sizes, training, mesh)["total"] > cluster.room:
                break
            found.append(_choice(sizes, cluster, mesh, training, flops, batch))
    return sorted(
        found,
        key=lambda one: (
            -round(20 * one.overlapped),
            one.crossing,
            -round(one.alone, 2),
            -one.training.micro_batch_size,
            one.memory["total"],
        ),
    )


def _choice(sizes: Sizes, cluster: Cluster, mesh: Mesh, training: Training, flops: int, batch: int) -> Choice:
    micro_batches = batch // training.micro_batch_size // mesh.data_parallel
    traffic = step_traffic(sizes, mesh, training, micro_batches)
    compute = flops * batch * training.seq_len / mesh.processes / cluster.gpu.peak_flops / ALONE
    hides = ("weights", "gradients", "replicas")
    hidden = sum(seconds(one, cluster) for one in traffic if one.kind in hides)
    waited = sum(seconds(one, cluster) for one in traffic if one.kind not in hides)
    return Choice(
        mesh=mesh,
        training=training,
        memory=estimate(sizes, training, mesh),
        loading=loading_bytes(sizes, mesh, gpu=True) * cluster.per_machine,
        saving=saving_bytes(sizes, training, mesh.processes, pinned=True) * cluster.per_machine,
        sent=totals(traffic),
        crossing=sum(crossing(one, cluster.node) for one in traffic),
        alone=compute / (compute + hidden + waited),
        overlapped=compute / (max(compute, hidden) + waited),
    )


def best_of_each(found: Sequence[Choice]) -> list[Choice]:
    """The first choice of each mesh, in order."""
    best: dict[Mesh, Choice] = {}
    for one in found:
        best.setdefault(one.mesh, one)
    return list(best.values())


def least_memory(
    sizes: Sizes, cluster: Cluster, seq_len: int, most_replicas: int = 1 << 30
) -> tuple[Mesh, dict[str, int]]:
    """The mesh that needs least of each GPU with one sequence at a time, and the bytes that it needs.

    Args:
        sizes: of the model.
        cluster: its GPUs.
        seq_len: tokens of a sequence.
        most_replicas: meshes with more copies are left out.
    """
    need = {}
    for mesh in meshes(sizes, cluster):
        if mesh.whole or mesh.replicas <= most_replicas:
            need[mesh] = estimate(sizes, run_options(mesh, seq_len, 1), mesh)
    return min(need.items(), key=lambda item: item[1]["total"])


def finer(sizes: Sizes, parts: int) -> Sizes:
    """The same model with each expert in so many parts, all of which are chosen together.

    Args:
        sizes: of a Mixture of Experts.
        parts: of each expert.
    """
    experts = sizes.num_experts
    shapes = {}
    for name, shape in sizes.shapes.items():
        if ".experts." in name and len(shape) == 3:
            side = 1 if name.endswith(("gate_up_proj", "gate_proj", "up_proj")) else 2
            shape = (shape[0] * parts, *(n // parts if i == side else n for i, n in enumerate(shape) if i))
        elif len(shape) == 2 and shape == (experts, sizes.hidden_size):
            shape = (experts * parts, sizes.hidden_size)
        shapes[name] = shape
    return replace(sizes, shapes=shapes, num_experts=experts * parts, top_k=sizes.top_k * parts)


def more_gpus(sizes: Sizes, cluster: Cluster, seq_len: int) -> int | None:
    """The next larger number of such GPUs on which the model fits: a power of two, or one by doubling.

    Args:
        sizes: of the model.
        cluster: on which it does not fit.
        seq_len: tokens of a sequence.

    Returns:
        None if it never fits.
    """
    for gpus in sorted({number << doubled for number in (1, cluster.num_gpus) for doubled in range(1, 12)}):
        if not cluster.num_gpus < gpus <= MOST_GPUS or (gpus > cluster.node and gpus % cluster.node):
            continue
        # Copies need no less: what they hold was tried with fewer GPUs.
        _, need = least_memory(sizes, replace(cluster, num_gpus=gpus), seq_len, most_replicas=1)
        if need["total"] <= cluster.room:
            return gpus
    return None
