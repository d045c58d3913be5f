"""Signs of trouble in a run's rows: a loss or a gradient that jumps, a router that collapses, speed that halves.

Each row is compared with the block of rows before it. The same functions serve the warnings of a run and the marks of
`moetool watch`, which must not wait for torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from moetool.outside import fits
from moetool.routing.levels import level
from moetool.train.advice import advice

BLOCK = 20  # rows
# By how much of the median a value must exceed it, at least, to be a spike.
SPIKE = {"loss": 0.1, "grad_norm": 2.0}
SLOW = 0.5
NOISE = 8  # times the median absolute deviation of the block


def spike_bound(block: Sequence[float], least: float) -> float:
    """The value above which the rows after a block hold a spike.

    Median + max(8 x median absolute deviation, `least` x median): noise of the usual size is none, and
    neither is a small change of a very even curve.
    """
    middle = statistics.median(block)
    return middle + max(NOISE * statistics.median(abs(value - middle) for value in block), least * abs(middle))


def shape(load_E: Sequence[float], mri: float) -> tuple[int, int] | None:
    """Experts and top-k of a layer: its mri is K times the largest load. None where that makes no sense."""
    most = max(load_E)
    top_k = mri / most if most > 0 else 0.0
    return (len(load_E), round(top_k)) if 0.5 < top_k < len(load_E) + 0.5 else None


@dataclass(frozen=True)
class Sign:
    """One sign of trouble.

    Attributes:
        kind: spike, collapse or slow.
        step: where it was seen.
        text: one sentence: what was seen, and which option helps.
        layer: whose router it is.
    """

    kind: str
    step: int
    text: str
    layer: str | None = None


Seen = Callable[[Mapping[str, Any], Sequence[Sign]], None]


def unseen(row: Mapping[str, Any], signs: Sequence[Sign]) -> None:
    """Look at no row."""


class Signs:
    """Reads a run's training rows in order, and says once what it sees until it is over."""

    def __init__(
        self, earlier: Iterable[Mapping[str, Any]] = (), options: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """Begin after rows that are known.

        Args:
            earlier: of a run that goes on: what its routers are like is read from them.
            options: of the run, on which advice depends (see advice.py).
        """
        self._options = options
        self._block: list[Mapping[str, Any]] = []  # that is being filled
        self._before: list[Mapping[str, Any]] = []  # the last full one
        self._bounds: dict[str, float] = {}
        self._speed = 0.0  # of the fastest block
        self._layers: list[str] = []  # that have a router
        self._shape = (1, 1)  # experts, top-k
        self._told: set[tuple[str, str]] = set()
        for row in earlier:
            self._shaped(row)

    def _shaped(self, row: Mapping[str, Any]) -> None:
        if fits(row, {"load": {"*": [float]}, "mri": [float]}) and row["load"]:
            self._layers = list(row["load"])
            self._shape = shape(row["load"][self._layers[0]], row["mri"][0]) or self._shape

    def see(self, row: Mapping[str, Any]) -> list[Sign]:
        """What a training row (see metrics_log.py) adds to the earlier ones."""
        self._shaped(row)
        found = self._spikes(row)
        self._block.append(row)
        if len(self._block) == BLOCK:
            found += [*self._collapsed(row["step"]), *self._slow(row["step"])]
            self._before, self._block = self._block, []
            self._bounds = {
                name: spike_bound([one[name] for one in self._before], least) for name, least in SPIKE.items()
            }
        return found

    def _once(self, kind: str, layer: str, holds: bool) -> bool:
        """Whether something that holds has not been told since it last did not."""
        new = holds and (kind, layer) not in self._told
        (self._told.add if holds else self._told.discard)((kind, layer))
        return new

    def _spikes(self, row: Mapping[str, Any]) -> list[Sign]:
        names = {"loss": "the loss", "grad_norm": "the gradient norm"}
        over = {name: row[name] for name, bound in self._bounds.items() if row[name] > bound}
        # A gradient jumps early in most runs that learn: alone it is a mark on the page, not a warning.
        if not self._once("spike", "", "loss" in over):
            return []
        said = " and ".join(
            f"{names[name]} jumped from {statistics.median(one[name] for one in self._before):.3g} to {value:.3g}"
            for name, value in over.items()
        )
        return [Sign("spike", row["step"], f"{said} at step {row['step']}; {advice('spike', self._options)}")]

    def _collapsed(self, step: int) -> list[Sign]:
        """Of the block's mean: one small batch may look like anything."""
        (experts, top_k), found = self._shape, []
        for i, layer in enumerate(self._layers):
            entropy, mri = (statistics.fmean(row[name][i] for row in self._block) for name in ("entropy", "mri"))
            if self._once("collapse", layer, level(entropy, mri, 0, experts, top_k) == "collapsed"):
                found.append((layer, mri))
        if not found:
            return []
        worst, mri = max(found, key=lambda pair: pair[1])
        one = len(found) == 1
        which = f"the router of layer {worst} has" if one else f"the routers of {len(found)} layers have"
        where = "" if one else f" of layer {worst}"
        text = (
            f"{which} collapsed at step {step}: one expert{where} gets {mri:.0%} of tokens, where balance would give"
            f" {top_k / experts:.0%}; {advice('unbalanced', self._options)}"
        )
        return [Sign("collapse", step, text, worst)]

    def _slow(self, step: int) -> list[Sign]:
        speed = statistics.median(one["tokens_per_second"] for one in self._block)
        before, self._speed = self._speed, max(self._speed, speed)
        if not self._once("slow", "", speed < SLOW * before):
            return []
        text = f"{speed:.0f} tokens/s at step {step}, after {before:.0f} before; {advice('slow', self._options)}"
        return [Sign("slow", step, text)]
