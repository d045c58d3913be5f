"""Sizes of a mesh: which are refused before anything is loaded, and what a process of one holds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moetool.checkpoint.model import skeleton
from moetool.cost.memory import Training, estimate, loading_bytes, weight_bytes
from moetool.cost.parameters import sizes_of
from moetool.cost.shares import shard_elements
from moetool.errors import ConfigError
from moetool.mesh import Mesh, check_model, check_shared, check_sizes, distributed, mesh_of
from tests import tiny


def test_where_a_process_stands() -> None:
    mesh = Mesh(fsdp=2, ep=4, tp=2, replicas=3)
    assert (mesh.processes, mesh.data_parallel, mesh.efsdp) == (12, 6, 1)
    assert [mesh.rank(process) for process in range(12)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [process for process in range(12) if mesh.counts(process)] == [0, 2, 4, 6, 8, 10]
    assert str(mesh) == "replicas 3 x fsdp 2 x tp 2 x ep 4"
    assert Mesh(replicas=8).whole
    assert not Mesh(tp=2).sharded
    assert Mesh(tp=2, replicas=2).sharded


def test_replicas_follow_from_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    options = SimpleNamespace(fsdp=2, ep=1, tp=2, replicas=None)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert mesh_of(options) == Mesh(2, 1, 2, 2)
    assert mesh_of(SimpleNamespace(fsdp=2, ep=1, tp=2, replicas=4)) == Mesh(2, 1, 2, 4)


@pytest.mark.parametrize(
    ("mesh", "launched", "follow", "reason"),
    [
        (Mesh(3), 4, True, "--fsdp 3 x --tp 1 = 3 processes, but 4 were launched; --fsdp may be 1, 2, 4, or launch 3"),
        (Mesh(2), 1, True, "--fsdp 2 x --tp 1 = 2 processes, but 1 was launched; --fsdp may be 1, or launch 2"),
        (Mesh(2, 1, 3), 4, True, "= 6 processes, but 4 were launched; --tp x --replicas must divide 4"),
        (Mesh(2, 1, 1, 3), 4, False, "--fsdp 2 x --tp 1 x --replicas 3 = 6 processes"),
        (Mesh(2, 1, 1, 2), 8, False, "= 4 processes, but 8 were launched; --fsdp may be 4, or launch 4"),
        (Mesh(3, 1, 1, 2), 8, True, "--fsdp 3 x --tp 1 = 3 processes, but 8 were launched; --fsdp may be 1, 2, 4, 8"),
        (Mesh(4), 8, False, "--fsdp 4 x --tp 1 = 4 processes, but 8 were launched; --fsdp may be 8, or launch 4"),
        (Mesh(4, 3), 4, True, "--ep 3 must be a multiple of --tp 1 and divide --fsdp x --tp = 4; it may be 1, 2, 4"),
        (
            Mesh(4, 3, 2),
            8,
            True,
            "--ep 3 must be a multiple of --tp 2 and divide --fsdp x --tp = 8; it may be 1, 2, 4, 8",
        ),
    ],
)
def test_sizes_that_do_not_fit_the_processes(mesh: Mesh, launched: int, follow: bool, reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_sizes(mesh, launched, follow)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_sizes_that_do_not_fit_the_model(tmp_path: Path, mixtral: Path, llama: Path) -> None:
    six = skeleton(tiny.save_mixtral(tmp_path / "six", num_local_experts=6))
    with pytest.raises(ConfigError, match=r"divide the model's 6 experts; it may be 1, 2$"):
        check_model(Mesh(4, 4), six)
    with pytest.raises(ConfigError, match=r"--tp 4 does not divide the 4 heads and 2 key-value heads .* be 1, 2$"):
        check_model(Mesh(2, 1, 4), skeleton(mixtral))
    with pytest.raises(ConfigError, match="--ep 2: 'llama' is a dense model without experts; use --fsdp alone"):
        check_model(Mesh(2, 2), skeleton(llama))
    for mesh in (Mesh(), Mesh(2), Mesh(4, 2), Mesh(2, 4, 2), Mesh(1, 2, 2, 2)):
        check_sizes(mesh, mesh.processes)
        check_model(mesh, skeleton(mixtral))
    model: Any = skeleton(mixtral)
    model._tp_plan = {}
    with pytest.raises(ConfigError, match="--tp: transformers cannot share 'mixtral'"):
        check_model(Mesh(2, 1, 2), model)


def test_a_model_that_only_runs_needs_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    shared = {"fsdp": 2, "ep": 1, "tp": 1, "device": "auto", "device_map": None}
    with pytest.raises(ConfigError, match="--fsdp 2 x --tp 1 = 2 processes, but 4 were launched"):
        check_shared(SimpleNamespace(**shared))
    with pytest.raises(ConfigError, match="--device-map and --fsdp, --ep, --tp exclude each other"):
        check_shared(SimpleNamespace(**(shared | {"device_map": "auto"})))
    check_shared(SimpleNamespace(**(shared | {"fsdp": 1, "device": "cpu"})))


def test_what_a_process_holds(mixtral: Path) -> None:
    model = skeleton(mixtral)
    sizes = sizes_of(model)
    experts, query = "model.layers.0.mlp.experts.down_proj", "model.layers.0.self_attn.q_proj.weight"
    assert sizes.shapes[experts] == (4, 32, 64)
    for mesh, held in ((Mesh(2), 2), (Mesh(3), 2), (Mesh(8), 1), (Mesh(4, 4), 1), (Mesh(4, 2), 1), (Mesh(8, 4), 1)):
        assert shard_elements(sizes, mesh)[experts] == held * 32 * 64
    assert shard_elements(sizes, Mesh(2, 1, 2))[experts] == 2 * 32 * 32
    assert shard_elements(sizes, Mesh(2, 2, 2))[query] == 16 * 32 // 2
    training = Training(seq_len=16, micro_batch_size=1, precision="fp32")
    whole, two = estimate(sizes, training), estimate(sizes, training, Mesh(2))
    assert two["optimizer"] == pytest.approx(4 * sizes.total, rel=0.01)
    assert whole["optimizer"] == 8 * sizes.total
    assert two["activations"] == whole["activations"]
    assert estimate(sizes, training, Mesh(2, 1, 2))["activations"] < whole["activations"]
    assert loading_bytes(sizes, Mesh(2), gpu=True) < loading_bytes(sizes, Mesh(2)) < loading_bytes(sizes)
    tp = Mesh(1, 1, 2)
    assert weight_bytes(mixtral, "bfloat16", tp) == 2 * sum(shard_elements(sizes, tp).values())
    assert weight_bytes(mixtral, mesh=Mesh(4, 4)) < weight_bytes(mixtral, mesh=Mesh(2, 2))
    model._tp_plan = {name: style for name, style in model.tp_plan.items() if ".experts" in name}
    sizes = sizes_of(model)
    assert shard_elements(sizes, Mesh(2, 1, 2))[experts] == 2 * 32 * 32
    assert shard_elements(sizes, Mesh(2, 1, 2))[query] == 16 * 32  # which such a plan leaves whole


def test_whole_weights_are_not_distributed() -> None:
    assert distributed(Mesh(replicas=4)) is None
    config = distributed(Mesh(2, 4, 2, 3), ["model.layers.*.mlp.gate"])
    assert (config.fsdp_size, config.ep_size, config.tp_size, config.dp_replicate_size) == (2, 4, 2, 3)
    assert config.fsdp_plan == {"model.layers.*.mlp.gate": "free_full_weight"}
