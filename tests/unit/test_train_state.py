"""The folder of a run: step folders that are whole or absent, and what a resumed run finds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from threading import Event, Timer
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moetool.checkpoint.file_digest import digest
from moetool.checkpoint.folder import FolderLock
from moetool.checkpoint.model import load_model
from moetool.checkpoint.reader import content_fingerprint
from moetool.checkpoint.step_folder import step_folders
from moetool.errors import CheckpointError, ConfigError
from moetool.train import resume, state, tensor_file
from moetool.train.config import TrainConfig
from moetool.train.export import lay_out, save_beside, source_dtype
from moetool.train.metrics_log import MetricsLog, routing_row, summarize
from moetool.train.optimizer import adamw
from moetool.train.saving import Saver
from tests import tiny


def fill(folder: Path) -> None:
    (folder / "training_state").mkdir(parents=True)
    (folder / "training_state" / "state.json").write_text("{}")


def save(
    folder: Path,
    moments: Iterable[tuple[str, torch.Tensor]],
    master: Iterable[tuple[str, torch.Tensor]] = (),
    identity: Mapping[str, Any] | None = None,
) -> None:
    """`training_state/` of a step folder."""
    masters, digests = dict(master), dict[str, str]()
    tensors = {**dict(moments), **masters}

    def contents(whole: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str, torch.Tensor]]:
        yield from (("master" if name in masters else "optimizer", name, tensor) for name, tensor in whole.items())

    with Saver(need=1) as saver:
        saver.save(tensors, [(name,) for name in tensors], contents, lambda put: digests.update(put(folder)))
        saver.wait()
    resume.save(folder, digests, bool(masters), 1, identity or {})


def save_model(
    folder: Path, source: Path, dtype: str, tensors: Mapping[str, torch.Tensor], model: nn.Module, step: int = 0
) -> None:
    """The stock checkpoint of a step folder."""
    layout = lay_out(model, dtype)
    with Saver(need=1) as saver:
        saver.save(tensors, layout.units, lambda whole: layout.contents(whole, step), lambda put: print(put(folder)))
        saver.wait()
    save_beside(layout, folder, source, {"command": "cpt"})


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, advice: str) -> None:
    resume.load_weights(folder, model, advice)
    resume.load_moments(folder, dict(model.named_parameters()), optimizer, advice)


def test_step_folders_appear_whole_and_the_oldest_go(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        state.save_step(state.step_folder(tmp_path, step), fill, keep=2)
    assert state.saved_steps(tmp_path) == [10, 15]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000010", "step-000015"]

    def fail(folder: Path) -> None:
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        state.save_step(state.step_folder(tmp_path, 20), fail, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000010", "step-000015"]


def test_what_a_killed_save_left_is_no_checkpoint_and_is_swept(tmp_path: Path) -> None:
    fill(tmp_path / "checkpoints" / ".step-000020.unfinished")
    assert state.saved_steps(tmp_path) == []
    state.save_step(state.step_folder(tmp_path, 25), fill, keep=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000025"]


def test_snapshots_are_not_counted_and_go_with_what_is_gone_back_on(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        state.save_step(state.step_folder(tmp_path, step, "weights"), lambda folder: (folder / "a").touch(), None)
        state.save_step(state.step_folder(tmp_path, step), fill, keep=1)
    assert state.saved_steps(tmp_path) == [15]
    (tmp_path / "weights" / ".step-000020.unfinished").mkdir()
    fill(tmp_path / "weights" / ".step-000015.deleted")  # a run was killed while it went back
    state.go_back(tmp_path, 10)
    assert sorted(step_folders(tmp_path, "weights")) == [5, 10]
    state.save_step(state.step_folder(tmp_path, 12, "weights"), lambda folder: (folder / "a").touch(), None)
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == [
        f"step-{step:06d}" for step in (5, 10, 12)
    ]


def test_training_state_round_trip(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))

    config = TrainConfig(model=Path("m"), out=Path("o"), train={})
    one, two = model(), model()
    optimizer, other = adamw(one.parameters(), config), adamw(two.parameters(), config)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    one(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    save(tmp_path, resume.moments(dict(one.named_parameters()), optimizer), one.named_parameters(), {"seed": 0})
    load(tmp_path, two, other, "do this")
    assert resume.read_identity(tmp_path) == {"seed": 0}
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert {k: v.tolist() for k, v in optimizer.state[ours].items()} == {
            k: v.tolist() for k, v in other.state[theirs].items()
        }
    folder = tmp_path / "training_state"
    for path in list(folder.iterdir()):
        written = path.read_bytes()
        path.write_bytes(b"damaged")
        with pytest.raises(CheckpointError, match=r"cannot be used .*; do this"):
            load(tmp_path, two, other, "do this")
        path.write_bytes(written)
    (folder / "master.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be used"):
        load(tmp_path, two, other, "do this")


def test_moments_of_what_is_frozen_are_left(tmp_path: Path) -> None:
    one, two = nn.Linear(4, 3), nn.Linear(4, 3)
    two.bias.requires_grad_(False)
    config = TrainConfig(model=Path("m"), out=Path("o"), train={})
    optimizer, fresh = adamw(one.parameters(), config), adamw(two.parameters(), config)
    one(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    save(tmp_path, resume.moments(dict(one.named_parameters()), optimizer))
    load(tmp_path, two, fresh, "do this")
    assert set(fresh.state) == {two.weight}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Linear(4, 3), r"the model has no 0\.(bias|weight)"),
        (nn.Sequential(nn.Linear(5, 3)), r"0\.weight has shape \[3, 4\], the model's \[3, 5\]"),
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), r"holds nothing for 1\.bias"),
    ],
)
def test_moments_of_another_model_are_refused(tmp_path: Path, model: nn.Module, reason: str) -> None:
    one = nn.Sequential(nn.Linear(4, 3))
    config = TrainConfig(model=Path("m"), out=Path("o"), train={})
    optimizer = adamw(one.parameters(), config)
    one(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    save(tmp_path, resume.moments(dict(one.named_parameters()), optimizer))
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path, model, adamw(model.parameters(), config), "do this")


def run_folder(out: Path) -> list[Path]:
    """A run of three step folders."""

    def fill(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights" * 100)
        save(folder, [("a/exp_avg", torch.ones(100))], identity={"seed": 0})

    return [state.save_step(state.step_folder(out, step), fill, keep=3) for step in (5, 10, 15)]


@pytest.mark.parametrize("name", ["model.safetensors", "training_state/optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["shorter", "one bit", "absent"])
def test_a_damaged_newest_step_is_not_gone_on_from(tmp_path: Path, name: str, damage: str) -> None:
    newest = run_folder(tmp_path)[-1] / name
    assert state.find(tmp_path) == state.Found(15, {"seed": 0})
    written = bytearray(newest.read_bytes())
    if damage == "shorter":
        newest.write_bytes(written[:-1])
    elif damage == "one bit":
        written[-20] ^= 1
        newest.write_bytes(written)
    else:
        newest.unlink()
    found = state.find(tmp_path)
    assert (found.step, found.identity) == (10, {"seed": 0})
    assert str(newest) in found.damaged[0]
    # With its name it would stand before good folders when old ones are deleted.
    state.go_back(tmp_path, found.step)
    assert state.saved_steps(tmp_path) == [5, 10]
    assert state.save_step(state.step_folder(tmp_path, 20), fill, keep=2)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000010", "step-000020"]


def test_a_step_folder_without_its_state_is_told(tmp_path: Path) -> None:
    folders = run_folder(tmp_path)
    (folders[2] / "training_state" / "state.json").write_text("{")
    (folders[1] / "training_state" / "state.json").unlink()
    found = state.find(tmp_path)
    assert found.step == 5
    assert "is not valid JSON" in found.damaged[0]
    assert "no such file" in found.damaged[1]
    (folders[0] / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no step folder before it is intact; start again with --no-resume"):
        state.find(tmp_path)


def test_weight_decay_is_for_matrices_and_decoupled() -> None:
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    optimizer = adamw(model.parameters(), TrainConfig(model=Path("m"), out=Path("o"), train={}, weight_decay=0.5))
    model.weight.grad, model.bias.grad = torch.zeros(1, 1), torch.zeros(1)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    assert model.weight.item() == pytest.approx(1 - 0.1 * 0.5)
    assert model.bias.item() == 1.0


def test_the_holder_of_a_folder_is_named(tmp_path: Path) -> None:
    state.claim(tmp_path)
    process = json.loads((tmp_path / "moetool.partial.json").read_text())["writer"]["process"]
    with FolderLock(tmp_path), pytest.raises(CheckpointError, match=f"process {process}"):
        FolderLock(tmp_path)


def test_clear_deletes_a_run_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    state.claim(out)
    (out / "metrics.jsonl").write_text("{}")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"also holds notes\.txt"):
        state.check_folder(tmp_path / "model", out, resume=False)
    (out / "notes.txt").unlink()
    for name in ("step-000001", "step-000002", ".step-000001.deleted"):
        (out / "checkpoints" / name / "training_state").mkdir(parents=True)
        (out / "checkpoints" / name / "training_state" / "state.json").write_text("{}")
    state.check_folder(tmp_path / "model", out, resume=False)
    state.clear(out)
    assert [path.name for path in out.iterdir()] == ["moetool.partial.json"]


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    one, same, other = (tiny.save_llama(tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2)))
    assert content_fingerprint(one) == content_fingerprint(same) != content_fingerprint(other)
    assert source_dtype(one) == "float32"


@pytest.mark.parametrize("tied", [False, True])
def test_saved_weights_are_the_rounded_masters(tmp_path: Path, tied: bool) -> None:
    source = tiny.save_llama(tmp_path / "source", dtype=torch.bfloat16, tie_word_embeddings=tied)
    config = json.loads((source / "config.json").read_text())
    config |= {"torch_dtype": "bfloat16", "rope_theta": 10000.0, "output_router_logits": True}
    (source / "config.json").write_text(json.dumps(config))
    model = load_model(source, "float32")
    with torch.no_grad():
        model.model.norm.weight.add_(1e-4)
        model.lm_head.weight.mul_(1.001)
    save_model(tmp_path / "saved", source, "bfloat16", dict(model.named_parameters()), model)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(saved) == set(load_file(source / "model.safetensors"))
    assert ("lm_head.weight" in saved) is not tied
    again = load_model(tmp_path / "saved")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16())
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written == {key: value for key, value in config.items() if key != "output_router_logits"}


@pytest.mark.parametrize(("value", "advice"), [(float("nan"), "lower --lr"), (1e5, "--save-dtype float32")])
def test_a_model_that_is_not_finite_is_not_saved(tmp_path: Path, llama: Path, value: float, advice: str) -> None:
    model = load_model(llama, "float32")
    weights = dict(model.named_parameters()) | {"model.norm.weight": torch.full((32,), value)}
    with pytest.raises(ConfigError, match=rf"model\.norm\.weight is not finite in float16, .*step 7 .*{advice}"):
        save_model(tmp_path / "saved", llama, "float16", weights, model, step=7)


def test_metrics_keep_each_step_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.append({"step": 0, "val": {"a": 3.0, "b": 1.0}, "routing": {"a": {"mri": [0.9]}}})
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 4.0 - step, "tokens_per_second": 10.0})
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    log = MetricsLog(log.path, 2)
    assert [row["step"] for row in log.rows()] == [0, 1, 2]
    log.append({"step": 3, "loss": 0.5, "tokens_per_second": 20.0})
    log.append({"step": 3, "val": {"a": 2.0, "b": 1.25}, "routing": {"a": {"mri": [0.5]}}})
    assert summarize(log, 100, {"a": "a.txt"}) == {
        "loss": 0.5,
        "val": {"a": {"before": 3.0, "after": 2.0}, "b": {"before": 1.0, "after": 1.25}},
        "adaptation": {"a": -1.0},
        "forgetting": {"b": 0.25},
        "mri": {"a": {"before": [0.9], "after": [0.5]}},
        "seconds": 25.0,
        "tokens_per_second": 12.0,
    }
    assert list(MetricsLog(log.path, 0).rows()) == []


def test_the_routing_of_a_step() -> None:
    row = routing_row(np.array([[100, 100, 100, 100], [200, 199, 1, 0]]), 200)
    assert row["mri"] == [0.5, 1.0]
    assert row["entropy"][0] == pytest.approx(1.0)
    assert row["dead_experts"] == [[], [2, 3]]


@pytest.mark.parametrize("kinds", [[torch.float32], [torch.bfloat16, torch.float32, torch.uint8, torch.int64]])
def test_a_file_of_tensors_is_that_of_safetensors(tmp_path: Path, kinds: list[torch.dtype]) -> None:
    shapes: list[tuple[int, ...]] = [(), (7,), (3, 5), (0, 4), (2, 3, 4)]
    tensors = {
        f"{'zxa'[i % 3]}.{i}": (100 * torch.rand(shape)).to(kinds[i % len(kinds)]) for i, shape in enumerate(shapes * 2)
    }
    tensors["large"] = torch.arange(5 * 2**20, dtype=torch.float32)  # 20 MiB: several pieces
    ours = tmp_path / "ours.safetensors"
    with tensor_file.TensorFile(ours, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, lambda: None) as file:
        for name, tensor in tensors.items():  # in any order
            file.put(name, tensor)
        written = file.finish()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()
    assert written == digest(ours)
    with tensor_file.stored([ours]) as found:
        assert all(torch.equal(found[name].read(tensor), tensor) for name, tensor in tensors.items())


def one_number(whole: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str, torch.Tensor]]:
    yield "master", "a", whole["a"]


def run_alone(saver: Saver, tensor: torch.Tensor, folder: Path, begun: Event, going: Event) -> None:
    """Have a tensor written as soon as it may."""

    def write(put: Callable[[Path], object]) -> None:
        begun.set()
        while not going.wait(0.01):
            saver.go_on()
        put(folder)

    saver.save({"a": tensor}, [("a",)], one_number, write)


def written(folder: Path) -> list[float]:
    path = folder / "training_state" / "master.safetensors"
    return load_file(path)["a"].tolist() if path.exists() else []


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path) -> None:
    tensor = torch.zeros(2)
    going, folders = [Event(), Event()], [tmp_path / "0", tmp_path / "1"]
    with Saver(need=1) as saver:
        for step in range(2):
            tensor += 1
            run_alone(saver, tensor, folders[step], Event(), going[step])
            tensor += 1  # the update after it
            assert [*map(written, folders)] == [[1.0, 1.0] if step else [], []]  # not written, and nobody waits
            assert not saver.failed()
            going[step].set()  # the second copies wait for the first write
        saver.wait()
        assert [*map(written, folders)] == [[1.0, 1.0], [3.0, 3.0]]


@pytest.mark.parametrize("wait", [True, False])
def test_a_failed_write_is_an_error_of_the_run(wait: bool) -> None:
    def write(put: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), Saver(need=1) as saver:  # noqa: PT012
        saver.save({"a": torch.ones(1)}, [("a",)], one_number, write)
        while not (wait or saver.failed()):  # steps of training
            time.sleep(0.01)
        saver.wait()


def test_an_error_waits_for_the_write_and_a_signal_ends_it(tmp_path: Path) -> None:
    begun, going = Event(), Event()
    with pytest.raises(ConfigError), Saver(need=1) as saver:  # noqa: PT012
        run_alone(saver, torch.ones(1), tmp_path / "0", begun, going)
        Timer(0.1, going.set).start()
        raise ConfigError("the loss is nan")
    assert written(tmp_path / "0") == [1.0]
    begun, going = Event(), Event()
    with pytest.raises(KeyboardInterrupt), Saver(need=1) as saver:  # noqa: PT012
        run_alone(saver, torch.ones(1), tmp_path / "1", begun, going)
        begun.wait()
        raise KeyboardInterrupt
    assert written(tmp_path / "1") == []


def test_without_memory_for_a_copy_training_waits(tmp_path: Path) -> None:
    with Saver(need=10**18) as saver:
        saver.save({"a": torch.ones(2)}, [("a",)], one_number, lambda put: put(tmp_path))
        assert written(tmp_path) == [1.0, 1.0]
