"""`torchrun -m tests.step_folders MESH FOLDER ...`: several processes write and read step folders of a sharded model.

MESH is 1, 2, 4 (FSDP2's own sharding) or 2x2: then experts are sharded as by expert parallelism within FSDP,
`(_StridedShard(0), Shard(0))`, matrices over both dimensions of the mesh, and vectors over one.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from moetool.checkpoint.model import load_model
from moetool.errors import CheckpointError
from moetool.train import resume, state
from moetool.train.config import TrainConfig
from moetool.train.export import Layout, buffers, lay_out, save_beside
from moetool.train.optimizer import adamw
from moetool.train.ranks import Ranks, new_ranks
from moetool.train.saving import Saver
from moetool.train.shards import boxes, extent, local, placed, region

PLACEMENTS: dict[int, list[Any]] = {
    1: [Shard(0), Replicate()],
    2: [Shard(0), Shard(1)],
    3: [_StridedShard(0, split_factor=2), Shard(0)],
}


def shard(model: nn.Module, mesh: str) -> None:
    """Shard every parameter of a model; each process has the whole of it."""
    if mesh == "1":
        return
    if mesh != "2x2":
        fully_shard(model)
        return
    of = init_device_mesh("cpu", (2, 2))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            placements = PLACEMENTS[parameter.ndim]
            sharded = distribute_tensor(parameter.data, of, placements, src_data_rank=None)
            module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


def opened(folder: Path, mesh: str) -> tuple[Any, dict[str, nn.Parameter], torch.optim.Optimizer]:
    """A model in fp32, sharded, and its optimizer."""
    model = load_model(folder, "float32")
    shard(model, mesh)
    weights = dict(model.named_parameters())
    return model, weights, adamw(weights.values(), TrainConfig(model=Path("m"), out=Path("o"), train={}))


def update(weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """One step of AdamW with gradients that are the same whatever the mesh is."""
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for i, weight in enumerate(weights.values()):
        torch.manual_seed(i)
        gradient = torch.randn(weight.shape)
        if isinstance(weight, DTensor):
            gradient = distribute_tensor(gradient, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.grad = gradient
    optimizer.step()


def save(
    saver: Saver,
    layout: Layout,
    weights: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    source: Path,
    out: Path,
    step: int,
    trouble: Callable[[], None] = lambda: None,
) -> None:
    """Have a step folder written, as `cpt` does; `trouble` comes before each part."""
    moments = dict(resume.moments(weights, optimizer))
    tensors: dict[str, Tensor] = {**buffers(layout.model), **weights, **moments}

    def contents(whole: Any) -> Any:
        if not next(iter(whole.values())).is_meta:
            trouble()
        return layout.contents(whole, step)

    def write(put: Callable[[Path], dict[str, str]]) -> None:
        def fill(folder: Path) -> None:
            digests = put(folder)
            if saver.ranks.is_main:
                save_beside(layout, folder, source, {"command": "cpt"})
                resume.save(folder, digests, layout.dtype != "float32", step, {"seed": 0})

        state.save_step(state.step_folder(out, step), fill, 3, saver.ranks)

    saver.save(tensors, [*layout.units, *((name,) for name in moments)], contents, write)


def write_and_read(mesh: str, model: Path, out: Path, *others: Path) -> None:
    """Save a model in OUT, unless OUT is there; save what this mesh reads from other runs in a folder within them."""
    ranks = new_ranks()
    core, weights, optimizer = opened(model, mesh)
    update(weights, optimizer)
    with Saver(1, ranks) as saver:
        if ranks.gather(not out.exists())[0]:
            out.mkdir(exist_ok=True)
            save(saver, lay_out(core, "bfloat16"), weights, optimizer, model, out, 1)
            saver.wait()
    for other in others:
        assert state.find(other, ranks).identity == {"seed": 0}
        folder = state.step_folder(other, 1)
        core, weights, optimizer = opened(folder, mesh)
        resume.load_weights(folder, core, "")
        resume.load_moments(folder, weights, optimizer, "")
        with Saver(10**18, ranks) as saver:  # without copies
            by = other / f"by-{mesh}"
            by.mkdir(exist_ok=True)
            save(saver, lay_out(core, "bfloat16"), weights, optimizer, model, by, 1)


def held_right(_: Ranks) -> None:
    """What `region` says is held lies in the local tensors, however they are sharded; torch joins them again."""
    size = dist.get_world_size()
    flat, square = init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (2, size // 2))
    cases: list[tuple[Any, list[Any]]] = [(flat, [Shard(0)]), (flat, [Shard(1)]), (flat, [Replicate()])]
    cases += [(flat, [_StridedShard(0, split_factor=2)]), (flat, [_StridedShard(1, split_factor=2)])]
    cases += [(square, [_StridedShard(dim, split_factor=size // 2), Shard(dim)]) for dim in (0, 1)]
    cases += [(square, [Shard(0), Shard(dim)]) for dim in (0, 1)]
    cases += [(square, [Shard(1), Shard(0)]), (square, [Replicate(), Shard(0)]), (square, [Shard(0), Replicate()])]
    for rows in (0, 1, 2, 3, 4, 7, 8):
        for mesh, placements in cases:
            true = torch.arange(rows * 6.0).reshape(rows, 6)
            tensor = distribute_tensor(true, mesh, placements, src_data_rank=None)
            held = region(tensor)
            assert extent(held) == tuple(local(tensor).shape), (rows, placements)
            for there, here in boxes(held):
                assert torch.equal(true[there], local(tensor)[here]), (rows, placements)
            again = placed(local(tensor).clone(), tensor)
            assert torch.equal(again.full_tensor(), true), (rows, placements)  # type: ignore[attr-defined]
            assert torch.equal(tensor.full_tensor(), true), (rows, placements)


def troubles(ranks: Ranks, model: Path, out: Path) -> None:
    """A write fails in the second process; a file is damaged; the second process is killed while it writes."""
    core, weights, optimizer = opened(model, "2")
    update(weights, optimizer)
    layout = lay_out(core, "bfloat16")
    out.mkdir(exist_ok=True)

    def full() -> None:
        if ranks.rank == 1:
            raise OSError(28, "No space left on device", "that.safetensors")

    def killed() -> None:
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with Saver(1, ranks) as saver:
        for step in (1, 2):
            save(saver, layout, weights, optimizer, model, out, step)
            saver.wait()
        save(saver, layout, weights, optimizer, model, out, 3, full)
        told: BaseException | None = None
        try:
            saver.wait()
        except (OSError, CheckpointError) as error:
            told = error
        assert isinstance(told, CheckpointError if ranks.rank == 0 else OSError), told
        if ranks.rank == 0:
            assert "process 1 has failed: [Errno 28] No space left on device: 'that.safetensors'" in str(told)
        ranks.gather(None)
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
        ranks.gather(None)
        damaged = state.step_folder(out, 2) / "training_state" / "master-00002-of-00002.safetensors"
        if ranks.rank == 0:
            written = bytearray(damaged.read_bytes())
            written[-20] ^= 1
            damaged.write_bytes(written)
        found = state.find(out, ranks)
        assert (found.step, found.damaged) == (
            1,
            (f"{damaged} is damaged (its bytes have changed since it was written)",),
        )
        save(saver, layout, weights, optimizer, model, out, 4, killed)
        saver.wait()


def left_alone(ranks: Ranks, model: Path, out: Path) -> None:
    """The first process saves without the second one, which lives: a signal must end the first all the same."""
    core, weights, optimizer = opened(model, "2")
    update(weights, optimizer)
    layout = lay_out(core, "bfloat16")
    out.mkdir(exist_ok=True)
    gone = out / "gone"
    with suppress(KeyboardInterrupt), Saver(1, ranks) as saver:
        save(saver, layout, weights, optimizer, model, out, 5)
        saver.wait()
        if ranks.rank == 0:
            save(saver, layout, weights, optimizer, model, out, 6)
            raise KeyboardInterrupt
    if ranks.rank == 0:
        print("left before the other", flush=True)
        gone.touch()
        sys.exit(0)
    until = time.monotonic() + 120
    while not gone.exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert gone.exists()


def main() -> None:
    """Run one of the above in each process."""
    what, *arguments = sys.argv[1:]
    if what != "1":
        dist.init_process_group("gloo")
    folders = [Path(argument) for argument in arguments]
    named: dict[str, Any] = {"held": held_right, "troubles": troubles, "alone": left_alone}
    if what in named:
        named[what](new_ranks(), *folders)
    else:
        write_and_read(what, *folders)
    if what != "1":
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
