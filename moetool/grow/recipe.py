"""How a Mixture of Experts gets more experts, as options of `moetool grow`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moetool.errors import CheckpointError, ConfigError
from moetool.option import option

RATE = 0.001  # by which `loss-free` moves a selection bias in a step, unless the user says


@dataclass(frozen=True)
class GrowRecipe:
    """How many experts a model gets and how they start; with the source, it determines every byte.

    Attributes:
        top_k: None is the start's own.
        wake_after: None is as few steps as are exact; 0 where experts do not sleep.
    """

    num_experts: int = option("Routed experts of the result.", min=2)
    top_k: int | None = option(
        "Experts per token of the result.", None, min=1, shown="the model's; with double-k, as many times more"
    )
    start: Literal["double-k", "sleeping", "twins"] = option(
        "How copies start: chosen together with their original, more experts per token (exact); not chosen until"
        " cpt --balance loss-free wakes them (exact); or chosen instead of others (not exact).",
        "double-k",
    )
    wake_after: int | None = option(
        "Steps of cpt --balance loss-free=0.001 after which a sleeping copy is as likely as its original.",
        None, min=1, shown="as few as are exact", metavar="STEPS", needs=("start", "sleeping".__eq__), unread=0,
    )  # fmt: skip

    def check(self, typed: Collection[str]) -> None:
        """Refuse numbers that contradict each other.

        Raises:
            ConfigError: names them.
        """
        if self.top_k is not None and self.top_k > self.num_experts:
            raise ConfigError(f"--top-k {self.top_k} is more than --num-experts {self.num_experts}")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> GrowRecipe:
        """The inverse of `asdict` of a settled recipe; other keys are ignored.

        Raises:
            CheckpointError: a field is missing or has an invalid value.
        """
        numbers = [values.get(name) for name in ("num_experts", "top_k", "wake_after")]
        sound = all(type(number) is int and 0 <= number < 2**31 for number in numbers)
        if not sound or values.get("start") not in ("double-k", "sleeping", "twins"):
            raise CheckpointError(f"moetool.json: the recipe cannot be read ({str(dict(values))[:100]})")
        return cls(**{name: values[name] for name in asdict(cls(2))})
