"""`moetool cpt --fsdp --ep --tp --replicas`: any mesh trains as one process does, on CPU processes that talk by gloo.

A launch takes most of the time, so each runs several commands (tests/launched.py).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.integration.test_train_ddp import assert_alike, rows, unfinish
from tests.launched import ROOT, Done, environment, launch, launcher

pytestmark = pytest.mark.timeout(900)  # a loaded machine takes minutes for a launch of four processes
SIZE = ["--seq-len", 16, "--global-batch-size", 4, "--lr", 1e-3, "--val-fraction", 0.1]
# The load of a whole step is the same in every mesh only where each process runs one micro-batch of it.
STEP_LOAD = ["--balance", "global-aux", "--balance", "z-loss", "--balance", "loss-free=0.01"]


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_glm4_moe(tmp_path_factory.mktemp("glm") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", repeat=60)


def command(model: Path, out: Path, text: Path, *more: object, micro: int = 1, steps: int = 20) -> list[object]:
    length = ["--max-steps", steps, "--save-every", steps // 2, "--eval-every", steps // 2]
    return ["cpt", model, out, "--train", f"new={text}", *SIZE, "--micro-batch-size", micro, *length, *more]


def alone(*words: object) -> None:
    code, _, stderr = tiny.in_process(*words)
    assert code == 0, stderr


def right(each: list[Done]) -> None:
    for rank, done in enumerate(each):
        assert done.code == 0, done.stderr
        assert done.stderr == ""
        assert bool(done.stdout) == (rank == 0)  # one process speaks


def same_weights(one: Path, other: Path, moved: bool = True) -> None:
    ours, theirs = (
        {name: tensor for file in out.glob("model*.safetensors") for name, tensor in load_file(file).items()}
        for out in (one, other)
    )
    assert len(list(other.glob("model*.safetensors"))) == 1 or not (other / "model.safetensors").exists()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if name.endswith("e_score_correction_bias"):
            assert tensor.any() == (moved and one.name != "micro")  # which trains without loss-free
            assert torch.equal(tensor, theirs[name]), name
        assert torch.allclose(tensor, theirs[name], atol=1e-4, rtol=1e-2), name


@pytest.fixture(scope="module")
def ones(tmp_path_factory: pytest.TempPathFactory, glm: Path, text: Path) -> Path:
    """What one process computes: `step` with the load of whole steps, `micro` with that of micro-batches."""
    root = tmp_path_factory.mktemp("ones")
    alone(*command(glm, root / "step", text, *STEP_LOAD, micro=4))
    alone(*command(glm, root / "micro", text))
    return root


REFUSED: dict[str, list[object]] = {
    "--fsdp 3 x --tp 1 = 3 processes, but 2 were launched; --fsdp may be 1, 2": ["--fsdp", 3],
    "--ep 3 must be a multiple of --tp 1 and divide --fsdp x --tp = 2; it may be 1, 2": ["--fsdp", 2, "--ep", 3],
    "--tp 2 alone: transformers adds gradients": ["--tp", 2],
    "--moments 8bit: torchao's optimizers do not take shards": ["--fsdp", 2, "--moments", "8bit"],
    "--compile: exchanges between processes": ["--fsdp", 2, "--ep", 2, "--compile"],
    "--balance erc needs whole experts, which a mesh shards": ["--fsdp", 2, "--balance", "erc"],
}


def test_two_processes_train_as_one(tmp_path: Path, glm: Path, text: Path, ones: Path) -> None:
    on = unfinish(ones / "micro", tmp_path / "on", 10)  # saved by one process, continued by two
    both = ["--fsdp", 2, "--ep", 2]
    trained = [
        command(glm, tmp_path / "fsdp", text, *STEP_LOAD, "--fsdp", 2, micro=2),
        command(glm, tmp_path / "ep", text, *STEP_LOAD, *both, micro=2),
        command(glm, on, text, *both),
    ]
    # Routers alone, their coefficients following the loads of both processes; whole weights, then sharded ones.
    routers = ["--balance", "adaptive-aux=0.1", "--balance", "seq-aux=0.1", "--train-only", "routers", "--router-lr", 9]
    whole = [*routers, "--balance", "erc"]
    for name, words in (("whole", whole), ("shards", routers)):
        alone(*command(glm, tmp_path / f"one {name}", text, *words, steps=6))
        trained.append(command(glm, tmp_path / name, text, *words, *(["--fsdp", 2] * (name == "shards")), steps=6))
    refused = [command(glm, tmp_path / "refused", text, *options) for options in REFUSED.values()]
    done = launch(2, tmp_path, *trained, *refused)
    for each in (*done[:3], done[4]):
        right(each)
    assert [one.code for one in done[3]] == [0, 0]  # torch warns of an argument of accelerate's
    for name in ("whole", "shards"):
        assert_alike(tmp_path / f"one {name}", tmp_path / name)
        ours, theirs = (rows(tmp_path / run)[-2]["adaptive_aux"] for run in (f"one {name}", name))
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert max(ours) < 0.0999
        same_weights(tmp_path / f"one {name}", tmp_path / name, moved=False)
    assert "from step 10" in done[2][0].stdout
    for reason, each in zip(REFUSED, done[5:], strict=True):
        for one in each:
            assert one.code in (1, 2)
            assert reason in " ".join(one.stderr.replace("│", " ").split())
    assert not list((tmp_path / "refused").glob("*"))
    for name, reference in (("fsdp", "step"), ("ep", "step"), ("on", "micro")):
        assert_alike(ones / reference, tmp_path / name)
        same_weights(ones / reference, tmp_path / name)
    back = unfinish(on, tmp_path / "back", 10)  # saved before; continued by one process again
    alone(*command(glm, back, text))
    assert_alike(ones / "micro", back)


MESHES = {
    "fsdp-ep": (4, ["--fsdp", 4, "--ep", 2]),
    "fsdp-tp-ep": (2, ["--fsdp", 2, "--tp", 2, "--ep", 4]),
    "replicas-fsdp": (4, ["--fsdp", 2]),  # --replicas 2 follows
    "replicas-tp-ep": (2, ["--replicas", 2, "--tp", 2, "--ep", 2]),
}


@pytest.mark.slow
def test_four_processes_train_as_one(tmp_path: Path, glm: Path, text: Path, ones: Path) -> None:
    commands = {}
    for name, (reading, mesh) in MESHES.items():
        commands[f"step {name}"] = command(glm, tmp_path / f"step {name}", text, *STEP_LOAD, *mesh, micro=4 // reading)
        commands[f"micro {name}"] = command(glm, tmp_path / f"micro {name}", text, *mesh)
    for each in launch(4, tmp_path, *commands.values()):
        right(each)
    for name in commands:
        assert_alike(ones / name.split()[0], tmp_path / name)
        same_weights(ones / name.split()[0], tmp_path / name)


OTHERS: dict[str, tuple[str, list[object], float]] = {  # family, options, how near the losses are
    "sinkhorn": ("mixtral", ["--balance", "sinkhorn", "--balance", "z-loss", "--gradient-checkpointing"], 1e-5),
    "frozen": ("glm4_moe", ["--balance", "loss-free=0.01", "--freeze-router"], 1e-5),
    "routers": ("glm4_moe", ["--train-only", "routers", "--balance", "adaptive-aux", "--balance", "seq-aux"], 1e-5),
    "experts bf16": ("mixtral", ["--train-only", "experts", "--precision", "bf16", "--gradient-checkpointing"], 5e-3),
    "documents": ("mixtral", ["--no-cross-document", "--balance", "pooled-aux", "--deterministic"], 1e-5),
    "tied": ("mixtral-tied", [], 1e-5),
    "bf16": ("mixtral", ["--precision", "bf16", "--no-cross-document", "--gradient-checkpointing"], 5e-3),
    "bf16 tied": ("mixtral-tied", ["--precision", "bf16"], 5e-3),
}


@pytest.mark.slow
def test_every_option_works_in_a_mesh_as_without(tmp_path: Path, text: Path, glm: Path) -> None:
    models = {"glm4_moe": glm, "mixtral": tiny.save_mixtral(tmp_path / "mixtral")}
    models["mixtral-tied"] = tiny.save_mixtral(tmp_path / "tied-model", tie_word_embeddings=True)
    commands = {}
    for name, (family, options, _) in OTHERS.items():
        alone(*command(models[family], tmp_path / name, text, *options, steps=6))
        for size, mesh in {"fsdp": ["--fsdp", 2], "ep": ["--fsdp", 2, "--ep", 2]}.items():
            out = tmp_path / f"{name}-{size}"
            commands[f"{name}-{size}"] = command(models[family], out, text, *options, *mesh, steps=6)
    for each in launch(2, tmp_path, *commands.values()):
        right(each)
    for name in commands:
        assert_alike(tmp_path / name.rpartition("-")[0], tmp_path / name, OTHERS[name.rpartition("-")[0]][2])
    # Each process rounds the same weights to bf16 before the same products.
    ours, theirs = rows(tmp_path / "bf16"), rows(tmp_path / "bf16-fsdp")
    assert [row["loss"] for row in ours if "loss" in row] == [row["loss"] for row in theirs if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_and_the_same_command_resumes(
    tmp_path: Path, glm: Path, text: Path, ones: Path, rank: int
) -> None:
    out = tmp_path / "out"
    words = [str(word) for word in command(glm, out, text, "--fsdp", 2, "--ep", 2)]
    run = [*launcher(2, "moetool"), *words]
    with subprocess.Popen(
        run, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as all_:
        until = time.monotonic() + 200
        while time.monotonic() < until and not (out / "checkpoints" / "step-000010").exists():
            time.sleep(0.05)
        os.kill(_process(all_.pid, rank), signal.SIGKILL)
        assert all_.wait(timeout=120) != 0
    assert not (out / "summary.json").exists()
    done = subprocess.run(run, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "from step 10" in done.stdout
    assert_alike(ones / "micro", out)


def _process(launched: int, rank: int) -> int:
    """The process of a rank, a child of the launcher."""
    for child in Path(f"/proc/{launched}/task/{launched}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"rank {rank} is not there")


@pytest.mark.slow
def test_processes_of_different_commands_are_refused(tmp_path: Path, glm: Path, text: Path) -> None:
    script = tmp_path / "different.py"
    words = [str(word) for word in command(glm, tmp_path / "out", text, "--fsdp", 2)]
    script.write_text(
        f"import os\nfrom moetool.cli import run\nraise SystemExit(run([*{words!r}, '--seed', os.environ['RANK']]))\n"
    )
    launch_ = [*launcher(2, "moetool")[:-2], str(script)]
    run = subprocess.run(launch_, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode != 0
    assert "process 1 has other options or data than process 0: --seed (0 on process 0, 1 on process 1)" in run.stderr
    assert not list((tmp_path / "out").glob("*"))


def same_counts(ours: Any, theirs: Any, path: str = "") -> None:
    """Equal but for the rounding of sums of probabilities: `tp` adds up a router's inputs in another order."""
    assert type(ours) is type(theirs), path
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key in ours:
            same_counts(ours[key], theirs[key], f"{path}/{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), path
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            same_counts(one, other, f"{path}/{number}")
    else:
        assert theirs == (pytest.approx(ours, rel=1e-6) if isinstance(ours, float) else ours), path


def read(file: Path) -> Any:
    return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "meshes",
    [
        {"ep": ["--fsdp", 2, "--ep", 2], "tp": ["--tp", 2, "--ep", 2]},
        {"ep": ["--fsdp", 4, "--ep", 4], "tp": ["--fsdp", 2, "--tp", 2]},
    ],
    ids=["two", "four"],
)
def test_analysis_and_evaluation_of_a_shared_model_equal_those_of_one_process(
    tmp_path: Path, mixtral: Path, text: Path, meshes: dict[str, list[object]]
) -> None:
    asked = {
        "routes": ["--data", f"new={text}", "--max-tokens", 2000, "--seq-len", 64, "--compare", mixtral],
        "scores": ["--text", f"new={text}", "--limit", 8, "--routing"],
    }
    commands = {"routes": ["analyze-routing", mixtral, *asked["routes"]], "scores": ["eval", mixtral, *asked["scores"]]}
    for what, words in commands.items():
        alone(*words, "--out", tmp_path / what)
    processes = 4 if 4 in meshes["ep"] else 2
    shared = [
        [*words, "--out", tmp_path / f"{what}-{name}", *mesh]
        for name, mesh in meshes.items()
        for what, words in commands.items()
    ]
    for each in launch(processes, tmp_path, *shared):
        right(each)
        assert "for weights on cpu of each process (" in each[0].stdout
    scores = read(tmp_path / "scores" / "results.json")["moetool"]
    for name in meshes:
        ours, theirs = (read(tmp_path / folder / "report.json") for folder in ("routes", f"routes-{name}"))
        same_counts(ours["domains"], theirs["domains"])
        both = read(tmp_path / f"scores-{name}" / "results.json")["moetool"]
        assert scores["results"]
        for part in ("results", "routing"):
            same_counts(scores[part], both[part])


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.slow
def test_two_processes_keep_and_average_snapshots(tmp_path: Path, glm: Path, text: Path) -> None:
    """The last snapshot is the result, the average is the snapshots' mean, and its loss is what one process finds."""
    kept = [*STEP_LOAD, "--keep-weights", 2, "--average-last", 3]
    half: list[object] = ["--precision", "bf16"]
    meshes: dict[str, list[object]] = {"whole": half, "ep": ["--fsdp", 2, "--ep", 2], "half": ["--fsdp", 2, *half]}
    two = [command(glm, tmp_path / mesh, text, *kept, *more, micro=2, steps=6) for mesh, more in meshes.items()]
    for each in launch(2, tmp_path, *two):
        right(each)
    alone(*command(glm, tmp_path / "one", text, *kept, micro=4, steps=6))
    same_weights(tmp_path / "one" / "average", tmp_path / "ep" / "average")
    for mesh, more in meshes.items():
        out = tmp_path / mesh
        snapshots = [stored(out / "weights" / f"step-{step:06d}") for step in (2, 4, 6)]
        assert len(list((out / "weights").iterdir())) == 3
        assert len(list((out / "weights" / "step-000002").glob("model-*"))) == 2  # a file of each process
        last, average = stored(out), stored(out / "average")
        assert last.keys() == average.keys() == snapshots[-1].keys()
        for name, tensor in average.items():
            assert torch.equal(last[name], snapshots[-1][name])
            first, second, third = (one[name].double() for one in snapshots)
            assert torch.equal(tensor, ((first + second + third) / 3).to(tensor.dtype)), name
        copy = shutil.copytree(out / "average", tmp_path / f"{mesh}-average")
        precision = half if "bf16" in more else []
        alone(*command(copy, tmp_path / f"{mesh}-one", text, *STEP_LOAD, *precision, micro=4, steps=2))
        found, told = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / f"{mesh}-one", out))
        loss = told["average"]["val"]["new"]
        assert found["val"]["new"]["before"] == pytest.approx(loss, abs=1e-3 if precision else 1e-5)
        assert abs(told["val"]["new"]["after"] - loss) > 1e-3  # the test can tell
