"""The rows of a run's metrics.jsonl as columns, which grow while it trains.

Shapes: N training rows, L layers with a router, E experts.
"""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from typing import Any

from moetool.train.signs import BLOCK

SCALARS = ("loss", "lr", "grad_norm", "teacher", "tokens_per_second", "mfu", "memory", "num_tokens")
MEASURES = ("mri", "entropy", "dead_experts")  # of each layer; of the last, how many
MAX_LAYERS = 10_000  # in a row; more is no run


class Rows:
    """Columns of training rows, and what else the rows hold. A row that is none is left out.

    Attributes:
        steps: (N,), ascending.
        columns: name -> (N,), NaN where a row has no such value.
        balance: strategy -> (N,), NaN likewise.
        measures: name -> (N x L,), NaN where a row has none.
        num_layers: L; 0 until a row has routers.
        dead: (step, dead experts of each layer) of the last BLOCK training rows that have them.
        loads: (step, layer -> share of each expert) of the rows that have it.
        sources: of the last training row, the tokens that each source has given.
        val: domain -> (steps, losses).
        val_mri: domain -> (steps, mri of each layer).
        skipped: lines that were no rows.
    """

    def __init__(self) -> None:
        self.steps = array("q")
        self.columns: dict[str, array[float]] = {}
        self.balance: dict[str, array[float]] = {}
        self.measures: dict[str, array[float]] = {name: array("d") for name in MEASURES}
        self.num_layers = 0
        self.dead: deque[tuple[int, list[list[int]]]] = deque(maxlen=BLOCK)
        self.loads: list[tuple[int, dict[str, list[float]]]] = []
        self.sources: dict[str, float] = {}
        self.val: dict[str, tuple[list[int], list[float]]] = {}
        self.val_mri: dict[str, tuple[list[int], list[list[float]]]] = {}
        self.skipped = 0

    def add(self, line: bytes) -> None:
        """Add a line; if it is of an earlier step than the last, the run went back there."""
        if not line.strip():
            return
        try:
            row = json.loads(line)
            step = row["step"]
            if type(step) is not int or not 0 <= step < 2**53:
                raise ValueError("no step")
            if "loss" in row:
                self._train(step, row)
            elif "val" in row:
                self._val(step, row)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            self.skipped += 1

    def _train(self, step: int, row: Mapping[str, Any]) -> None:
        values = {name: _number(row[name]) for name in SCALARS if name in row}
        terms = {str(name): _number(value) for name, value in row.get("balance", {}).items()}
        sources = {str(name): _number(tokens) for name, tokens in row.get("sources", {}).items()}
        measured = self._measured(row)
        # All is checked before anything is added, so that columns stay of one length.
        load = _load(row.get("load"), len(measured["mri"])) if measured else {}
        dead = [[int(e) for e in layer] for layer in row["dead_experts"]] if measured else []
        if self.steps and step <= self.steps[-1]:
            self._back_to(step)
        N = len(self.steps)
        for columns, found in ((self.columns, values), (self.balance, terms)):
            for name in found:
                if name not in columns:
                    columns[name] = array("d", [math.nan]) * N
            for name, column in columns.items():
                column.append(found.get(name, math.nan))
        if measured and not self.num_layers:
            self.num_layers = len(measured["mri"])
            for name in MEASURES:
                self.measures[name] = array("d", [math.nan]) * (N * self.num_layers)
        for name in MEASURES if self.num_layers else ():
            self.measures[name].extend(measured[name] if measured else [math.nan] * self.num_layers)
        if measured:
            self.dead.append((step, dead))
            if load:
                self.loads.append((step, load))
        self.sources = sources
        self.steps.append(step)

    def _measured(self, row: Mapping[str, Any]) -> dict[str, list[float]]:
        if "mri" not in row:
            return {}
        found = {name: [_number(value) for value in row[name]] for name in ("mri", "entropy")}
        found["dead_experts"] = [float(len(layer)) for layer in row["dead_experts"]]
        if {len(values) for values in found.values()} != {self.num_layers or len(found["mri"])}:
            raise ValueError("layers")
        if not 0 < len(found["mri"]) <= MAX_LAYERS:
            raise ValueError("layers")
        return found

    def _val(self, step: int, row: Mapping[str, Any]) -> None:
        losses = {str(name): _number(value) for name, value in row["val"].items()}
        routed = {str(k): [_number(v) for v in routing["mri"]] for k, routing in row.get("routing", {}).items()}
        for name, loss in losses.items():
            _put(*self.val.setdefault(name, ([], [])), step, loss)
        for name, mri_L in routed.items():
            _put(*self.val_mri.setdefault(name, ([], [])), step, mri_L)

    def _back_to(self, step: int) -> None:
        """Forget the training rows from `step` on."""
        at = bisect_left(self.steps, step)
        del self.steps[at:]
        for column in (*self.columns.values(), *self.balance.values()):
            del column[at:]
        for column in self.measures.values():
            del column[at * self.num_layers :]
        self.loads = [one for one in self.loads if one[0] < step]
        self.dead = deque((one for one in self.dead if one[0] < step), BLOCK)


def _put(steps: list[int], values: list[Any], step: int, value: Any) -> None:
    """Add a validation's value; those from its step on are of a run that went back."""
    at = bisect_left(steps, step)
    del steps[at:], values[at:]
    steps.append(step)
    values.append(value)


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError("not a number")
    if not math.isfinite(number := float(value)):
        raise ValueError("not finite")
    return number


def _load(value: Any, num_layers: int) -> dict[str, list[float]]:
    """The load of each layer's experts; empty where there is none, or it is not one."""
    if not isinstance(value, dict) or len(value) != num_layers:
        return {}
    load = {str(layer): [_number(share) for share in shares] for layer, shares in value.items()}
    return load if len({len(shares) for shares in load.values()}) == 1 and all(load.values()) else {}
