"""A GPU that is not there: tensors "on" it lie in host memory, but what a real one would refuse or wait for is seen.

Whatever is computed is right, and `device` of a tensor says `cuda:0` where it would. Code that runs here has put every
tensor in its place: an operation on tensors of two places fails as on a real GPU, and so does one that reads a copy
which has not arrived. What makes the processor wait for the device is counted. What is compiled, the kernels
themselves, their memory and speed are not.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import accelerate.utils.imports
import torch
import transformers.utils.import_utils
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NAME, MEMORY = "NVIDIA H100 80GB HBM3", 80 * 10**9
ROOT = Path(__file__).parents[1]
# Their results have a size, or a value, that the host must know.
READ = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.masked_select,
    aten.equal,
    aten.bincount,
}
# A GPU takes a number in host memory (a tensor without dimensions) as an argument, except here.
NO_NUMBERS = {aten.cat, aten.stack, aten.index_add, aten.index_add_, aten.scatter, aten.scatter_, aten.gather}
# These make tensors in C++, where all tensors are in host memory.
INSIDE = ("one_hot", "scaled_dot_product_attention")
COPIES = {aten.copy_, aten._foreach_copy_, aten._to_copy}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class Places:
    """Where storages are: by their address, which stays theirs while a weak reference is held."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}

    def add(self, tensor: Any) -> None:
        storage = tensor if isinstance(tensor, torch.UntypedStorage) else tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        self._known[storage._cdata] = reference

    def holds(self, tensor: Any) -> bool:
        try:
            storage = tensor if isinstance(tensor, torch.UntypedStorage) else tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # it has none
            return False
        found = self._known.get(storage._cdata)
        return found is not None and not found.expired()

    def clear(self) -> None:
        self._known.clear()

    def discard(self, tensor: Tensor) -> None:
        self._known.pop(tensor.untyped_storage()._cdata, None)


class _Calls(threading.local):
    """How many calls a thread is in: those that move a tensor to another place, and those of INSIDE."""

    moves = 0
    inside = 0


class Pretended:
    """The GPU.

    Attributes:
        waits: what the host has waited for, in order: the operation, and the line of moetool that asked for it.
        pageable: likewise copies to the device from memory that is not pinned, which do not return before the device
            is done with most of what it was given.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.pageable: list[tuple[str, int]] = []
        self.on_gpu, self.pinned, self.arriving = Places(), Places(), Places()
        self.generators: set[int] = set()
        self.thread = _Calls()

    def wait(self, why: str) -> None:
        """The host waits until the device is done with everything."""
        self.waits.append(f"{why}: {_line()}")
        self.arriving.clear()

    def counted(self) -> Counter[str]:
        """The waits so far, by what they are."""
        return Counter(self.waits)

    def copied(self, source: Tensor, target: Tensor | None, non_blocking: bool, to_gpu: bool) -> None:
        """A copy between host and device has begun; `target` is known before only where it is filled."""
        if not source.numel():
            return
        if to_gpu:
            if not non_blocking:
                self.wait("a copy to the device")
            elif not self.pinned.holds(source) or not source.is_contiguous():
                self.pageable.append((_line(), source.numel()))
        elif not non_blocking:
            self.wait("a copy to the host")
        elif target is not None:
            self.arriving.add(target)


def _line() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT / "moetool") or (path.parent.name == "benchmarks" and path.is_relative_to(ROOT)):
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.name}"
    return "elsewhere"


class _Seeing(TorchDispatchMode):
    """Sees every operation of a thread."""

    def __init__(self, gpu: Pretended) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs, packet = self.gpu, dict(kwargs or {}), func.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and not leaf.is_meta]
        there = [tensor for tensor in tensors if gpu.on_gpu.holds(tensor)]
        here = [tensor for tensor in tensors if not gpu.on_gpu.holds(tensor)]
        if any(gpu.arriving.holds(tensor) for tensor in here) and packet not in COPIES:
            raise RuntimeError(f"{func} reads host memory into which a copy is still on its way: {_line()}")
        asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if asked and asked.type == "cuda":
            kwargs["device"] = CPU
        on_gpu = asked.type == "cuda" if asked else bool(there)
        # torch itself asks for the place of tensors, which it takes to be here: in a cast, in the backward, in INSIDE.
        inner = torch._C._current_graph_task_id() != -1 or gpu.thread.inside > 0
        if (inner and (there or not here)) or (packet is aten._to_copy and there and not gpu.thread.moves):
            on_gpu = True
        if packet is aten.is_pinned:
            return gpu.pinned.holds(args[0])
        if packet is aten._pin_memory:  # with the strides that it has
            made = torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype).copy_(args[0])
            gpu.pinned.add(made)
            return made
        pinned = kwargs.get("pin_memory")
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        generator = kwargs.get("generator")
        if generator is not None and (generator._cdata in gpu.generators) != on_gpu:
            raise RuntimeError(f"Expected a '{'cuda' if on_gpu else 'cpu'}' device type for generator: {_line()}")
        self._check(func, packet, args, kwargs, there, here)
        if packet is aten.histc and there and not args[0].is_floating_point():  # only a GPU can
            made = func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        else:
            made = func(*args, **kwargs)
        if packet is aten._to_copy and on_gpu != bool(there) and not made.is_meta:
            gpu.copied(args[0], made, bool(kwargs.get("non_blocking")), on_gpu)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                if on_gpu and packet not in COPIES - {aten._to_copy}:
                    gpu.on_gpu.add(tensor)
                if pinned:
                    gpu.pinned.add(tensor)
        return made

    def _check(self, func: Any, packet: Any, args: Any, kwargs: Any, there: list[Tensor], here: list[Tensor]) -> None:
        """Count what the host waits for, and refuse operations on tensors of two places."""
        gpu = self.gpu
        if not there:
            return
        if packet in READ:
            gpu.wait(str(packet))
        if packet is aten.copy_:
            target, source = args[:2]
            to_gpu = gpu.on_gpu.holds(target)
            if to_gpu != gpu.on_gpu.holds(source):
                gpu.copied(source, target, bool(args[2:] and args[2]) or bool(kwargs.get("non_blocking")), to_gpu)
        elif packet is aten._foreach_copy_:
            for target, source in zip(*args[:2], strict=True):
                to_gpu = gpu.on_gpu.holds(target)
                if to_gpu != gpu.on_gpu.holds(source):
                    gpu.copied(source, target, bool(args[2:] and args[2]), to_gpu)
        elif packet in INDEXED:
            target, indices, *values = args
            indices = [index for index in indices if index is not None]
            single = values and isinstance(values[0], Tensor) and values[0].numel() == 1
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not single:
                gpu.wait("the size of a mask")
            if any(not gpu.on_gpu.holds(index) for index in indices):
                gpu.wait("a copy of indices to the device")
            if not gpu.on_gpu.holds(target) or any(not gpu.on_gpu.holds(v) for v in values[:1] if v.ndim):
                self._refuse(func)
        elif here and packet is not aten._to_copy:
            changed = args and any(args[0] is tensor for tensor in here) and func._schema.is_mutable
            if changed or packet in NO_NUMBERS or any(tensor.ndim for tensor in here):
                self._refuse(func)

    def _refuse(self, func: Any) -> None:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! {func},"
            f" {_line()}"
        )


def _forget() -> None:
    """Libraries remember which devices there are."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for module in (accelerate.utils.imports, transformers.utils.import_utils):
        for name, function in vars(module).items():
            if name.startswith("is_") and hasattr(function, "cache_clear"):
                function.cache_clear()


@contextmanager
def pretended_gpu() -> Iterator[Pretended]:
    """A machine with one GPU of 80 GB, like an H100, for this process and threads that it starts."""
    gpu = Pretended()
    _device_constructors()  # remembers which functions they are, so before these are replaced
    original = {name: getattr(torch.Tensor, name) for name in ("device", "is_cuda", "to", "numpy", "tolist")}
    grouped = torch._C._group_tensors_by_device_and_dtype
    clone, run, draws, fresh = torch.UntypedStorage.clone, threading.Thread.run, torch.Generator, torch.tensor

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        other = args[0] if args else kwargs.pop("other", None)
        if isinstance(other, Tensor):
            args = (other.device, other.dtype, *args[1:])
        elif isinstance(other, torch.dtype):
            args = (None, *args)
        given = dict(zip(("device", "dtype", "non_blocking", "copy"), args, strict=False)) | kwargs
        asked, dtype = given.get("device"), given.get("dtype") or self.dtype
        device = None if asked is None else torch.device(asked)
        how = {name: given.get(name, default) for name, default in (("non_blocking", False), ("memory_format", None))}
        if device and "meta" not in (device.type, self.device.type):
            if gpu.on_gpu.holds(self) == (device.type == "cuda"):
                return original["to"](self, dtype=dtype, copy=given.get("copy", False), **how)  # type: ignore[no-any-return]
            gpu.thread.moves += 1  # a tensor of several is moved by moving these
            try:
                return aten._to_copy(self, dtype=dtype, device=device, **how)  # type: ignore[no-any-return]
            finally:
                gpu.thread.moves -= 1
        return original["to"](self, device, dtype, copy=given.get("copy", False), **how)  # type: ignore[no-any-return]

    def numpy(self: Tensor, **how: Any) -> Any:
        if gpu.on_gpu.holds(self):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if gpu.arriving.holds(self):
            raise RuntimeError(f"numpy() of host memory into which a copy is still on its way: {_line()}")
        return original["numpy"](self, **how)

    def tolist(self: Tensor) -> Any:
        if gpu.on_gpu.holds(self):
            gpu.wait("tolist")
        return original["tolist"](self)

    def inside(function: Any) -> Any:
        """A function of torch that makes tensors where it takes its first one to be."""

        def called(first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not gpu.on_gpu.holds(first):
                return function(first, *args, **kwargs)  # type: ignore[no-any-return]
            gpu.thread.inside += 1
            try:
                return function(first, *args, **kwargs)  # type: ignore[no-any-return]
            finally:
                gpu.thread.inside -= 1

        return called

    def group(*args: Any) -> Any:
        return {
            (GPU if gpu.on_gpu.holds(found[0][0][0]) else device, dtype): found
            for (device, dtype), found in grouped(*args).items()
        }

    def cloned(self: Any) -> Any:
        made = clone(self)
        if gpu.on_gpu.holds(self):
            gpu.on_gpu.add(made)
        return made

    def running(self: Any) -> None:
        with _Seeing(gpu):
            run(self)

    class Generator(draws):  # type: ignore[misc, valid-type]  # a class, because it stands in annotations
        def __new__(cls, device: Any = "cpu") -> Any:
            made = draws("cpu")
            if torch.device(device).type == "cuda":
                gpu.generators.add(made._cdata)  # type: ignore[attr-defined]
            return made

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made = fresh(data, *args, **kwargs)
        return made if device is None else made.to(device)

    facts = SimpleNamespace(name=NAME, total_memory=MEMORY, major=9, minor=0, multi_processor_count=132)
    on_card: dict[str, Any] = {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: NAME,
        "get_device_properties": lambda device=None: facts,
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (MEMORY * 9 // 10, MEMORY),
        "max_memory_allocated": lambda device=None: 10**9,
        "max_memory_reserved": lambda device=None: 10**9,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: gpu.wait("synchronize"),
        "manual_seed_all": lambda seed: None,
        "manual_seed": lambda seed: None,
        "is_bf16_supported": lambda *more: True,
    }
    methods: dict[str, Any] = {
        "device": property(lambda self: GPU if gpu.on_gpu.holds(self) else original["device"].__get__(self)),
        "is_cuda": property(lambda self: gpu.on_gpu.holds(self)),
        "to": to,
        "cpu": lambda self, **how: to(self, CPU),
        "cuda": lambda self, device=None, non_blocking=False: to(self, GPU, non_blocking=non_blocking),
        "numpy": numpy,
        "tolist": tolist,
    }
    _forget()
    with (
        ExitStack() as stack,
        patch.multiple(torch.Tensor, **methods),
        patch.multiple(torch.cuda, **on_card),
        patch.multiple(torch, Generator=Generator, tensor=tensor),
        patch.object(torch._C, "_group_tensors_by_device_and_dtype", group),
        patch.multiple(torch.nn.functional, **{name: inside(getattr(torch.nn.functional, name)) for name in INSIDE}),
        patch.object(torch.UntypedStorage, "clone", cloned),
        patch.object(threading.Thread, "run", running),
        _Seeing(gpu),
    ):
        stack.callback(_forget)
        yield gpu
