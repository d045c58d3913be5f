"""The analysis of models whose layers have ratios of their own, and of experts that were kept whole, by plain loops."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moetool import registry
from moetool.arch.spec import scales
from moetool.errors import CheckpointError
from moetool.routing.origin import find_dense, read_origin
from moetool.routing.similarity import similarity
from tests import tiny
from tests.integration.test_routing_upcycling_kinds import (
    FINE,
    Kind,
    make,
    measure,
    plain,
    plain_use,
    recipe_of,
    trained,
)

PER_MATRIX = ("--drop-index", "per-matrix")
NOISE = ("--method", "noise", "--noise-ratio", "0.5", "--noise-ratio", "0=0.25")
WHOLE = ("--keep-experts-whole", 2)
# What is redrawn in the two layers, of 64 units of an expert (16 with four parts).
MIXED: list[tuple[Kind, Any]] = [
    (Kind("llama", "mixtral", ("--drop-ratio", "0.5", "--drop-ratio", "0=0.25")), {"0": 16, "1": 32}),
    (Kind("llama", "granitemoe", ("--drop-ratio", "1=0.25", *PER_MATRIX)), {"0": 32, "1": 16}),
    (Kind("llama", "mixtral", ("--drop-ratio", "0=0")), {"0": 0, "1": 32}),
    (Kind("llama", "mixtral", ("--drop-ratio", "1=0", *PER_MATRIX)), {"0": 32, "1": 0}),
    (Kind("llama", "mixtral", ("--drop-ratio", "1=1")), {"0": 32, "1": 64}),
    (Kind("llama", "mixtral", WHOLE), 32),
    (Kind("llama", "granitemoe", (*WHOLE, *PER_MATRIX, "--drop-ratio", "0=0.25")), {"0": 16, "1": 32}),
    (Kind("llama", "mixtral", (*NOISE, *WHOLE)), {"0": 16, "1": 32}),
    (Kind("llama", "mixtral", (*FINE, "--keep-experts-whole", 4, "--drop-ratio", "0=0.25")), {"0": 4, "1": 8}),
    (Kind("llama", "mixtral", ("--num-experts", 6, *WHOLE, "--drop-ratio", "0=0.25"), donors=2), {"0": 16, "1": 32}),
]


@pytest.mark.parametrize(("kind", "redrawn"), MIXED, ids=lambda value: str(value) if isinstance(value, Kind) else "")
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_similarity_and_use_of_each_layer(kind: Kind, redrawn: Any, tmp_path: Path) -> None:
    start = make(kind, tmp_path)
    folder = trained(start, tmp_path / "trained")
    found, recipe = measure(folder), recipe_of(folder)
    spec = registry.load("target", kind.target)
    assert found["num_redrawn"] == redrawn
    assert found["notes"] == []
    factor = 1.0 if spec.scaling_key else scales(recipe, spec)[0]
    for layer, row in enumerate(found["layers"]):
        expected = plain(recipe, factor, folder, layer)
        for side in ("between_experts", "with_dense"):
            for expert, values in zip(row[side]["experts"], expected[side], strict=True):
                shown = [None if math.isnan(value) else pytest.approx(value, abs=2e-6) for value in values]
                assert [expert[part] for part in ("all", "kept", "redrawn")] == shown, (layer, side)
        used = found["unit_use"]["a"][layer]
        expected_use = plain_use(recipe, folder, layer)
        for expert, use in zip(used["experts"], expected_use, strict=True):
            assert (expert and expert["use"]) == (use if use is None else pytest.approx(use, rel=1e-3))
        known = [use for use in expected_use if use is not None]
        assert used["use"] == (pytest.approx(sum(known) / len(known), rel=1e-3) if known else None)
    # Right after upcycling what was kept is the dense model's; a whole expert is all of it, and has nothing redrawn.
    origin = read_origin(start)
    assert origin
    for layer, row in enumerate(similarity(start, origin, find_dense(origin))):
        for e, expert in enumerate(row["with_dense"]["experts"]):
            changed = recipe.num_redrawn(origin.num_units, layer, e)
            assert expert["kept"] == (pytest.approx(1, abs=1e-6) if changed < origin.num_units else None)
            assert (expert["redrawn"] is None) == (changed == 0)
            assert (expert["all"] == pytest.approx(1, abs=1e-6)) == (changed == 0)


def test_the_page_names_layers_and_whole_experts(jsonl: Path, tmp_path: Path) -> None:
    options = ("--drop-ratio", "0=0", "--drop-ratio", "1=0.25", *WHOLE)
    folder, out = make(Kind("llama", "mixtral", options), tmp_path), tmp_path / "out"
    command = ("analyze-routing", folder, "--data", f"a={jsonl}", "--out", out, "--max-tokens", 64)
    code, printed, errors = tiny.in_process(*command)
    assert code == 0, errors
    assert "in the kept units" in " ".join(printed.split())
    page = (out / "report.html").read_text()
    assert "with 0 of 64 units redrawn in layer 0, 16 in layer 1 and the rest kept" in page
    assert "2 of 4 experts of each layer were kept whole, as plain copies." in page
    report = json.loads((out / "report.json").read_text())["upcycling"]
    assert [row["use"] is None for row in report["unit_use"]["a"]] == [True, False]
    assert [expert is None for expert in report["unit_use"]["a"][1]["experts"]] == [True, True, False, False]
    assert (out / "plots" / "unit-use.png").is_file()
    # Layers of which a measure is not known neither pass nor fail.
    check = (*command, "--quiet", "--fail-if", "unit_use>9", "--fail-if", "kept_similarity<0.99")
    assert tiny.in_process(*check)[0] == 0


def test_experts_that_were_kept_whole_stay_so_through_grow_and_prune(tmp_path: Path) -> None:
    """An expert that was copied or moved is still compared as what it began as."""
    folder = make(Kind("llama", "mixtral", ("--drop-ratio", "0=0.25", "--keep-experts-whole", 1)), tmp_path)
    grown = tmp_path / "grown"
    code, _, errors = tiny.in_process("grow", folder, grown, "--num-experts", 8, "--start", "twins", "--quiet")
    assert code == 0, errors
    origin = read_origin(grown)
    assert origin
    for row in similarity(grown, origin, find_dense(origin)):
        whole = [e for e in range(8) if origin.first(row["layer"], e) == 0]
        assert len(whole) == 2
        for e, expert in enumerate(row["with_dense"]["experts"]):
            assert (expert["redrawn"] is None) == (e in whole)


@pytest.mark.parametrize(
    "change",
    [
        {"drop_ratio": ["0.5", "1=0.5"]},
        {"drop_ratio": ["0.5", "first=0.5"]},
        {"drop_ratio": "0.5"},
        {"keep_experts_whole": 1},
        {"keep_experts_whole": -2},
        {"keep_experts_whole": 6},
        {"donor_weights": ["0.5"]},
    ],
)
def test_a_lineage_that_was_edited_is_one_line(change: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    options = ("--num-experts", 4, "--drop-ratio", "0=0.25", *WHOLE)
    assert tiny.in_process("upcycle", llama, out, *options, "--quiet")[0] == 0
    assert read_origin(out)
    document = json.loads((out / "moetool.json").read_text())
    document["lineage"][0]["recipe"] |= change
    (out / "moetool.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as caught:
        read_origin(out)
    assert "\n" not in str(caught.value)
    assert "moetool.json" in str(caught.value)
