"""The recipe of an upcycling."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import Field, dataclass, fields, replace
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from moetool import registry
from moetool.errors import CheckpointError, ConfigError
from moetool.layers import USUAL, LayerRatios, layer_ratios, recorded_ratios
from moetool.lineage import LINEAGE
from moetool.option import as_read, dtype_option, flag, option
from moetool.outside import fits
from moetool.values import decimal, short_dtype

if TYPE_CHECKING:
    import torch

PROJECTIONS = ("gate", "up", "down")
CALIBRATE = "calibrate"  # the key under which a lineage's recipe has the texts that were read
FITTED = ("balanced", "ridge")  # routers that are fitted on text
RATIOS = "0..1|LAYERS=0..1"
# Fields that a recipe has only where they are used.
LATER = frozenset({"drop_units", "split", "keep_experts_whole", "donor_weights"})


def _read_by(*methods: str) -> tuple[str, Callable[[str], bool]]:
    return "method", methods.__contains__


@dataclass(frozen=True)
class UpcycleRecipe:
    """How a dense model becomes a Mixture of Experts; with the source, it determines every byte.

    Decimals are those that were typed.

    Attributes:
        num_donors: dense models that the experts come from (Branch-Train-MiX).
        donor_weights: of each but the first, its share of the mean that all but the experts is; None where none was
            typed, empty where all have the same.
        shared_experts: None is the family's default.
        dtype: of the written tensors, as safetensors names it; `auto` keeps each tensor's own.
    """

    target: str = option(
        "The MoE family to write.", "auto", names=["auto", *registry.names("target")], what="target", after="donor"
    )
    num_experts: int = option("Number of routed experts.", 8, min=2)
    top_k: int = option("Experts per token.", 2, min=1)
    method: str = option(
        "How experts start: as the dense FFN with some units redrawn, as a plain copy, as a copy with noise, or with"
        " random weights.",
        "drop", kind="method",
    )  # fmt: skip
    drop_ratio: Decimal | LayerRatios = option(
        "Share of the intermediate units redrawn in each expert; LAYERS=RATIO (repeatable) sets it for some layers.",
        USUAL, typed=list[str], parse=recorded_ratios, make=layer_ratios, metavar=RATIOS,
        needs=_read_by("drop"), unread=Decimal(0),
    )  # fmt: skip
    drop_index: Literal["shared", "per-matrix"] = option(
        "One set of redrawn units for gate, up and down (the paper), or one per matrix (the authors' script).",
        "shared", needs=_read_by("drop", "noise"), unread="shared",
    )  # fmt: skip
    keep_experts_whole: int = option(
        "Number of experts per layer that stay plain copies: the first ones from DENSE and from each --donor.",
        0, min=0, metavar="N", needs=_read_by("drop", "noise"), unread=0,
    )  # fmt: skip
    drop_units: Literal["random", "least-used"] = option(
        "Choose redrawn units at random, or (experimental) prefer those that contribute little on --calibrate.",
        "random", needs=_read_by("drop", "noise"), unread="random",
    )  # fmt: skip
    noise_ratio: Decimal | LayerRatios = option(
        "Share of the units that get noise (--method noise); LAYERS=RATIO (repeatable) sets it for some layers.",
        USUAL, typed=list[str], parse=recorded_ratios, make=layer_ratios, metavar=RATIOS,
        needs=_read_by("noise"), unread=Decimal(0),
    )  # fmt: skip
    noise_scale: Decimal = option(
        "Standard deviation of the noise, relative to that of each matrix.",
        Decimal(1), parse=decimal, metavar="SCALE", needs=_read_by("noise"), unread=Decimal(0),
    )  # fmt: skip
    noise_std: Decimal | None = option(
        "Absolute standard deviation of the noise, instead of --noise-scale.",
        None, parse=decimal, metavar="STD", needs=_read_by("noise"), unread=None,
    )  # fmt: skip
    num_donors: int = 1
    donor_weights: tuple[Decimal | None, ...] = ()
    granularity: int = option("Split each dense FFN into G parts; each expert is one part.", 1, min=1, metavar="G")
    shared_experts: int | None = option(
        "Number of shared experts, which every token uses.", None, shown="the family's", min=0, metavar="S"
    )
    split: Literal["contiguous", "random", "activation"] = option(
        "How units are divided into parts: neighbouring units, random units, or so that all parts contribute equally"
        " on --calibrate. With activation, shared experts get the units that contribute most.",
        "contiguous", needs=("granularity", lambda parts: parts > 1), unread="contiguous",
    )  # fmt: skip
    moe_layers: str = option("Layers that get experts. The others stay dense.", "all", metavar="all|4-|0-3,8|every:2")
    router: str = option(
        "Initial router weights: a distribution, or a fit on --calibrate (balanced, ridge).",
        "normal", kind="router", needs=_read_by("drop", "copy", "noise"), unread="normal",
    )  # fmt: skip
    router_std: Decimal = option(
        "Standard deviation of the initial router weights.",
        Decimal("0.02"), parse=decimal, metavar="STD", needs=_read_by("drop", "copy", "noise"), unread=Decimal(0),
    )  # fmt: skip
    seed: int = option("Random seed.", 0, min=0)
    dtype: str = dtype_option("Dtype of the written tensors; auto keeps the source's.", make=short_dtype)

    def check(self, typed: Collection[str]) -> None:
        """Refuse options that contradict each other, whatever the source.

        Args:
            typed: the options that were typed, not read from a file.

        Raises:
            ConfigError: names them.
        """
        if "noise_scale" in typed and self.noise_std is not None:
            raise ConfigError("give --noise-scale or --noise-std, not both")
        if "split" in typed and self.method == "scratch":
            raise ConfigError("--split has no effect with --method scratch")
        if "keep_experts_whole" in typed and self.keep_experts_whole:
            ratio = f"{self.method}_ratio"
            if getattr(self, ratio) == 0:
                raise ConfigError(f"--keep-experts-whole has no effect with {flag(ratio)} 0, which changes no expert")
            if self.keep_experts_whole == self.num_experts:
                raise ConfigError(
                    f"--keep-experts-whole {self.num_experts} leaves none of {self.num_experts} experts to --method"
                    f" {self.method}; give fewer, or --method copy"
                )
        if self.drop_units == "least-used" and getattr(self, f"{self.method}_ratio", None) == 1:
            raise ConfigError(
                f"--drop-units has no effect with {flag(f'{self.method}_ratio')} 1, which changes all units"
            )
        if self.top_k > self.num_experts:
            raise ConfigError(f"--top-k {self.top_k} is more than --num-experts {self.num_experts}")

    def settled(self, num_donors: int, donor_weights: Sequence[Decimal | None] = ()) -> UpcycleRecipe:
        """The recipe that is recorded, without options that its method does not read.

        Args:
            num_donors: dense models, DENSE with them.
            donor_weights: of each but DENSE, None where none was typed.
        """
        read: UpcycleRecipe = replace(as_read(self), num_donors=num_donors, donor_weights=tuple(donor_weights))
        if len(set(read.trunk_shares)) == 1:  # the plain mean, however it was written
            read = replace(read, donor_weights=())
        read = replace(read, split="contiguous") if read.method == "scratch" else read
        return read if read.noise_std is None else replace(read, noise_scale=Decimal(0))

    def to_json(self) -> dict[str, Any]:
        """Plain values; decimals as the text that was typed."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: _plain(v) for name, (v, usual) in values.items() if name not in LATER or v != usual}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> UpcycleRecipe:
        """The inverse of `to_json`; what the lineage records of texts beside the recipe is left out.

        Raises:
            CheckpointError: a field is missing, unknown or mistyped.
        """
        values = {key: value for key, value in values.items() if key != CALIBRATE}
        try:
            known = {field.name for field in fields(cls)}
            if not known - LATER <= set(values) <= known:
                raise TypeError(f"fields {sorted(set(values) ^ known)}")
            there = (field for field in fields(cls) if field.name in values)
            recipe = cls(**{field.name: _read(field, values[field.name]) for field in there})
            if recipe.donor_weights and len(recipe.donor_weights) != recipe.num_donors - 1:
                raise TypeError(f"{len(recipe.donor_weights)} weights of {recipe.num_donors - 1} donors")
            return recipe
        except (TypeError, KeyError, ArithmeticError, ValueError, ConfigError) as error:
            raise CheckpointError(f"{LINEAGE}: the recipe cannot be read ({error})") from None

    def num_redrawn(self, num_units: int, layer: int, expert: int | None = None) -> int:
        """Units changed in an expert: floor(ratio x units), exact in decimals.

        `drop` redraws them, `noise` adds noise to them; every other method changes none.

        Args:
            num_units: of the expert.
            layer: its layer.
            expert: its number; None for one that is not kept whole, if there is one.
        """
        if self.is_whole(self.num_experts - 1 if expert is None else expert):  # the last one is whole if all are
            return 0
        ratio = {"drop": self.drop_ratio, "noise": self.noise_ratio}.get(self.method, Decimal(0))
        return int((ratio.of(layer) if isinstance(ratio, LayerRatios) else ratio) * num_units)

    def is_whole(self, expert: int) -> bool:
        """Whether an expert is kept whole: one of the first that its dense model gives to a layer."""
        if not self.keep_experts_whole:
            return False
        return expert % (self.num_experts // self.num_donors) < self.keep_experts_whole // self.num_donors

    @property
    def trunk_shares(self) -> tuple[Fraction, ...]:
        """Each dense model's share of the mean that all but the experts is; those without a weight share the rest."""
        weights = (None, *(self.donor_weights or (None,) * (self.num_donors - 1)))
        rest = Fraction(1) - sum(Fraction(weight) for weight in weights if weight is not None)
        return tuple(rest / weights.count(None) if weight is None else Fraction(weight) for weight in weights)

    @property
    def shared_parts(self) -> int:
        """Parts of the dense FFN that only the shared expert has; 0 if it holds whole FFNs, beside all parts."""
        shared = self.shared_experts or 0
        return shared if shared < self.granularity else 0

    @property
    def group_size(self) -> int:
        """Routed experts that together are one dense FFN: its parts that are not shared."""
        return self.granularity - self.shared_parts

    def donor(self, expert: int) -> int:
        """The dense model that a routed expert comes from."""
        return expert // (self.num_experts // self.num_donors)

    def first_unit(self, expert: int, num_units: int) -> int:
        """The unit of the dense FFN that is a routed expert's first; the shared expert's is 0.

        Args:
            expert: its number.
            num_units: of one expert.
        """
        return (self.shared_parts + expert % self.group_size) * num_units


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value.texts if isinstance(value, LayerRatios) else str(value) if isinstance(value, Decimal) else value


def _read(field: Field[Any], value: Any) -> Any:
    """A field from its JSON."""
    kind = str(field.type)
    if kind.startswith("tuple"):
        if not isinstance(value, list):
            raise TypeError(f"{field.name} is {value!r}")
        return tuple(None if one is None else _finite(field, one) for one in value)
    if kind.endswith("LayerRatios") and fits(value, [str]):
        return layer_ratios(value)
    if value is None and kind.endswith("None"):
        return None
    if kind.startswith("Decimal"):
        return _finite(field, value)
    if type(value) is not (int if kind.startswith("int") else str):
        raise TypeError(f"{field.name} is {value!r}")
    return value


def _finite(field: Field[Any], text: Any) -> Decimal:
    number = Decimal(text) if isinstance(text, str) else Decimal("nan")
    if not number.is_finite():
        raise TypeError(f"{field.name} is {text!r}")
    return number


def generator(seed: int, stream: str, index: int = 0) -> torch.Generator:
    """A CPU generator for one draw; no two indices of a stream share one.

    torch's CPU generator has 2^32 starting points (it reads the low 32 bits of its seed), few enough
    for hashes of as many keys as a large model has to meet. Counting through them, scattered by an odd
    factor, cannot repeat one below 2^32 draws.
    """
    import torch

    start = int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:4], "little")
    return torch.Generator().manual_seed((start + index * 0x9E3779B1) % 2**32)


def matrix_index(recipe: UpcycleRecipe, layer: int, expert: int, projection: str) -> int:
    """A different number for each matrix of each expert."""
    return (layer * recipe.num_experts + expert) * len(PROJECTIONS) + PROJECTIONS.index(projection)
