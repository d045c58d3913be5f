"""The page's colours, and that it is whole: one file of bounded size."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from moetool.watch import page
from moetool.watch.page import collect, render
from moetool.watch.run import WatchedRun
from tests.colour_vision import BLINDNESS, rgb, seen_as

TEMPLATES = Path(page.__file__).parent / "templates"


def palettes() -> list[list[tuple[int, ...]]]:
    found = re.findall(r"--s\d: #(\w{6})", (TEMPLATES / "style.css").read_text())
    colors = [rgb(text) for text in found]
    return [colors[:8], colors[8:]]


@pytest.mark.parametrize("kind", BLINDNESS)
def test_lines_differ_for_colour_blind_people(kind: str) -> None:
    matrix = BLINDNESS[kind]
    for colors in palettes():
        assert len(colors) == 8
        seen = [seen_as(color, matrix) for color in colors]
        for one, other in itertools.combinations(seen, 2):
            assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 > 20


@pytest.mark.parametrize("scheme", [0, 1])
@pytest.mark.parametrize("blindness", BLINDNESS)
def test_the_shades_of_phases_differ(scheme: int, blindness: str) -> None:
    names = ("warm-up", "cooldown", "constant", "decay")
    found = [
        re.findall(rf"--phase-{name}: #(\w{{6}})", (TEMPLATES / "style.css").read_text())[scheme] for name in names
    ]
    seen = [seen_as(tuple(int(text[i : i + 2], 16) for i in (0, 2, 4)), BLINDNESS[blindness]) for text in found]
    for one, other in itertools.combinations(seen, 2):
        assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 > 8


def test_lines_differ_in_more_than_colour() -> None:
    dashes = re.search(r"DASHES = (\[.*?\]);", (TEMPLATES / "elements.js").read_text())
    assert dashes
    patterns = json.loads(dashes[1])
    assert len(patterns) == 8
    assert len({tuple(pattern) for pattern in patterns}) == 8


def test_the_heatmap_grows_lighter_evenly() -> None:
    stops = re.search(r"VIRIDIS = (\[.*?\]\]);", (TEMPLATES / "heat.js").read_text())
    assert stops
    for matrix in BLINDNESS.values():
        lights = [seen_as(tuple(color), matrix)[0] for color in json.loads(stops[1])]
        assert all(high - low > 3 for low, high in itertools.pairwise(lights))


def test_the_library_is_whole_with_its_licence() -> None:
    assert "MIT License" in (TEMPLATES / "uplot" / "LICENSE").read_text()
    assert "v1.6.32" in (TEMPLATES / "uplot" / "uPlot.iife.min.js").read_text()[:80]
    assert "</script" not in "".join(path.read_text() for path in TEMPLATES.rglob("*.js"))


def test_a_page_of_many_large_runs_stays_below_its_limit(tmp_path: Path) -> None:
    draw = random.Random(0)
    run = WatchedRun(tmp_path, "run")
    load = {str(layer): [round(draw.random() / 64, 5) for _ in range(128)] for layer in range(60)}
    for step in range(1, 3001):
        values = {name: draw.random() for name in ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory")}
        row: dict[str, Any] = {"step": step, **values, "balance": {name: draw.random() for name in ("aux", "z-loss")}}
        if step % 10 == 0:
            row |= {"mri": [draw.random() for _ in range(60)], "entropy": [draw.random() for _ in range(60)]}
            row |= {"dead_experts": [[] for _ in range(60)]} | ({"load": load} if step % 100 == 0 else {})
        run.rows.add(json.dumps(row).encode())
    runs = []
    for number in range(8):
        runs.append(WatchedRun(tmp_path, f"run {number}"))
        runs[-1].rows = run.rows
    assert len(render(collect(runs))) < 10_000_000
    assert len(render(collect(runs[:1]))) < 10_000_000
