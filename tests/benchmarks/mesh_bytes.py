"""What the processes of a mesh send each other in a step of `moetool cpt`, from the model and the mesh alone.

Shapes: T tokens of a micro-batch, K experts per token, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from moetool.cost.memory import BFLOAT16, FLOAT32, Training
from moetool.cost.parameters import is_routed, routing_size
from moetool.mesh import Mesh
from moetool.train.mixed import exact_modules

INT64 = FLOAT64 = 8

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


def step_traffic(model: Any, mesh: Mesh, training: Training, micro_batches: int, num_terms: int = 2) -> list[Traffic]:
    """What a process sends in a step. Not counted: validation, saving, `--balance global-aux`.

    Args:
        model: a Mixture of Experts without weights.
        mesh: of the processes.
        training: the options of the run.
        micro_batches: of one process and step.
        num_terms: losses beside the language loss.
    """
    found: dict[tuple[str, str, Group], float] = defaultdict(float)
    calls: Counter[tuple[str, str, Group]] = Counter()
    for kind, operation, payload, group in _micro_batch(model, mesh, training):
        times = 1 if kind == "replicas" else micro_batches  # these are summed with the step's last micro-batch
        found[kind, operation, group] += payload * times
        calls[kind, operation, group] += times
    world = Group(mesh.processes, 1)
    if mesh.whole:
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        found["gradients", "reduce", world] += FLOAT32 * sum(trained)
    num_experts, _ = routing_size(model)
    layers = sum(name.endswith("down_proj") for name, p in model.named_parameters() if is_routed(name, p))
    sums = FLOAT64 * (1 + num_terms + layers * num_experts)
    found["metrics", "reduce", world] += sums if mesh.whole else sums + FLOAT64  # the square of the gradient's norm
    calls["metrics", "reduce", world] += 1 if mesh.whole else 2
    return [
        Traffic(kind, operation, payload, group, calls[kind, operation, group])
        for (kind, operation, group), payload in found.items()
        if group.size > 1
    ]


_Sent = tuple[str, str, float, Group]


def _micro_batch(model: Any, mesh: Mesh, training: Training) -> Iterator[_Sent]:
    if mesh.whole:
        return
    if mesh.sharded:
        yield from _fsdp(model, mesh, training)
    if mesh.ep > 1:
        yield from _experts(model, mesh, training)
    if mesh.tp > 1:
        yield from _tensor_parallel(model, mesh, training)


def _fsdp(model: Any, mesh: Mesh, training: Training) -> Iterator[_Sent]:
    """Each unit's weights are gathered before its forward and again before its backward, its gradients reduced after.

    The head and the last norm stay gathered in between. FSDP deals out rows (of experts: experts), so it sends as if
    their number were the next multiple of the processes. A checkpointed layer is repeated while it is gathered.
    """
    half = training.precision == "bf16"
    exact = set(exact_modules(model)) if half else set()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for unit, parameters in _units(model, mesh, exact).items():
        experts = mesh.ep > 1 and unit.endswith(".experts")
        size = mesh.efsdp if experts else mesh.fsdp
        shard = Group(size, mesh.ep if experts else mesh.tp)
        elements = sum(_padded(model, name, parameter, mesh, size) for name, parameter in parameters)
        bytes_each = FLOAT32 if not half or _pattern(unit) in exact else BFLOAT16
        style = model.fsdp_plan.get(_pattern(unit), "free_full_weight") if unit else "keep_full_weight"
        times = 1 if style == "keep_full_weight" or (tied and unit.endswith("embed_tokens")) else 2
        for _ in range(times):
            yield "weights", "gather", bytes_each * elements, shard
        yield "gradients", "scatter", FLOAT32 * elements, shard
        replicas = Group(mesh.replicas, mesh.fsdp * mesh.tp)
        yield "replicas", "reduce", FLOAT32 * elements / size, replicas


def _units(model: Any, mesh: Mesh, exact: set[str]) -> dict[str, list[tuple[str, Any]]]:
    """The parameters that FSDP gathers together, by the module that holds them; '' is the rest."""
    patterns = {*model.fsdp_plan, *exact}
    if mesh.ep > 1:
        patterns |= {name for name, style in model.ep_plan.items() if style == "ep_dispatch_experts"}
    keep = [name for name, style in model.fsdp_plan.items() if style == "keep_full_weight"]
    units: dict[str, list[tuple[str, Any]]] = {}
    for name, parameter in model.named_parameters():
        owner = name
        while owner and _pattern(owner) not in patterns:
            owner = owner.rpartition(".")[0]
        owner = keep[0] if owner in keep else owner  # the head and the last norm are one unit
        units.setdefault(owner, []).append((name, parameter))
    return units


@cache
def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _padded(model: Any, name: str, parameter: Any, mesh: Mesh, size: int) -> float:
    """Elements of a parameter as FSDP sends it: what `ep` and `tp` leave here, its rows rounded up."""
    rows, rest = int(parameter.shape[0]), math.prod(map(int, parameter.shape[1:]))
    style = _style(model, name) if mesh.tp > 1 else ""
    if is_routed(name, parameter) and mesh.ep > 1:
        rows //= mesh.ep
    elif style in ("colwise", "colwise_gather_output", "embedding_rowwise") and parameter.ndim < 3:
        rows = math.ceil(rows / mesh.tp)
    elif style in ("rowwise", "packed_colwise", "colwise") and parameter.ndim > 1:
        rest = math.ceil(rest / mesh.tp)
    return math.ceil(rows / size) * size * rest


def _style(model: Any, name: str) -> str:
    """The tensor-parallel style of a parameter, which its module may have."""
    pattern = _pattern(name)
    return str(model.tp_plan.get(pattern) or model.tp_plan.get(pattern.rpartition(".")[0], ""))


def _experts(model: Any, mesh: Mesh, training: Training) -> Iterator[_Sent]:
    """Tokens go to their experts and come back, in the forward and in the backward; before that, how many will."""
    num_experts, top_k = routing_size(model)
    tokens = training.micro_batch_size * training.seq_len / mesh.tp
    bytes_each = BFLOAT16 if training.precision == "bf16" else FLOAT32
    payload = tokens * top_k * _hidden(model) * bytes_each
    group = Group(mesh.ep, 1)
    again = training.gradient_checkpointing
    for _ in _expert_layers(model):
        for _ in range(2):
            yield "tokens forward", "exchange", payload, group
        for _ in range(4 if again else 2):
            yield "tokens backward", "exchange", payload, group
        for _ in range(2 if again else 1):
            yield "split sizes", "exchange", INT64 * num_experts, group


def _tensor_parallel(model: Any, mesh: Mesh, training: Training) -> Iterator[_Sent]:
    """Sums of partial outputs in the forward, and of partial gradients of inputs in the backward, for each matrix."""
    _, top_k = routing_size(model)
    tokens = training.micro_batch_size * training.seq_len
    bytes_each = BFLOAT16 if training.precision == "bf16" else FLOAT32
    group, again = Group(mesh.tp, 1), training.gradient_checkpointing
    row = tokens * _hidden(model) * bytes_each
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def both(operation: str, payload: float, layer: bool) -> Iterator[_Sent]:
        for _ in range(2 if again and layer else 1):
            yield "tensor parallel", operation, payload, group

    for module, _ in model.named_modules():
        style, layer = model.tp_plan.get(_pattern(module)), ".layers." in module
        shape = shapes.get(f"{module}.weight", (0, 0))
        if style == "moe_tp_experts":
            operation, weights = ("gather" if mesh.ep > 1 else "reduce"), tokens * top_k * FLOAT32
            # Where tokens are sent, their sum weighted in fp32 is gathered before it is rounded.
            # A checkpointed layer is not repeated beyond what its backward needs, which is not this.
            yield "tensor parallel", operation, tokens * _hidden(model) * FLOAT32 if mesh.ep > 1 else row, group
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


def _expert_layers(model: Any) -> list[str]:
    return [name for name, p in model.named_parameters() if is_routed(name, p) and name.endswith("down_proj")]


def _hidden(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)
