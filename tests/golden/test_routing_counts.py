"""A small table of counts whose measures were computed by hand: top-2 of 8 experts, 64 tokens a domain.

Loads are powers of two where they can be, so that entropies in bits are fractions.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

COUNTS = {
    "en": {"0": [32, 32, 16, 16, 16, 8, 4, 4], "1": [64, 64, 0, 0, 0, 0, 0, 0]},
    "ja": {"0": [16] * 8, "1": [0, 0, 0, 0, 0, 0, 64, 64]},
}
# Layer 0 of en: 2 x 1/4 x 2 + 3 x 1/8 x 3 + 1/16 x 4 + 2 x 1/32 x 5 = 2.6875 bits of 3; loads over the balanced one
# are 2, 2, 1, 1, 1, 1/2, 1/4, 1/4, the mean of their squares 11.375 / 8.
EXPECTED: dict[str, list[dict[str, Any]]] = {
    "en": [
        {
            "load": [1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 16, 1 / 32, 1 / 32],
            "mri": 0.5, "mri_normalized": 2, "entropy": 2.6875 / 3, "cv": math.sqrt(0.421875), "max_violation": 1,
        },
        {
            "load": [0.5, 0.5, 0, 0, 0, 0, 0, 0],
            "mri": 1, "mri_normalized": 4, "entropy": 1 / 3, "cv": math.sqrt(3), "max_violation": 3,
        },
    ],
    "ja": [
        {
            "load": [1 / 8] * 8,
            "mri": 0.25, "mri_normalized": 1, "entropy": 1, "cv": 0, "max_violation": 0,
        },
        {
            "load": [0, 0, 0, 0, 0, 0, 0.5, 0.5],
            "mri": 1, "mri_normalized": 4, "entropy": 1 / 3, "cv": math.sqrt(3), "max_violation": 3,
        },
    ],
}  # fmt: skip
DEAD = {"en": [[], [2, 3, 4, 5, 6, 7]], "ja": [[], [0, 1, 2, 3, 4, 5]]}


def test_a_table_of_counts_gives_the_measures_computed_by_hand(tmp_path: Path) -> None:
    path, out = tmp_path / "counts.json", tmp_path / "out"
    path.write_text(json.dumps(COUNTS))
    code, _, errors = tiny.in_process("analyze-routing", "--counts", path, "--top-k", 2, "--out", out, "--quiet")
    assert code == 0, errors
    report = json.loads((out / "report.json").read_text())
    assert (report["num_layers"], report["num_experts"], report["top_k"]) == (2, 8, 2)
    for name, rows in EXPECTED.items():
        assert report["domains"][name]["num_tokens"] == 64
        for layer, expected in enumerate(rows):
            row = report["domains"][name]["layers"][layer]
            assert {key: row[key] for key in expected} == {key: pytest.approx(v) for key, v in expected.items()}
            assert row["dead_experts"] == DEAD[name][layer]
            assert row["balance_loss"] is row["mean_probability"] is None
    # (f + 1/8) / 2 of layer 0 is 3/16 twice, 1/8 three times, 3/32, 5/64 twice: 2.925498 bits, less (2.6875 + 3) / 2.
    # In layer 1 the domains share no expert.
    assert report["domain_divergence"][0]["layers"] == pytest.approx([0.0817476, 1], abs=1e-7)
    verdict = report["verdict"]
    # Together layer 1 uses four experts alike: 2 bits, half way between top-2 of one pair (1) and balance (3).
    assert (verdict["level"], verdict["layers"]) == ("skewed", ["balanced", "skewed"])
    assert verdict["dead_experts"] == [[1, 2], [1, 3], [1, 4], [1, 5]]
    assert (verdict["worst"]["domain"], verdict["worst"]["layer"], verdict["worst"]["mri"]) == ("en", 1, 1)
