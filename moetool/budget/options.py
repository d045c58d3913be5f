"""The options of `moetool plan`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import prod
from pathlib import Path
from typing import Any, get_args, get_type_hints

from moetool.arch.clients import CLIENTS
from moetool.budget.meshes import Cluster
from moetool.cost.devices import GPUS, PCIE_5, Gpu
from moetool.errors import ConfigError
from moetool.option import flag, option, options, same
from moetool.recipe import UpcycleRecipe
from moetool.registry import suggest
from moetool.values import decimal, parse_count, parse_size, ratio

MOE, MACHINE, TRAINING = "Mixture of Experts", "Machine", "Training"
MFU = Decimal("0.3")
NOT_SWEPT = ("dense", "sweep", "html", "for_", "probe")
MOST = 200  # plans
# Beyond these a figure means nothing, and may be too large for a float.
BOUNDS: dict[str, tuple[Decimal | int, int]] = {
    "dense_tokens": (1, 10**18),
    "train_tokens": (1, 10**18),
    "num_experts": (2, 10**6),
    "top_k": (1, 10**6),
    "granularity": (1, 10**6),
    "num_gpus": (1, 10**5),
    "gpus_per_node": (1, 10**5),
    "gpu_memory": (1, 10**18),
    "gpu_tflops": (Decimal("0.001"), 10**6),
    "mfu": (Decimal("0.001"), 1),
    "tokens_per_second": (1, 10**15),
    "price_per_gpu_hour": (0, 10**9),
    "disk_speed": (1, 10**18),
    "seq_len": (1, 10**9),
    "global_batch_size": (1, 10**9),
}


@dataclass(frozen=True)
class PlanOptions:
    """What to plan; unset options follow from DENSE."""

    dense: str = option("The dense model: a folder, or owner/name\\[@revision].", positional=True, metavar="DENSE")
    dense_tokens: int | None = option(
        "Number of tokens that DENSE was trained on, such as 2T.",
        None, shown="from the model card of known models", metavar="COUNT", parse=parse_count,
    )  # fmt: skip
    train_tokens: int = option(
        "Number of tokens to train on after upcycling.", 20 * 10**9, shown="20B", metavar="COUNT", parse=parse_count
    )
    num_experts: int | None = same(
        UpcycleRecipe, "num_experts", None, panel=MOE, shown="8 for each part of --granularity"
    )
    top_k: int | None = same(UpcycleRecipe, "top_k", None, panel=MOE, shown="2 for each part of --granularity")
    granularity: int = same(UpcycleRecipe, "granularity", panel=MOE)
    shared_experts: int | None = same(UpcycleRecipe, "shared_experts", panel=MOE)
    moe_layers: str = same(UpcycleRecipe, "moe_layers", panel=MOE)
    target: str = same(UpcycleRecipe, "target", panel=MOE, after="")
    for_: Sequence[str] = option(
        "Program that must run the result correctly (repeatable).",
        (), flag="--for", names=CLIENTS, what="client", panel=MOE,
    )  # fmt: skip
    dtype: str = same(UpcycleRecipe, "dtype", panel=MOE)
    gpu: str | None = option(
        f"GPU type: {', '.join(GPUS)}, or any other name with --gpu-memory and --gpu-tflops.",
        None, shown="h100", panel=MACHINE, metavar="NAME", completed=tuple(GPUS),
    )  # fmt: skip
    num_gpus: int = option("Total number of GPUs.", 8, min=1, panel=MACHINE)
    gpus_per_node: int = option("GPUs per machine.", 8, min=1, panel=MACHINE)
    gpu_memory: int | None = option(
        "Memory of a GPU that --gpu does not know, such as 96GB.", None, panel=MACHINE, metavar="SIZE", parse=parse_size
    )
    gpu_tflops: Decimal | None = option(
        "Dense bf16 TFLOP/s of a GPU that --gpu does not know.", None, panel=MACHINE, metavar="N", parse=decimal
    )
    mfu: Decimal | None = option(
        "Share of the GPUs' peak speed that training reaches.",
        None,
        shown="0.3, or less if communication limits it",
        panel=MACHINE,
        metavar="0..1",
        parse=ratio,
    )
    tokens_per_second: int | None = option(
        "Training speed of the Mixture of Experts on all GPUs together, as printed by cpt; replaces --mfu.",
        None, panel=MACHINE, metavar="COUNT", parse=parse_count,
    )  # fmt: skip
    price_per_gpu_hour: Decimal | None = option(
        "Price of one GPU-hour, in any currency.", None, panel=MACHINE, metavar="PRICE", parse=decimal
    )
    disk_speed: int = option(
        "Write speed of the disk in bytes per second, over all machines.",
        10**9, shown="1GB", panel=MACHINE, metavar="SIZE", parse=parse_size,
    )  # fmt: skip
    seq_len: int | None = option(
        "Sequence length in tokens.",
        None, shown="4096, or the model's maximum if that is less", min=1, panel=TRAINING,
    )  # fmt: skip
    global_batch_size: int | None = option(
        "Sequences per step.",
        None, shown="1024, or less if the run would have fewer than 500 steps", min=1, panel=TRAINING,
    )  # fmt: skip
    sweep: Sequence[str] = option(
        "Compare several values of an option, such as num-experts=4,8,16 (repeatable: all combinations).",
        (), metavar="OPTION=A,B", panel="Output",
    )  # fmt: skip
    probe: bool = option(
        "Predict the time from a measurement: upcycle DENSE into a temporary folder and train it for 20 steps of the"
        " plan on this machine.",
        False, flag="--probe", panel=MACHINE, after="tokens_per_second",
    )  # fmt: skip
    html: Path | None = option("Also write the plan as a web page that opens offline.", None, panel="Output")

    def check(self, typed: Collection[str]) -> None:
        """Refuse options that contradict each other.

        Args:
            typed: the options that were typed.

        Raises:
            ConfigError: names them.
        """
        if self.mfu is not None and self.tokens_per_second is not None:
            raise ConfigError("give --mfu or --tokens-per-second, not both")
        if self.probe and (self.mfu is not None or self.tokens_per_second is not None):
            other = "--mfu" if self.mfu is not None else "--tokens-per-second"
            raise ConfigError(f"give --probe or {other}, not both")
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"{flag(name)} must be between {least:,} and {most:,}")
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise ConfigError(
                f"--num-gpus {self.num_gpus} is not a multiple of --gpus-per-node {self.gpus_per_node}; give whole"
                " machines"
            )
        if self.html and self.html.is_dir():
            raise ConfigError(f"--html {self.html} is a folder; give a file, such as {self.html / 'plan.html'}")
        self.cluster()
        values_of(self.sweep)

    def recipe(self) -> UpcycleRecipe:
        """The upcycling that is planned."""
        return UpcycleRecipe(
            target=self.target,
            num_experts=8 * self.granularity if self.num_experts is None else self.num_experts,
            top_k=2 * self.granularity if self.top_k is None else self.top_k,
            granularity=self.granularity,
            shared_experts=self.shared_experts,
            moe_layers=self.moe_layers,
            dtype=self.dtype,
        )

    def cluster(self) -> Cluster:
        """The GPUs.

        Raises:
            ConfigError: the kind of GPU is not known, and its memory or speed is not given.
        """
        name = (self.gpu or ("h100" if self.gpu_memory is None and self.gpu_tflops is None else "this GPU")).lower()
        if name in GPUS:
            for flag, value in (("--gpu-memory", self.gpu_memory), ("--gpu-tflops", self.gpu_tflops)):
                if value is not None:
                    raise ConfigError(f"{flag} has no effect with --gpu {name}, whose data sheet is known")
            gpu = GPUS[name]
        elif self.gpu_memory is None or self.gpu_tflops is None:
            near = suggest(name, GPUS) if self.gpu else ""
            unknown = f"--gpu {name} is not known{near}" if self.gpu else "a GPU without a name needs both figures"
            raise ConfigError(
                f"{unknown}; give --gpu-memory and --gpu-tflops, such as --gpu-memory 96GB --gpu-tflops 500, or"
                f" choose from {', '.join(GPUS)}"
            )
        else:
            gpu = Gpu(self.gpu or name, self.gpu_memory, float(self.gpu_tflops) * 1e12, PCIE_5)
        return Cluster(gpu, self.num_gpus, self.gpus_per_node)


def values_of(sweep: Sequence[str]) -> dict[str, list[Any]]:
    """Field -> its values, of repeated OPTION=A,B.

    Raises:
        ConfigError: an unknown option, one that is given twice, or a value that it does not take.
    """
    declared = {name: one for name, one in options(PlanOptions).items() if name not in NOT_SWEPT}
    hints = get_type_hints(PlanOptions)
    found: dict[str, list[Any]] = {}
    for text in sweep:
        name, equals, typed = text.partition("=")
        field = name.removeprefix("--").replace("-", "_")
        if not (equals and typed) or field not in declared:
            known = [flag(one)[2:] for one in declared]
            near = "" if field in declared else suggest(name, known)
            raise ConfigError(
                f"--sweep '{text}': expected OPTION=A,B, such as num-experts=4,8,16{near}; options are"
                f" {', '.join(known)}"
            )
        if field in found:
            raise ConfigError(f"--sweep {name} is given twice")
        found[field] = [_read(field, one, declared[field], hints[field]) for one in typed.split(",")]
        for number, one in enumerate(typed.split(",")):
            if found[field][number] in found[field][:number]:
                raise ConfigError(f"--sweep {name}: {one} is given twice")
    if (many := prod(map(len, found.values()))) > MOST:
        raise ConfigError(f"--sweep: {many} combinations; give at most {MOST}")
    return found


def _read(field: str, text: str, declared: Any, hint: Any) -> Any:
    if declared.parse:
        try:
            value = declared.parse(text)
            return declared.make(value, flag(field)) if declared.make else value
        except ConfigError as error:
            raise ConfigError(f"--sweep {flag(field)[2:]}={text}: {error}") from None
    if int in (hint, *get_args(hint)):
        if not text.isascii() or not text.isdigit() or int(text) < (declared.min or 0):
            raise ConfigError(f"--sweep {flag(field)[2:]}={text}: a whole number of at least {declared.min or 0}")
        return int(text)
    if declared.names and text not in declared.names:
        raise ConfigError(f"--sweep {flag(field)[2:]}={text}: choose from {', '.join(declared.names)}")
    return text
