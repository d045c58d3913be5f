"""Each fault once or twice; `python -m tests.benchmarks.faults` does each as often as docs/reliability.md says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.faults.table import FAULTS
from tests.faults.world import Fault, World, can_mount


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Models, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOETOOL_CACHE", "")  # put back afterwards, as are the others that a world sets
        for name in ("TOKENIZERS_PARALLELISM", "HF_HOME", "HF_DATASETS_CACHE"):
            patch.setenv(name, "")
        yield World(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, id=f"{fault.name}: {fault.where}", marks=[pytest.mark.slow] * fault.slow) for fault in FAULTS],
)
def test_a_fault(world: World, fault: Fault, tmp_path: Path) -> None:
    if fault.mounts and not can_mount(tmp_path):
        pytest.skip("a small disk can be mounted by root alone")
    for seed in range(1 + fault.slow):
        assert fault.once(world, Random(seed))
