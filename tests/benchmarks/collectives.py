"""What a process sends to others, counted by kind while it trains."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from typing import Any

import torch
from torch.distributed import ProcessGroup, distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

from moetool.cost.traffic import sent

_OPERATIONS = {
    "_allgather_base_": "gather",
    "all_gather_into_tensor": "gather",
    "_reduce_scatter_base_": "scatter",
    "reduce_scatter_tensor": "scatter",
    "allreduce_": "reduce",
    "all_reduce": "reduce",
    "alltoall_base_": "exchange",
    "all_to_all_single": "exchange",
}

_WAITING = ("wait_tensor", "_wrap_tensor_autograd", "barrier")


class Count(TorchDispatchMode):
    """Counts collectives while it is entered; those of a group of one send nothing.

    Attributes:
        sent: bytes that this process sent, by kind; for tokens by the true split sizes.
        payload: bytes that it handed in, or of the whole tensor, by kind.
        calls: collectives, by kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)
        self.payload: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and name not in _WAITING:
            self._add(namespace, name, args)
        return func(*args, **(kwargs or {}))

    def _add(self, namespace: str, name: str, args: Any) -> None:
        operation = _OPERATIONS[name]  # a collective that is not known must be looked at
        functional = namespace == "_c10d_functional"
        group = _group(args)
        size = group.size()
        if size == 1:
            return
        given = args[0] if functional or operation == "reduce" else args[1]
        payload = sum(tensor.nbytes for tensor in (given if isinstance(given, list) else [given]))
        payload *= size if operation == "gather" else 1
        amount = sent(operation, payload, size)
        if operation == "exchange":
            splits = args[2] if functional else args[4]
            rows = given.shape[0] if splits else size
            own = (splits or [1] * size)[group.rank()]
            amount = payload * (1 - own / rows) if rows else 0
        kind = _kind(operation, functional, given)
        self.sent[kind] += amount
        self.payload[kind] += payload
        self.calls[kind] += 1


def _group(args: Any) -> Any:
    for arg in args:
        if isinstance(arg, str):
            try:
                return distributed_c10d._resolve_process_group(arg)  # type: ignore[attr-defined, arg-type]
            except (RuntimeError, LookupError):  # the name of a reduction
                continue
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return ProcessGroup.unbox(arg)
    raise LookupError(args)


def _kind(operation: str, functional: bool, given: Any) -> str:
    if operation == "exchange":
        if not given.is_floating_point():
            return "split sizes"
        return f"tokens {'backward' if torch._C._current_graph_task_id() != -1 else 'forward'}"
    callers, files = _callers()
    if any(name in ("total", "clip_shards") for name in callers):
        return "metrics"
    if "_fsdp_collectives.py" in files:
        return {"gather": "weights", "scatter": "gradients", "reduce": "replicas"}[operation]
    if functional or "transformers/distributed" in files:
        return "tensor parallel"
    return "gradients"  # by DDP, from C++, or by `mean_gradients`


def _callers() -> tuple[list[str], str]:
    names, files = [], []
    frame = sys._getframe(1)
    while frame:
        names.append(frame.f_code.co_name)
        files.append(frame.f_code.co_filename)
        frame = frame.f_back  # type: ignore[assignment]
    return names, " ".join(files)
