"""The traffic of a mesh in a step of `moetool cpt`, from the model and the mesh only.

Shapes: T tokens of a micro-batch, K experts per token, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from moetool.cost.memory import BFLOAT16, FLOAT32, Training
from moetool.cost.parameters import Sizes, is_routed, pattern
from moetool.mesh import Mesh

INT64 = FLOAT64 = 8
BALANCE_LOSSES = 2  # of `cpt --balance`, unless others are given

KINDS = (
    "weights",  # gathered by FSDP
    "gradients",  # reduced by FSDP or DDP
    "replicas",  # gradients that FSDP has reduced, summed over the replicas
    "tokens forward",
    "tokens backward",
    "split sizes",
    "tensor parallel",
    "metrics",
)


class Group(NamedTuple):
    """Processes that talk to each other: how many, and how far apart their numbers are."""

    size: int
    stride: int


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a step.

    Attributes:
        kind: one of KINDS.
        operation: `gather`, `scatter` (of the sum), `reduce` or `exchange`.
        payload: bytes of the whole tensors; of an exchange, what a process hands in.
        group: that takes part.
        calls: how many.
    """

    kind: str
    operation: str
    payload: float
    group: Group
    calls: float

    @property
    def sent(self) -> float:
        """Bytes that each process sends, by the ring algorithm; in an exchange to balanced experts."""
        return sent(self.operation, self.payload, self.group.size)


def sent(operation: str, payload: float, size: int) -> float:
    """Bytes that each of `size` processes sends; see Traffic."""
    return (2 if operation == "reduce" else 1) * payload * (size - 1) / size


def totals(traffic: Iterable[Traffic], what: str = "sent") -> dict[str, float]:
    """Sums of `sent`, `payload` or `calls` by kind."""
    sums: Counter[str] = Counter()
    for one in traffic:
        sums[one.kind] += getattr(one, what)
    return {kind: sums[kind] for kind in KINDS if kind in sums}


def step_traffic(sizes: Sizes, mesh: Mesh, training: Training, micro_batches: int) -> list[Traffic]:
    """The bytes that a process sends in a step. Not counted: validation, saving, `--balance global-aux`.

    Args:
        sizes: of the model.
        mesh: of the processes.
        training: the options of the run.
        micro_batches: of one process and step.
    """
    found: dict[tuple[str, str, Group], float] = defaultdict(float)
    calls: Counter[tuple[str, str, Group]] = Counter()
    for kind, operation, payload, group in _micro_batch(sizes, mesh, training):
        times = 1 if kind == "replicas" else micro_batches  # these are summed with the step's last micro-batch
        found[kind, operation, group] += payload * times
        calls[kind, operation, group] += times
    world = Group(mesh.processes, 1)
    if mesh.whole:
        trained = [math.prod(shape) for name, shape in sizes.shapes.items() if name not in sizes.frozen]
        found["gradients", "reduce", world] += FLOAT32 * sum(trained)
    sums = FLOAT64 * (1 + BALANCE_LOSSES + len(_expert_layers(sizes)) * sizes.num_experts)
    found["metrics", "reduce", world] += sums if mesh.whole else sums + FLOAT64  # the square of the gradient's norm
    calls["metrics", "reduce", world] += 1 if mesh.whole else 2
    return [
        Traffic(kind, operation, payload, group, calls[kind, operation, group])
        for (kind, operation, group), payload in found.items()
        if group.size > 1
    ]


_Sent = tuple[str, str, float, Group]


def _micro_batch(sizes: Sizes, mesh: Mesh, training: Training) -> Iterator[_Sent]:
    if mesh.whole:
        return
    if mesh.sharded:
        yield from _fsdp(sizes, mesh, training.precision == "bf16")
    if mesh.ep > 1:
        yield from _experts(sizes, mesh, training)
    if mesh.tp > 1:
        yield from _tensor_parallel(sizes, mesh, training)


@lru_cache(maxsize=256)
def _fsdp(sizes: Sizes, mesh: Mesh, half: bool) -> list[_Sent]:
    """Each unit's weights are gathered before its forward and again before its backward, its gradients reduced after.

    The head and the last norm stay gathered in between. FSDP deals out rows (of experts: experts), so it sends as if
    their number were the next multiple of the processes. A checkpointed layer is repeated while it is gathered.
    """
    found: list[_Sent] = []
    exact = set(sizes.exact) if half else set()
    tied = "lm_head.weight" not in sizes.shapes
    for unit, parameters in _units(sizes, mesh, exact).items():
        experts = mesh.ep > 1 and unit.endswith(".experts")
        size = mesh.efsdp if experts else mesh.fsdp
        shard = Group(size, mesh.ep if experts else mesh.tp)
        elements = sum(_padded(sizes, name, mesh, size) for name in parameters)
        bytes_each = FLOAT32 if not half or pattern(unit) in exact else BFLOAT16
        style = sizes.fsdp_plan.get(pattern(unit), "free_full_weight") if unit else "keep_full_weight"
        times = 1 if style == "keep_full_weight" or (tied and unit.endswith("embed_tokens")) else 2
        found += [("weights", "gather", bytes_each * elements, shard)] * times
        found.append(("gradients", "scatter", FLOAT32 * elements, shard))
        replicas = Group(mesh.replicas, mesh.fsdp * mesh.tp)
        found.append(("replicas", "reduce", FLOAT32 * elements / size, replicas))
    return found


def _units(sizes: Sizes, mesh: Mesh, exact: set[str]) -> dict[str, list[str]]:
    """The parameters that FSDP gathers together, by the module that holds them; '' is the rest."""
    patterns = {*sizes.fsdp_plan, *exact}
    if mesh.ep > 1:
        patterns |= set(sizes.spread)
    keep = [name for name, style in sizes.fsdp_plan.items() if style == "keep_full_weight"]
    units: dict[str, list[str]] = {}
    for name in sizes.shapes:
        owner = name
        while owner and pattern(owner) not in patterns:
            owner = owner.rpartition(".")[0]
        owner = keep[0] if owner in keep else owner  # the head and the last norm are one unit
        units.setdefault(owner, []).append(name)
    return units


def _padded(sizes: Sizes, name: str, mesh: Mesh, size: int) -> float:
    """Elements of a parameter as FSDP sends it: what `ep` and `tp` leave here, its rows rounded up."""
    shape = sizes.shapes[name]
    rows, rest = shape[0], math.prod(shape[1:])
    style = _style(sizes, name) if mesh.tp > 1 else ""
    if is_routed(name, shape) and mesh.ep > 1:
        rows //= mesh.ep
    elif style in ("colwise", "colwise_gather_output", "embedding_rowwise") and len(shape) < 3:
        rows = math.ceil(rows / mesh.tp)
    elif style in ("rowwise", "packed_colwise", "colwise") and len(shape) > 1:
        rest = math.ceil(rest / mesh.tp)
    return math.ceil(rows / size) * size * rest


def _style(sizes: Sizes, name: str) -> str:
    """The tensor-parallel style of a parameter, which its module may have."""
    kind = pattern(name)
    return sizes.tp_plan.get(kind) or sizes.tp_plan.get(kind.rpartition(".")[0], "")


def _experts(sizes: Sizes, mesh: Mesh, training: Training) -> Iterator[_Sent]:
    """Tokens go to their experts and come back, in the forward and in the backward; before that, how many will."""
    tokens = training.micro_batch_size * training.seq_len / mesh.tp
    bytes_each = BFLOAT16 if training.precision == "bf16" else FLOAT32
    payload = tokens * sizes.top_k * sizes.hidden_size * bytes_each
    group = Group(mesh.ep, 1)
    again = training.gradient_checkpointing
    for _ in _expert_layers(sizes):
        for _ in range(2):
            yield "tokens forward", "exchange", payload, group
        for _ in range(4 if again else 2):
            yield "tokens backward", "exchange", payload, group
        for _ in range(2 if again else 1):
            yield "split sizes", "exchange", INT64 * sizes.num_experts, group


def _tensor_parallel(sizes: Sizes, mesh: Mesh, training: Training) -> Iterator[_Sent]:
    """Sums of partial outputs in the forward, and of partial gradients of inputs in the backward, for each matrix."""
    tokens = training.micro_batch_size * training.seq_len
    bytes_each = BFLOAT16 if training.precision == "bf16" else FLOAT32
    group, again = Group(mesh.tp, 1), training.gradient_checkpointing
    row = tokens * sizes.hidden_size * bytes_each

    def both(operation: str, payload: float, layer: bool) -> Iterator[_Sent]:
        for _ in range(2 if again and layer else 1):
            yield "tensor parallel", operation, payload, group

    for module in _modules(sizes):
        style, layer = sizes.tp_plan.get(pattern(module)), ".layers." in module
        shape = sizes.shapes.get(f"{module}.weight", (0, 0))
        if style == "moe_tp_experts":
            operation, weights = ("gather" if mesh.ep > 1 else "reduce"), tokens * sizes.top_k * FLOAT32
            # Where tokens are sent, their sum weighted in fp32 is gathered before it is rounded.
            # A checkpointed layer is not repeated beyond what its backward needs, which is not this.
            yield "tensor parallel", operation, tokens * sizes.hidden_size * FLOAT32 if mesh.ep > 1 else row, group
            yield "tensor parallel", operation, row, group
            yield "tensor parallel", operation, weights, group
        elif style == "embedding_rowwise" or style == "rowwise":
            yield from both("reduce", row, layer)
        elif style in ("colwise", "colwise_gather_output"):
            yield "tensor parallel", "reduce", tokens * shape[1] * bytes_each, group
            if style == "colwise_gather_output":
                yield from both("gather", tokens * shape[0] * bytes_each, layer)
        elif style == "replicated_with_grad_allreduce":
            yield "tensor parallel", "reduce", FLOAT32 * shape[0], group


@lru_cache(maxsize=8)
def _modules(sizes: Sizes) -> list[str]:
    """All modules that hold parameters."""
    found: dict[str, None] = {}
    for name in sizes.shapes:
        while (name := name.rpartition(".")[0]) and name not in found:
            found[name] = None
    return list(found)


def _expert_layers(sizes: Sizes) -> list[str]:
    return [name for name, shape in sizes.shapes.items() if is_routed(name, shape) and name.endswith("down_proj")]
