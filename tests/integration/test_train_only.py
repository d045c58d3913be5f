"""`cpt --train-only` and `--router-lr`: what changes and what stays, and what is kept for it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moetool.train import state
from moetool.train.config import TrainConfig
from moetool.train.optimizer import adamw, set_rate
from tests import tiny

SMALL = ["--seq-len", 16, "--global-batch-size", 4, "--micro-batch-size", 2, "--lr", 1e-3, "--weight-decay", 1]
SMALL += ["--val-fraction", 0, "--quiet"]
BF16 = ["--precision", "bf16"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of fp32, which bf16 cannot hold, and of bf16."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "mixtral": tiny.save_mixtral(folder / "mixtral"),
        "glm4_moe": tiny.save_glm4_moe(folder / "glm4_moe"),  # a shared expert, and a dense layer
        "bf16": tiny.save_mixtral(folder / "bf16", dtype=torch.bfloat16),
        "top-1": tiny.save_mixtral(folder / "top-1", num_experts_per_tok=1),
    }


def cpt(model: Path, out: Path, text: Path, *more: object, steps: int = 2) -> tuple[int, str, str]:
    code, stdout, stderr = tiny.in_process(
        "cpt", model, out, "--train", f"new={text}", "--max-steps", steps, *SMALL, *more
    )
    return code, stdout, " ".join(stderr.replace("│", " ").split())


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def rows(out: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "mfu")} for row in read]


def of(kind: str, name: str) -> bool:
    """By the families' names on disk."""
    if kind == "routers":
        return name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight"))
    return any(part in name for part in (".experts.", ".shared_experts."))


@pytest.mark.parametrize(
    ("family", "kind", "more"),
    [
        ("mixtral", "routers", ["--gradient-checkpointing"]),
        ("mixtral", "routers", BF16),
        ("mixtral", "experts", [*BF16, "--gradient-checkpointing"]),
        ("glm4_moe", "experts", ["--balance", "loss-free"]),
        ("glm4_moe", "routers", [*BF16, "--balance", "loss-free", "--balance", "erc"]),
        ("bf16", "experts", BF16),
    ],
)
def test_only_what_is_trained_changes_and_has_moments(
    tmp_path: Path, models: dict[str, Path], jsonl: Path, family: str, kind: str, more: list[str]
) -> None:
    out, model = tmp_path / "out", models[family]
    code, _, stderr = cpt(model, out, jsonl, "--train-only", kind, *more)
    assert (code, stderr) == (0, "")
    before, after = weights(model), weights(out)
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    biases = {name for name in before if name.endswith("e_score_correction_bias")}
    assert changed == {name for name in before if of(kind, name)} | biases
    moments = load_file(out / "checkpoints/step-000002/training_state/optimizer.safetensors")
    assert {name.rpartition("/")[2] for name in moments} == {"exp_avg", "exp_avg_sq", "step"}
    assert all(of(kind, name.rpartition("/")[0]) for name in moments)
    assert len(moments) == 3 * {"routers": 2, "experts": 4 + 3 * (family == "glm4_moe") * 2}[kind]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("routers", ["--router-lr", 2]),
        ("experts", BF16),
        ("routers", [*BF16, "--no-master-weights", "--save-dtype", "bf16"]),
    ],
)
def test_a_resumed_run_goes_on_bit_for_bit(
    tmp_path: Path, models: dict[str, Path], jsonl: Path, kind: str, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--no-master-weights" in more:
        without_compiler(monkeypatch)
    out, arguments = tmp_path / "out", ["--train-only", kind, "--save-every", 2, *more]
    assert cpt(models["mixtral"], out, jsonl, *arguments, steps=4)[0] == 0
    whole, straight = weights(out), rows(out)
    shutil.rmtree(out / "checkpoints/step-000004")
    for name in ("config.json", "summary.json"):
        (out / name).unlink()
    state.claim(out)
    assert cpt(models["mixtral"], out, jsonl, *arguments, steps=4)[0] == 0
    assert rows(out) == straight
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(out).items())
    code, _, stderr = cpt(models["mixtral"], out, jsonl, steps=4)
    assert code == 1
    assert f"--train-only ({kind} before, everything now)" in stderr


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(sys.prefix) / "optional"))
    pytest.importorskip("torchao", reason="make puts torchao into .venv/optional")
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)


def test_moments_of_everything_serve_a_part_and_not_the_reverse(
    tmp_path: Path, models: dict[str, Path], jsonl: Path
) -> None:
    assert cpt(models["mixtral"], tmp_path / "all", jsonl)[0] == 0
    folder = tmp_path / "all/checkpoints/step-000002"
    code, _, stderr = cpt(folder, tmp_path / "part", jsonl, "--train-only", "routers", "--keep-optimizer")
    assert (code, stderr) == (0, "")
    part = tmp_path / "part/checkpoints/step-000002"
    code, _, stderr = cpt(part, tmp_path / "whole", jsonl, "--keep-optimizer")
    assert code == 1
    assert "holds nothing for" in stderr
    assert "that trained all that is trained now (--train-only, --freeze-router), or leave --keep-optimizer" in stderr
    grown = tiny.in_process("grow", part, tmp_path / "grown", "--num-experts", 8, "--quiet")
    assert grown[0] == 0, grown[2]
    code, _, stderr = cpt(tmp_path / "grown", tmp_path / "next", jsonl, "--train-only", "routers", "--keep-optimizer")
    assert (code, stderr) == (0, "")


@pytest.mark.parametrize("more", [[], BF16], ids=["fp32", "bf16"])
def test_the_routers_first_update_is_longer_by_the_factor(
    tmp_path: Path, models: dict[str, Path], jsonl: Path, more: list[str]
) -> None:
    """AdamW's first update is lr * g / (|g| + epsilon), so without decay it is proportional to the learning rate."""
    for factor in (1, 8):
        arguments = ["--router-lr", factor, "--weight-decay", 0, "--warmup-steps", 0, *more]
        assert cpt(models["mixtral"], tmp_path / str(factor), jsonl, *arguments, steps=1)[0] == 0
    before, one, eight = weights(models["mixtral"]), weights(tmp_path / "1"), weights(tmp_path / "8")
    for name, tensor in before.items():
        if of("routers", name):
            torch.testing.assert_close(eight[name] - tensor, 8 * (one[name] - tensor), rtol=1e-2, atol=1e-6)
        else:
            assert torch.equal(one[name], eight[name])
    assert rows(tmp_path / "1")[0]["lr"] == rows(tmp_path / "8")[0]["lr"]


@pytest.mark.parametrize(
    "moments", ["fp32", pytest.param("bf16", marks=pytest.mark.slow), pytest.param("8bit", marks=pytest.mark.slow)]
)
def test_groups_have_their_own_rate(moments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if moments != "fp32":
        without_compiler(monkeypatch)
    router, matrix, vector = (nn.Parameter(torch.ones(shape)) for shape in ((4, 64), (8, 64), (64,)))
    config = TrainConfig(Path("m"), Path("o"), {}, router_lr=0.5, moments=moments, weight_decay=0.0)  # type: ignore[arg-type]
    optimizer = adamw([router, matrix, vector], config, routers=[router])
    for parameter in (router, matrix, vector):
        parameter.grad = torch.full_like(parameter, 3.0)
    set_rate(optimizer, 0.25)
    optimizer.step()
    assert [float(p.detach().flatten()[0]) for p in (router, matrix, vector)] == pytest.approx([0.875, 0.75, 0.75])
    assert (
        len(adamw([router, matrix, vector], TrainConfig(Path("m"), Path("o"), {}), routers=[router]).param_groups) == 2
    )


@pytest.mark.parametrize(
    ("family", "more", "code", "message"),
    [
        ("mixtral", ["--train-only", "routers", "--freeze-router"], 2, "would train nothing"),
        (
            "mixtral",
            ["--train-only", "experts", "--freeze-router"],
            2,
            "--freeze-router has no effect with --train-only",
        ),
        (
            "mixtral",
            ["--train-only", "experts", "--router-lr", 2],
            2,
            "--router-lr has no effect with --train-only experts",
        ),
        ("mixtral", ["--freeze-router", "--router-lr", 2], 2, "--router-lr has no effect with --freeze-router"),
        ("mixtral", ["--router-lr", 0], 2, "a factor above 0 is needed"),
        (
            "mixtral",
            ["--train-only", "experts", "--balance", "adaptive-aux", "--balance", "seq-aux"],
            2,
            "--train-only experts: a frozen router does not learn from --balance seq-aux, adaptive-aux; only sinkhorn,",
        ),
        ("mixtral", ["--balance-end", 0.9], 2, "--balance-end has no effect without --balance loss-free"),
        ("llama", ["--train-only", "routers"], 1, "is a dense model without routers; leave it out"),
        ("llama", ["--train-only", "experts"], 1, "is a dense model without experts; leave it out"),
        ("llama", ["--router-lr", 2], 1, "--router-lr: "),
        ("top-1", ["--train-only", "routers", "--balance", "none"], 1, "nothing trains it"),
    ],
)
def test_what_contradicts_itself_is_one_line_and_leaves_nothing(
    tmp_path: Path, models: dict[str, Path], llama: Path, jsonl: Path, family: str, more: list[str], code: int,
    message: str,
) -> None:  # fmt: skip
    result = cpt({**models, "llama": llama}[family], tmp_path / "out", jsonl, *more)
    assert result[0] == code
    assert message in result[2]
    assert not (tmp_path / "out").exists()


def test_experts_alone_need_no_balance(tmp_path: Path, models: dict[str, Path], jsonl: Path) -> None:
    code, stdout, stderr = tiny.in_process(
        "cpt", models["top-1"], tmp_path / "out", "--train", f"new={jsonl}", "--max-steps", 1, *SMALL[:-1],
        "--train-only", "experts",
    )  # fmt: skip
    assert code == 0
    said = " ".join((stdout + stderr).split())
    assert "of which experts train (49.15 k)" in said  # 2 layers of 4 experts of 3 matrices of 32 x 64
    assert "gives the router no gradient" not in said
    assert rows(tmp_path / "out")[0]["balance"] == {}
