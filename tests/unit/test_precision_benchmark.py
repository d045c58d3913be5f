"""How the benchmark of precision compares losses."""

from __future__ import annotations

from tests.benchmarks.precision import difference, table

FOUND = {
    "fp32": [{"mean": 2.0, "validation": 4.0}, {"mean": 4.0, "validation": 4.0}],
    "autocast": [{"mean": 2.0, "validation": 4.0}, {"mean": 5.0, "validation": 4.0}],
    "bf16": [{"mean": 2.02, "validation": 3.96}, {"mean": 4.0, "validation": 4.0}],
}


def test_a_difference_is_that_of_each_seed() -> None:
    assert [round(part, 6) for part in difference(FOUND, "bf16", "fp32", "mean")] == [1.0, 0.0]
    assert [round(part, 6) for part in difference(FOUND, "bf16", "autocast", "mean")] == [1.0, -20.0]
    rows = table(FOUND, "mean").splitlines()
    assert rows[2].startswith("| fp32 | 3.0000 |  | -10.000 %")  # nothing against itself
    assert rows[4] == "| bf16 | 3.0100 | +0.500 % (+0.000 to +1.000) | -9.500 % (-20.000 to +1.000) |  |"
    assert table(FOUND, "validation").splitlines()[4].startswith("| bf16 | 3.9800 | -0.500 % (-1.000 to +0.000) |")
