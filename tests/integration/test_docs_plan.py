"""docs/recipes.md at paper scale, and docs/plan.md: their figures are what `moetool plan` says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moetool.budget import law
from tests import recipes, tiny

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
EXPERTS = {"8, top-2": 1, "32 of 1/4, top-8": 4, "64 of 1/8, top-16": 8}


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("large")
    return {name.split("/")[1]: recipes.save_headers(name, root / name) for name in recipes.LARGE}


def plan(folder: Path, *arguments: object) -> dict[str, Any]:
    code, out, err = tiny.in_process("plan", folder, *arguments, "--json")
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def upcycled(name: str, folder: Path) -> dict[str, str]:
    """What upcycling takes on a laptop with one disk."""
    found = plan(folder, "--dtype", "bfloat16")
    upcycling, parameters = found["upcycling"], found["parameters"]
    return {
        "model": name,
        "target": f"`{found['target']}`",
        "dense": f"{parameters['dense'] / 1e9:.1f} B",
        "total": f"{parameters['total'] / 1e9:.1f} B",
        "active": f"{parameters['active'] / 1e9:.1f} B",
        "reads, GB": f"{upcycling['reads'] / 1e9:.0f}",
        "writes, GB": f"{upcycling['writes'] / 1e9:.0f}",
        "memory, GB": f"{upcycling['memory'] / 1e9:.1f}",
        "minutes": f"{upcycling['seconds'] / 60:.0f}",
        "step folder, TB": f"{found['disk']['step_folder'] / 1e12:.1f}",
    }


def trained(name: str, folder: Path, experts: str, gpus: int) -> dict[str, str]:
    """What training takes on GPUs with 141 GB."""
    more = ("--gpu", "h200", "--num-gpus", gpus, "--train-tokens", "20B", "--granularity", EXPERTS[experts])
    found = plan(folder, *more)
    best = found["meshes"]["recommended"]
    row = {"model": name, "experts": experts, "GPUs": str(gpus)}
    if best is None:
        least = min(one["memory"]["total"] for one in found["meshes"]["others"])
        return row | {"mesh": "none fits", "GB per GPU": f"{least / 1e9:.0f}"} | dict.fromkeys(
            ("micro-batch", "host, GB", "busy", "GPU-hours", "days"), ""
        )  # fmt: skip
    sizes = {"--fsdp": "fsdp", "--ep": "ep", "--tp": "tp", "--replicas": "replicas"}
    options = " ".join(f"{flag} {best['sizes'][of]}" for flag, of in sizes.items() if best["sizes"][of] > 1)
    low, high = best["efficiency"]
    (way,) = (one for one in found["ways"] if one["way"] == "drop")
    return row | {
        "mesh": f"`{options}`",
        "micro-batch": str(best["micro_batch_size"]),
        "GB per GPU": f"{best['memory']['total'] / 1e9:.0f}",
        "host, GB": f"{max(best['loading_per_machine'], best['saving_per_machine']) / 1e9:,.0f}",
        "busy": f"{low:.0%} to {high:.0%}",
        "GPU-hours": f"{way['gpu_hours']:,.0f}",
        "days": f"{way['days']:.1f}",
    }


def test_upcycling_at_paper_scale(headers: dict[str, Path]) -> None:
    assert recipes.table("laptop") == [upcycled(name, folder) for name, folder in headers.items()]


def test_training_at_paper_scale(headers: dict[str, Path]) -> None:
    assert recipes.table("large") == [
        trained(name, folder, experts, gpus)
        for name, folder in headers.items()
        for experts in EXPERTS
        for gpus in (64, 256)
    ]


def test_the_page_has_every_known_model() -> None:
    from moetool.budget.known import CARDS

    text = PAGE.read_text(encoding="utf-8")
    for name in CARDS:
        assert f"`{name}`" in text, name


def test_the_figures_of_the_law_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = law.verdict(1e9, 74e9, 37e9)
    assert f"{found.start:.3f} nats" in text
    assert f"{found.upcycled:.3f} nats" in text
    for what, (low, high) in (
        ("parameters of the dense model", law.PARAMETERS),
        ("dense tokens", law.DENSE_TOKENS),
        ("training tokens", law.TRAIN_TOKENS),
    ):
        ends = (f"{end / 1e12:g} T" if end >= 1e12 else f"{end / 1e9:g} B" for end in (low, high))
        assert f"| {what} | {' | '.join(ends)} |" in text
    block = re.search(r"<!-- crossings -->\n(.*?)<!-- /crossings -->", text, re.DOTALL)
    assert block
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block[1].strip().splitlines()]
    dense = [float(cell.removesuffix(" B")) for cell in header[1:]]
    for name, *cells in rows:
        if name.endswith("break-even"):
            values = [law.verdict(1e9, tokens * 1e9, 1e10).break_even for tokens in dense]
        else:
            parameters = float(name.split()[0]) * 1e9
            values = [law.verdict(parameters, tokens * 1e9, 1e10).scratch_wins for tokens in dense]
        assert cells == ["never" if value is None else f"{float(f'{value / 1e9:.2g}'):g} B" for value in values]
