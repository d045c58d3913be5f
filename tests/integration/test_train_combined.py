"""Options of `moetool cpt` together: their states, longer runs, and what is made of step folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moetool.checkpoint.model import skeleton
from moetool.cost.operations import flops_per_token, router_gradient_flops
from moetool.cost.parameters import sizes_of
from tests import tiny

EVERYTHING = [
    "--seq-len", 16, "--global-batch-size", 4, "--micro-batch-size", 2, "--lr", 1e-3, "--schedule", "constant",
    "--warmup-steps", 0, "--keep-checkpoints", 9, "--precision", "bf16", "--no-cross-document", "--router-lr", 3,
    "--balance", "adaptive-aux", "--balance", "seq-aux", "--balance", "erc", "--router-gradient", "default",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A new text, and two old ones of which the second replaces the first; the new one is a single document."""
    root = tmp_path_factory.mktemp("texts")
    (root / "new.txt").write_text("One long text. " * 200)
    old, older = tiny.save_jsonl(root / "old.jsonl"), tiny.save_jsonl(root / "older.jsonl", ["Seen long before."], 60)
    texts = ["--train", f"new={root / 'new.txt'}", "--replay", f"old={old}", "--replay", f"older={older}"]
    return [*texts, "--weight", "old=1@0,0@1", "--weight", "older=0@0,1@1", "--replay-ratio", 0.5]


def cpt(model: Path, out: Path, *more: object) -> dict[str, Any]:
    code, stdout, stderr = tiny.in_process("cpt", model, out, *more, "--json")
    assert code == 0, stderr
    return json.loads(stdout)  # type: ignore[no-any-return]


def states(out: Path, step: int) -> dict[str, bytes]:
    folder = out / "checkpoints" / f"step-{step:06d}"
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_a_longer_and_a_resumed_run_with_everything(
    tmp_path: Path, mixtral: Path, llama: Path, texts: list[object]
) -> None:
    options = [*texts, *EVERYTHING, "--teacher", llama, "--save-every", 1]
    straight, out = tmp_path / "straight", tmp_path / "out"
    cpt(mixtral, straight, *options, "--max-steps", 3)
    cpt(mixtral, out, *options, "--max-steps", 2)
    assert cpt(mixtral, out, *options, "--max-steps", 3)["teacher"]["after"] > 0
    assert states(out, 3) == states(straight, 3)
    assert set(states(out, 3)) == {"balance.safetensors", "model.safetensors", "optimizer.safetensors"}
    shutil.rmtree(out / "checkpoints" / "step-000003")
    (out / "config.json").unlink()
    cpt(mixtral, out, *options, "--max-steps", 3, "--gradient-checkpointing")
    assert states(out, 3) == states(straight, 3)

    # What is made of such a step folder is proven, and has the moments; the states of balance are of its run alone.
    step = out / "checkpoints" / "step-000003"
    assert tiny.result("grow", step, tmp_path / "grown", "--num-experts", 8)["proof"]
    assert sorted(path.name for path in (tmp_path / "grown" / "training_state").iterdir()) == [
        "optimizer.safetensors",
        "state.json",
    ]
    assert tiny.result("average", tmp_path / "mean", out, "--last", 2)["proof"]
    next_run = [*texts, *EVERYTHING, "--teacher", step, "--max-steps", 2, "--keep-optimizer"]
    cpt(tmp_path / "grown", tmp_path / "next", *next_run)


def test_what_a_plan_adds_is_a_share_of_what_the_run_takes(
    tmp_path: Path, mixtral: Path, llama: Path, jsonl: Path
) -> None:
    size = ["--train", f"a={jsonl}", "--seq-len", 16, "--global-batch-size", 2, "--max-steps", 1]
    more = ["--teacher", llama, "--teacher-on", "all", "--router-gradient", "dense", "--train-only", "routers"]
    code, stdout, stderr = tiny.in_process("cpt", mixtral, tmp_path / "out", *size, *more)
    assert code == 0, stderr
    sizes, said = sizes_of(skeleton(mixtral)), " ".join(stdout.split())
    routers = {name for name in sizes.shapes if name.endswith("gate.weight")}
    alone = flops_per_token(sizes, 16, routers)
    assert f"router gradient dense: {router_gradient_flops(sizes, 'dense') / alone:.1%} more operations" in said
    assert f"temperature 1; {flops_per_token(sizes_of(skeleton(llama)), 16) / 3 / alone:.0%} more operations" in said
