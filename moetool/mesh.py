"""How processes share one model: the sizes of the mesh, their constraints, and a process's place in it.

The mesh is that of `transformers.distributed`: replicas x fsdp x tp for all weights but the experts, and replicas x
efsdp x ep for these, over the same processes. Processes that differ in `tp` alone see the same text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moetool.errors import ConfigError
from moetool.launch import num_processes
from moetool.option import option

SHARING = "Several processes"


@dataclass(frozen=True)
class Mesh:
    """The sizes of a mesh.

    Attributes:
        fsdp: processes over which weights, gradients and moments are sharded; each reads its own text.
        ep: processes that hold different experts.
        tp: processes that compute each layer together.
        replicas: copies of all that.
    """

    fsdp: int = 1
    ep: int = 1
    tp: int = 1
    replicas: int = 1

    @property
    def whole(self) -> bool:
        """Whether each process holds all weights."""
        return self.fsdp == self.ep == self.tp == 1

    @property
    def sharded(self) -> bool:
        """Whether FSDP holds the weights, and not tensor parallelism alone."""
        return not self.whole and self.data_parallel > 1

    @property
    def processes(self) -> int:
        """All of them."""
        return self.replicas * self.fsdp * self.tp

    @property
    def data_parallel(self) -> int:
        """Processes that read different text."""
        return self.replicas * self.fsdp

    @property
    def efsdp(self) -> int:
        """Processes over which the experts of one of `ep` are sharded."""
        return self.fsdp * self.tp // self.ep

    def rank(self, process: int) -> int:
        """Which of the `data_parallel` shares of the text a process reads."""
        return process // self.tp

    def counts(self, process: int) -> bool:
        """Whether a process counts in sums over the text: one of those that read the same."""
        return process % self.tp == 0

    def __str__(self) -> str:
        sizes = {"replicas": self.replicas, "fsdp": self.fsdp, "tp": self.tp, "ep": self.ep}
        return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)


ONE = Mesh()


def fsdp_option() -> Any:
    """Over how many processes everything is sharded."""
    return option(
        "Number of processes over which weights are sharded; each reads different text.", 1, panel=SHARING, min=1
    )


def ep_option() -> Any:
    """Over how many processes the experts are spread."""
    return option(
        "Number of processes over which the experts are spread; tokens are sent to them.", 1, panel=SHARING, min=1
    )


def tp_option() -> Any:
    """How many processes compute a layer."""
    return option("Number of processes that compute each layer together, on the same text.", 1, panel=SHARING, min=1)


def mesh_of(options: Any) -> Mesh:
    """The mesh of a command's options, over the processes that were launched.

    Args:
        options: has `fsdp`, `ep`, `tp`, and may have `replicas`.
    """
    fsdp, ep, tp = options.fsdp, options.ep, options.tp
    return Mesh(fsdp, ep, tp, getattr(options, "replicas", None) or max(1, num_processes() // (fsdp * tp)))


def check_shared(options: Any) -> None:
    """Refuse a mesh for a model that only runs: all of its processes see the same text.

    Args:
        options: of the command, as in `mesh_of`; also `device` and `device_map`.

    Raises:
        ConfigError: the sizes are not those of the launched processes, or a device is chosen besides.
    """
    mesh = Mesh(options.fsdp, options.ep, options.tp)
    if mesh.whole:
        return
    if options.device_map or options.device != "auto":
        chosen = "--device-map" if options.device_map else "--device"
        raise ConfigError(f"{chosen} and --fsdp, --ep, --tp exclude each other: each process has its own device")
    check_sizes(mesh, num_processes())


def check_sizes(mesh: Mesh, launched: int, replicas_follow: bool = False) -> None:
    """Refuse sizes that are not those of the launched processes, or contradict each other.

    Args:
        mesh: that was asked for.
        launched: processes.
        replicas_follow: whether the number of replicas is what the processes leave, rather than given.

    Raises:
        ConfigError: says which would do.
    """
    if mesh.processes != launched:
        replicas = 1 if replicas_follow else mesh.replicas
        rest = mesh.tp * replicas
        fitting = _sizes(
            lambda fsdp: launched % (fsdp * rest) == 0 if replicas_follow else fsdp * rest == launched, launched
        )
        fits = f"--fsdp may be {fitting}" if fitting else f"--tp x --replicas must divide {launched}"
        given = f" x --replicas {replicas}" if replicas > 1 else ""
        raise ConfigError(
            f"--fsdp {mesh.fsdp} x --tp {mesh.tp}{given} = {mesh.fsdp * rest} processes, but {launched}"
            f" {'was' if launched == 1 else 'were'} launched; {fits}, or launch {mesh.fsdp * rest} (torchrun"
            f" --nproc_per_node {mesh.fsdp * rest})"
        )
    _check_ep(mesh, lambda ep: True, "")


def check_model(mesh: Mesh, model: Any) -> None:
    """Refuse a mesh that does not divide a model, or for which transformers has no plan.

    Args:
        mesh: that is `check_sizes`d.
        model: of transformers; its weights may be on torch's meta device.

    Raises:
        ConfigError: says which sizes would do.
    """
    if mesh.whole:
        return
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    check_division(
        mesh,
        model.config.model_type,
        {int(p.shape[0]) for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3},
        (heads, getattr(config, "num_key_value_heads", None) or heads),
        {"--tp": bool(model.tp_plan), "--ep": bool(model.ep_plan), "--fsdp": bool(model.fsdp_plan)},
    )


def check_division(
    mesh: Mesh, kind: str, experts: Collection[int], heads: tuple[int, int], plans: Mapping[str, bool]
) -> None:
    """The same, of what decides it.

    Args:
        mesh: not of whole weights.
        kind: model_type.
        experts: numbers of experts that layers have.
        heads: of queries, and of keys and values.
        plans: for `--tp`, `--ep` and `--fsdp`, whether transformers has a plan of how to share the family.

    Raises:
        ConfigError: says which sizes would do.
    """
    if mesh.ep > 1 and not experts:
        raise ConfigError(f"--ep {mesh.ep}: '{kind}' is a dense model without experts; use --fsdp alone")
    shown = " and ".join(map(str, sorted(experts)))
    _check_ep(mesh, lambda ep: not any(number % ep for number in experts), f", and divide the model's {shown} experts")
    for number in experts:
        _check_shares(mesh, number)
    if any(number % mesh.tp for number in heads):
        fitting = _sizes(lambda tp: not any(number % tp for number in heads), max(heads))
        raise ConfigError(
            f"--tp {mesh.tp} does not divide the {heads[0]} heads and {heads[1]} key-value heads of the model; it may"
            f" be {fitting}"
        )
    needed = {"--tp": mesh.tp > 1, "--ep": mesh.ep > 1, "--fsdp": mesh.sharded}
    for flag, used in needed.items():
        if used and not plans[flag]:
            raise ConfigError(f"{flag}: transformers cannot share '{kind}' in this way; leave it out")


def _check_shares(mesh: Mesh, num_experts: int) -> None:
    """Refuse a process without experts: FSDP deals out whole ones, and transformers cannot load none."""
    processes, experts = (mesh.fsdp if mesh.ep == 1 else mesh.efsdp), num_experts // mesh.ep

    def right(size: int) -> bool:
        return math.ceil(experts / size) * (size - 1) < experts

    if not right(processes):
        most = max(size for size in range(1, processes) if right(size) and processes % size == 0)
        spread = f" --ep {mesh.ep}" if mesh.ep > 1 else ""
        raise ConfigError(
            f"--fsdp {mesh.fsdp}{spread}: FSDP distributes whole experts, and {processes} processes cannot share"
            f" {experts}; use --fsdp {mesh.fsdp * most // processes} with replicas or fewer processes, or --tp without"
            " --ep, which divides experts"
        )


def _check_ep(mesh: Mesh, fits: Callable[[int], bool], more: str) -> None:
    both = mesh.fsdp * mesh.tp

    def right(ep: int) -> bool:
        return ep == 1 or (ep % mesh.tp == 0 and both % ep == 0 and fits(ep))

    if not right(mesh.ep):
        raise ConfigError(
            f"--ep {mesh.ep} must be a multiple of --tp {mesh.tp} and divide --fsdp x --tp = {both}{more}; it may be"
            f" {_sizes(right, both)}"
        )


def _sizes(fits: Callable[[int], bool], most: int) -> str:
    return _words(n for n in range(1, most + 1) if fits(n))


def _words(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def distributed(mesh: Mesh, apart: Iterable[str] = ()) -> Any:
    """The arguments of `from_pretrained` to load a model into the shards of a mesh; None for whole weights.

    Args:
        mesh: of all processes.
        apart: modules whose weights FSDP gathers by themselves, by name.
    """
    from transformers.distributed import DistributedConfig

    if mesh.whole:
        return None
    return DistributedConfig(
        fsdp_size=mesh.fsdp,
        ep_size=mesh.ep,
        tp_size=mesh.tp,
        dp_replicate_size=mesh.replicas,
        fsdp_plan=dict.fromkeys(apart, "free_full_weight") if mesh.sharded else None,
    )
