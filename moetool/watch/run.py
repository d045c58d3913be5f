"""One run's folder: what is read of it, and the JSON document that is made from it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetool.checkpoint.step_folder import METRICS
from moetool.layers import evenly
from moetool.outside import finite
from moetool.train.signs import BLOCK, SPIKE, shape
from moetool.watch import verdict
from moetool.watch.course import phases_of, sources_of, total_steps
from moetool.watch.facts import read_facts
from moetool.watch.problem import in_words
from moetool.watch.rows import MEASURES, SCALARS, Rows
from moetool.watch.scan import scanned
from moetool.watch.tail import Tail
from moetool.watch.thin import Array, heat, thinned

SAMPLED = 20_000_000  # bytes of metrics.jsonl above which a first look takes a sample
SAMPLE = 3000  # rows of it
SCANNED = 600_000_000  # bytes up to which its losses are read, too
QUIET = 120.0  # seconds without a row, at least, after which a run is not said to be running
# A page holds at most so many numbers of all its runs: points of a curve, cells of a heatmap, loads of experts.
POINTS, CELLS, LOADS = 8000, 40_000, 400_000
RETRY = 15.0  # seconds after which a run that could not be read is read anew
# What is said of a folder that says nothing, see `read_facts`.
NOTHING: dict[str, Any] = {
    "state": "unknown", "options": {}, "train": [], "shape": None, "sources": {}, "sources_step": None, "command": "",
    "lineage": [],
}  # fmt: skip


class WatchedRun:
    """A run's folder, read again and again.

    Attributes:
        path: the folder.
        name: how it is called beside the others.
        rows: of its metrics.jsonl.
        sampled: whether they are only a sample so far.
        problem: why they could not be read, in words; they are then those of before, and read anew a while later.
        ended: whether its process, which is this one, is about to end.
    """

    def __init__(self, path: Path, name: str, ended: bool = False) -> None:
        self.path, self.name, self.ended = path, name, ended
        self.rows, self.sampled = Rows(), False
        self.problem = ""
        self._again = 0.0  # not to be read before
        self._scanned: dict[str, tuple[Array, Array]] = {}  # of all rows, while `rows` are a sample
        self._tail = Tail(path / METRICS)

    def sample(self) -> None:
        """Take a first look at a large file: every loss and gradient norm, and the rest of evenly spread rows."""
        try:
            size = os.stat(self.path / METRICS).st_size
            if size <= SAMPLED:
                return
            self.sampled = True
            for line in self._tail.sample(SAMPLE):
                self.rows.add(line)
            if size <= SCANNED:
                self._scanned = scanned(self.path / METRICS)
        except FileNotFoundError:
            return
        except Exception as error:
            self._failed(error)

    def refresh(self) -> bool:
        """Read what is new; whether there was anything. Never fails, so that other runs and a training go on."""
        if time.monotonic() < self._again:
            return False
        try:
            found = self._tail.look()
            rows = Rows() if found.anew else self.rows
            new = found.anew or bool(self.problem)
            for line in found.lines:
                rows.add(line)
                new = True
        except Exception as error:
            self._failed(error)
            return True
        self.rows, self.sampled, self._scanned, self.problem = rows, False, {}, ""
        return new

    def _failed(self, error: Exception) -> None:
        changed = self._tail.changed
        self.problem, self._tail, self._again = in_words(error), Tail(self.path / METRICS), time.monotonic() + RETRY
        self._tail.changed = changed

    def document(self, share: int = 1) -> dict[str, Any]:
        """Everything that is shown of it (described in docs/watch.md).

        What raises an error that nobody foresaw is left out, first what the folder says and then the rows too, and
        `problem` says so: it must stop neither the page of other runs nor a training.

        Args:
            share: how many runs are shown: each gets its part of the page's size.
        """
        problem = self.problem
        for read, rows in ((self._facts, self.rows), (dict, self.rows), (dict, Rows())):
            try:
                with np.errstate(all="ignore"):
                    return self._document(NOTHING | read(), rows, share) | {"problem": problem}
            except Exception as error:
                problem = problem or in_words(error)
        raise AssertionError(problem)

    def _facts(self) -> dict[str, Any]:
        return finite(read_facts(self.path))  # type: ignore[no-any-return]

    def _document(self, facts: dict[str, Any], rows: Rows, share: int) -> dict[str, Any]:
        options, steps = facts["options"], array_of(rows.steps)
        step = int(steps[-1]) if len(steps) else 0
        tokens = rows.columns["num_tokens"][-1] if step and "num_tokens" in rows.columns else 0.0
        tokens = tokens if np.isfinite(tokens) else 0.0
        step_tokens = tokens / step if step else 0.0
        total = total_steps(options, step_tokens)
        speed = array_of(rows.columns.get("tokens_per_second", ()))
        state = facts["state"] if self._tail.changed or facts["state"] == "gone" else "starting"
        age = max(0.0, time.time() - self._tail.changed) if self._tail.changed else None
        if state == "running" and age is not None and age > max(QUIET, 30 * _step_seconds(step_tokens, speed)):
            state = "quiet"
        if self.ended and state in ("running", "quiet"):
            state = "stopped"
        left = finite(verdict.seconds_left(step, total, step_tokens, speed))
        took = finite(float(np.sum(step_tokens / speed[speed > 0]))) or 0.0
        points = max(200, min(2000, POINTS // share))
        shaped = _shape(rows) or _fitting(facts["shape"], rows)
        dead = _dead(rows)
        layers = list(rows.loads[-1][1]) if rows.loads else [str(i) for i in range(rows.num_layers)]
        whole = {name: (steps, column) for name, column in rows.columns.items()} | self._scanned
        trained = [name for name in facts["train"] if name in rows.val] or facts["train"]
        return {
            "name": self.name,
            "path": str(self.path),
            "status": {
                "state": state,
                "step": step,
                "steps": total,
                "tokens": int(tokens),
                "seconds_left": left if state in ("running", "quiet", "stopped") else None,
                "seconds": took,
                "seconds_since_row": age,
                "rows": len(steps),
                "skipped_lines": rows.skipped,
                "sampled": self.sampled,
            },
            "verdict": [
                answer._asdict()
                for answer in (
                    verdict.learning(rows.val, trained, rows.columns.get("loss", ()), options),
                    verdict.forgetting(rows.val, trained, options),
                    _balanced(rows, layers, dead, shaped, options),
                    verdict.slower(speed),
                    verdict.how_long(state, step, total, left, took),
                )
            ]
            if rows.steps or rows.val
            else [],
            "series": {name: thinned(whole[name][0], whole[name][1], points) for name in SCALARS if name in whole},
            "marks": {name: verdict.marks(whole[name][0], whole[name][1], name) for name in SPIKE if name in whole},
            "balance": {name: thinned(steps, values, points) for name, values in rows.balance.items()},
            "val": {
                name: {"kind": "adaptation" if name in trained else "forgetting"} | thinned(x, y, points)
                for name, (x, y) in rows.val.items()
            },
            "val_mri": {
                name: thinned(x, [max(layers, default=np.nan) for layers in y], points)
                for name, (x, y) in rows.val_mri.items()
            },
            "dead_experts": thinned(steps, _measure(rows, "dead_experts").sum(axis=1), points),
            "dead_now": {layer: experts for layer, experts in zip(layers, dead, strict=False) if experts},
            "phases": phases_of(options, total),
            "routers": _routers(rows, layers, shaped, share),
            "load": _loads(rows, share),
            "sources": sources_of(facts, rows.sources, step, total),
            "options": {name: value for name, value in options.items() if value not in (None, {}, [], "")},
            "command": facts["command"],
            "lineage": facts["lineage"],
        }


def array_of(values: Any) -> Array:
    """A copy of a column, which may then grow."""
    return np.array(values, dtype=np.float64 if getattr(values, "typecode", "d") == "d" else np.int64)


def _step_seconds(step_tokens: float, speed: Array) -> float:
    return step_tokens / float(np.median(speed[-BLOCK:])) if len(speed) and speed[-1] > 0 else 0.0


def _measure(rows: Rows, name: str) -> Array:
    return array_of(rows.measures[name]).reshape(len(rows.steps), max(1, rows.num_layers) if rows.num_layers else 0)


def _shape(rows: Rows) -> tuple[int, int] | None:
    """Experts of a layer and top-k, from the last row that has loads; None where none has."""
    if not rows.loads:
        return None
    step, load = rows.loads[-1]
    first = next(iter(load.values()))
    at = np.flatnonzero(array_of(rows.steps) == step)
    return shape(first, rows.measures["mri"][int(at[0]) * rows.num_layers]) if len(at) else None


def _fitting(shape: tuple[int, int] | None, rows: Rows) -> tuple[int, int] | None:
    """The shape that a checkpoint of the run says, for rows of an earlier version of moetool, which have no loads.

    Not where rows contradict it: they are then of another model. No layer can have an mri below top-k / experts.
    """
    if shape is None or not rows.dead:
        return None
    experts, top_k = shape
    numbers = [expert for _, layers in rows.dead for dead in layers for expert in dead]
    possible = np.nanmin(rows.measures["mri"]) >= 0.999 * top_k / experts and max(numbers, default=0) < experts
    return shape if possible else None


def _dead(rows: Rows) -> list[list[int]]:
    """The experts of each layer that are dead in each of the last rows: one small batch may leave any of them out."""
    return [sorted(set.intersection(*map(set, layer))) for layer in zip(*(dead for _, dead in rows.dead), strict=True)]


def _balanced(
    rows: Rows, layers: Sequence[str], dead: Sequence[Sequence[int]], shape: tuple[int, int] | None,
    options: Mapping[str, Any],
) -> verdict.Answer:  # fmt: skip
    lately = {}
    for name in MEASURES if rows.num_layers else ():
        last = array_of(rows.measures[name][-BLOCK * rows.num_layers :]).reshape(-1, rows.num_layers)
        lately[name] = last[np.isfinite(last).all(axis=1)].mean(axis=0).tolist() if np.isfinite(last).any() else []
    dead_L = [len(experts) for experts in dead]
    entropy_L, mri_L = (lately.get(name, []) for name in ("entropy", "mri"))
    return verdict.balanced(entropy_L, mri_L, dead_L, layers, shape, len(rows.dead), options)


def _routers(rows: Rows, layers: list[str], shape: tuple[int, int] | None, share: int) -> dict[str, Any]:
    """Heatmaps of layer x step."""
    if not rows.num_layers:
        return {}
    most = max(40, min(240, CELLS // share // rows.num_layers))
    worst = {"mri": np.maximum, "entropy": np.minimum, "dead_experts": np.maximum}
    tables = {name: heat(array_of(rows.steps), _measure(rows, name), most, worst[name]) for name in MEASURES}
    return {
        "layers": layers,
        "num_experts": shape[0] if shape else None,
        "top_k": shape[1] if shape else None,
        "x": tables["mri"]["x"],
        **{name: table["rows"] for name, table in tables.items()},
    }


def _loads(rows: Rows, share: int) -> dict[str, Any]:
    """The load of every expert at some steps: `x`, and layer -> a list for each step."""
    if not rows.loads:
        return {}
    size = sum(len(shares) for shares in rows.loads[-1][1].values())
    same = [one for one in rows.loads if one[1].keys() == rows.loads[-1][1].keys()]
    kept = evenly(same, max(2, min(100, LOADS // share // size)))
    return {
        "x": [step for step, _ in kept],
        "layers": {layer: [load[layer] for _, load in kept] for layer in rows.loads[-1][1]},
    }
