"""How a Mixture of Experts gets more experts, as options of `moetool grow`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from moetool.calibration.options import CalibrationOptions
from moetool.errors import CheckpointError, ConfigError
from moetool.option import flag, option

MOST = 3  # copies of one expert by --utility, so that no expert takes all
RATE = 0.001  # by which `loss-free` moves a selection bias in a step, unless the user says


@dataclass(frozen=True)
class GrowRecipe:
    """How many experts a model gets and how they start; with the source, it determines every byte.

    Attributes:
        top_k: None is the start's own.
        wake_after: None is as few steps as are exact; 0 where experts do not sleep.
    """

    num_experts: int = option("Number of routed experts in the result.", min=2)
    top_k: int | None = option(
        "Experts per token in the result.",
        None,
        min=1,
        shown="the model's; with double-k, multiplied like the experts",
    )
    start: Literal["double-k", "sleeping", "twins"] = option(
        "How copies start: chosen together with their original, with a larger top-k (exact); never chosen until cpt"
        " --balance loss-free wakes them (exact); or competing with their original (not exact).",
        "double-k",
    )
    wake_after: int | None = option(
        "Steps of cpt --balance loss-free=0.001 after which a sleeping copy is as likely as its original.",
        None, min=1, shown="the fewest that keep the start exact", metavar="STEPS",
        needs=("start", "sleeping".__eq__), unread=0,
    )  # fmt: skip
    utility: Literal["none", "frequency", "gate", "gradient"] = option(
        "Which experts of each layer are copied: all in turn (none), or those with the most tokens (frequency), the"
        " largest sum of weights (gate) or the largest gradient of the loss (gradient) on --data.",
        "none",
    )

    def check(self, typed: Collection[str]) -> None:
        """Refuse options that contradict each other.

        Raises:
            ConfigError: names them.
        """
        if self.top_k is not None and self.top_k > self.num_experts:
            raise ConfigError(f"--top-k {self.top_k} is more than --num-experts {self.num_experts}")
        if self.utility != "none" and self.start == "double-k":
            raise ConfigError(
                f"--utility {self.utility}: --start double-k needs as many copies of each expert, because a token goes"
                " to all of them; use --start sleeping or twins"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> GrowRecipe:
        """The inverse of `asdict` of a settled recipe; other keys are ignored.

        Raises:
            CheckpointError: a field is missing or has an invalid value.
        """
        numbers = [values.get(name) for name in ("num_experts", "top_k", "wake_after")]
        sound = all(type(number) is int and 0 <= number < 2**31 for number in numbers)
        words = {name: get_args(get_type_hints(cls)[name]) for name in ("start", "utility")}
        if not sound or any(values.get(name) not in known for name, known in words.items()):
            raise CheckpointError(f"moetool.json: the recipe cannot be read ({str(dict(values))[:100]})")
        return cls(**{name: values[name] for name in asdict(cls(2))})


@dataclass(frozen=True)
class GrowTexts(CalibrationOptions):
    """The texts that a utility is measured on, and those whose loss is compared; there may be none."""

    def check(self, typed: Collection[str]) -> None:
        """Refuse options about texts where there is none.

        Raises:
            ConfigError: names the first.
        """
        own = [field.name for field in fields(self) if field.name in typed]
        if own and not (self.data or self.val):
            raise ConfigError(f"{flag(own[0])} has no effect without a text; give --data (for --utility) or --val")
        self.check_run()
