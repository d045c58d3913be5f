"""The bytes that processes of a mesh send, counted, against the closed form from which docs/multi-gpu.md recommends."""

from __future__ import annotations

from pathlib import Path

import pytest

from moetool.mesh import Mesh
from tests.benchmarks.mesh import differences, measure, prepare

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHORT = {"seq_len": 32, "global_batch_size": 8}


@pytest.mark.parametrize(
    ("meshes", "options"),
    [
        pytest.param(
            [Mesh(fsdp=4, ep=2), Mesh(fsdp=2, ep=2, tp=2), Mesh(fsdp=2, ep=2, replicas=2), Mesh(fsdp=2, tp=2)],
            {"precision": "bf16", "gradient_checkpointing": True},
            id="bf16, checkpointed",
        ),
        pytest.param(
            [Mesh(replicas=4), Mesh(fsdp=4), Mesh(fsdp=4, ep=4), Mesh(fsdp=2, tp=2), Mesh(ep=2, tp=2, replicas=2)],
            {},
            id="fp32",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [Mesh(fsdp=4), Mesh(fsdp=2, replicas=2), Mesh(fsdp=2, tp=2), Mesh(ep=2, tp=2, replicas=2)],
            {"precision": "bf16"},
            id="bf16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bytes_are_those_of_the_closed_form(tmp_path: Path, meshes: list[Mesh], options: dict[str, object]) -> None:
    prepare(tmp_path, **SMALL)
    found = measure(tmp_path, 4, meshes, 0, **SHORT, **options)
    wrong = [one for mesh, ranks in zip(meshes, found, strict=True) for one in differences(
        tmp_path, mesh, ranks, **SHORT, **options)]  # fmt: skip
    assert not wrong
