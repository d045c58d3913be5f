"""`moetool grow` of a step folder: the optimizer's moments and fp32 weights go along."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetool.checkpoint.file_digest import digest
from tests import tiny
from tests.integration.test_grow import fails, grow, upcycled

STATE = "training_state"
SIZE = ("--seq-len", 16, "--global-batch-size", 4, "--val-fraction", 0, "--grad-clip", 0, "--warmup-steps", 0)
NEXT = ("--schedule", "constant", "--lr", 1e-3, "--weight-decay", 0, "--balance", "none", "--keep-optimizer")


def cpt(model: Path, out: Path, text: Path, steps: int, *more: object) -> Path:
    """Train; returns the last step folder."""
    code, _, err = tiny.in_process("cpt", model, out, "--train", f"a={text}", "--max-steps", steps, *SIZE, *more)
    assert code == 0, err
    return out / "checkpoints" / f"step-{steps:06d}"


def stored(folder: Path, kind: str = "optimizer") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted((folder / STATE).glob(f"{kind}*.safetensors")):
        found |= load_file(path)
    return found


def experts(found: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    """What has a row for each expert."""
    return {
        name: t
        for name, t in found.items()
        if ("mlp.experts." in name or "mlp.gate." in name) and name.endswith(ending)
    }


@pytest.fixture
def sigmoid(tmp_path: Path, jsonl: Path) -> Path:
    """A step folder of a GLM-4-MoE."""
    return cpt(tiny.save_glm4_moe(tmp_path / "moe"), tmp_path / "run", jsonl, 4, "--balance", "loss-free")


def test_the_first_update_of_sleeping_growth_is_that_without_it(sigmoid: Path, jsonl: Path, tmp_path: Path) -> None:
    document = grow(sigmoid, tmp_path / "grown", "--num-experts", 7, "--start", "sleeping")
    assert document["training_state"]
    before, grown = stored(sigmoid), stored(tmp_path / "grown")
    assert before.keys() == grown.keys()
    for name, wide in experts(grown, "exp_avg").items():
        assert torch.equal(wide[:4], before[name])
        assert not wide[4:].any()  # asleep: nothing moves them
        assert torch.equal(grown[f"{name}_sq"], before[f"{name}_sq"][[0, 1, 2, 3, 0, 1, 2]])
    assert {float(value) for name, value in grown.items() if name.endswith("/step")} == {4.0}
    same = [name for name in grown if not ("mlp.experts." in name or "mlp.gate." in name)]
    assert same
    assert all(torch.equal(grown[name], before[name]) for name in same)

    cpt(sigmoid, tmp_path / "a", jsonl, 1, *NEXT)
    cpt(tmp_path / "grown", tmp_path / "b", jsonl, 1, *NEXT)
    cpt(tmp_path / "grown", tmp_path / "fresh", jsonl, 1, *NEXT[:-1])
    start, one, two, fresh = (
        load_file(d / "model.safetensors") for d in (sigmoid, *(tmp_path / n for n in ("a", "b", "fresh")))
    )
    moved = 0.0
    for name, tensor in one.items():
        wide = two[name][: len(tensor)] if tensor.ndim else two[name]
        assert torch.allclose(wide, tensor, atol=1e-7, rtol=0), name
        moved = max(moved, float((tensor - start[name]).abs().max()))
    assert 3e-4 < moved < 3e-3  # about the learning rate: neither a reset count of updates nor reset moments
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    assert float((fresh[name.format(1)] - one[name.format(1)]).abs().max()) > 1e-4
    for copy, original in ((4, 0), (5, 1), (6, 2)):
        assert torch.equal(two[name.format(copy)], start[name.format(original)])
    assert tiny.in_process("verify", tmp_path / "grown")[0] == 0


def test_double_k_shares_the_gradient_out(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    step = cpt(mixtral, tmp_path / "run", jsonl, 4, "--balance", "none")
    grow(step, tmp_path / "grown", "--num-experts", 12)
    before, grown = stored(step), stored(tmp_path / "grown")
    for name, wide in experts(grown, "exp_avg").items():
        thrice, square = before[name].repeat(3, *[1] * (wide.ndim - 1)), before[f"{name}_sq"]
        assert torch.allclose(wide, thrice / 3, rtol=1e-6)
        assert torch.allclose(grown[f"{name}_sq"], square.repeat(3, *[1] * (wide.ndim - 1)) / 9, rtol=1e-6)
    cpt(step, tmp_path / "a", jsonl, 1, *NEXT)
    cpt(tmp_path / "grown", tmp_path / "b", jsonl, 1, *NEXT)
    start, one, two = (load_file(folder / "model.safetensors") for folder in (step, tmp_path / "a", tmp_path / "b"))
    for name, tensor in one.items():
        wide = two[name][4:8] if ".gate." in name else two[name]
        update = (tensor - start[name]).abs().mean()
        # AdamW's epsilon counts three times as much beside moments that are a third.
        assert float((wide - tensor).abs().mean()) < 1e-3 * float(update) + 1e-9, name
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    assert torch.allclose(two[name.format(9)], one[name.format(1)], atol=1e-5)


@pytest.mark.parametrize("family", ["ernie4_5_moe", "mixtral"])
def test_fp32_weights_beside_bf16_ones(family: str, jsonl: Path, tmp_path: Path) -> None:
    """ERNIE's selection bias is a parameter, so it is among the fp32 weights and has to sleep there, too."""
    moe = upcycled(family, tmp_path)
    tiny.save_tokenizer(moe)
    half = ("--precision", "bf16", "--save-dtype", "bfloat16")
    step = cpt(moe, tmp_path / "run", jsonl, 3, *half)
    start = "sleeping" if family == "ernie4_5_moe" else "twins"
    grow(step, tmp_path / "grown", "--num-experts", 8, "--start", start, "--max-shard-size", "60KB")
    before, grown = stored(step, "master"), stored(tmp_path / "grown", "master")
    assert before.keys() == grown.keys()
    model: dict[str, Tensor] = {}
    for path in (tmp_path / "grown").glob("*.safetensors"):
        model |= load_file(path)
    biases = 0
    for name, tensor in grown.items():
        if "mlp.experts." in name or "mlp.gate.weight" in name:
            assert torch.equal(tensor, before[name][[0, 1, 2, 3] * 2])
        elif "correction_bias" in name:
            saved = next(
                value for other, value in model.items() if name.split(".")[2] == other.split(".")[2] and "bias" in other
            )
            assert torch.equal(tensor.flatten(), saved.flatten())
            assert float(tensor.flatten()[4:].max()) < float(tensor.flatten()[:4].min()) - 0.9
            biases += 1
        else:
            assert torch.equal(tensor, before[name])
    assert biases == (2 if family == "ernie4_5_moe" else 0)
    if family == "mixtral":  # twins have all of their original's
        moments, old = stored(tmp_path / "grown"), stored(step)
        assert all(torch.equal(t, old[n][[0, 1, 2, 3] * 2]) for n, t in experts(moments, "exp_avg").items())
    done = cpt(tmp_path / "grown", tmp_path / "next", jsonl, 2, *half, *NEXT)
    assert {float(value) for name, value in stored(done).items() if name.endswith("/step")} == {5.0}


def test_moments_of_every_kind(mixtral: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(sys.prefix) / "optional"))
    pytest.importorskip("torchao", reason="make puts torchao into .venv/optional")
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    for kind in (["--moments", "bf16"], ["--precision", "bf16", "--no-master-weights"]):
        folder = tmp_path / kind[-1]
        step = cpt(mixtral, folder / "run", jsonl, 2, *kind)
        grow(step, folder / "grown", "--num-experts", 8, "--start", "double-k")
        before, grown = stored(step), stored(folder / "grown")
        for name, wide in experts(grown, "exp_avg").items():  # halves are exact in bf16
            assert torch.equal(wide, before[name].repeat(2, *[1] * (wide.ndim - 1)) / 2)
        cpt(folder / "grown", folder / "next", jsonl, 1, *kind, *NEXT)
    step = cpt(mixtral, tmp_path / "run", jsonl, 2, "--moments", "8bit")
    code, _, err = tiny.in_process("grow", step, tmp_path / "grown", "--num-experts", 8)
    assert (code, "blocks of 8 bits that may span experts" in " ".join(err.split())) == (0, True)
    assert not (tmp_path / "grown" / STATE).exists()
    assert tiny.in_process("verify", tmp_path / "grown")[0] == 0
    code, _, err = tiny.in_process(
        "cpt", tmp_path / "grown", tmp_path / "x", "--train", f"a={jsonl}", "--max-steps", 1, *NEXT
    )
    assert (code, "holds no optimizer state" in err) == (1, True)


def test_damage_is_one_line(sigmoid: Path, jsonl: Path, tmp_path: Path) -> None:
    grown, sleeping = tmp_path / "grown", ("--num-experts", 8, "--start", "sleeping")
    moments, state = sigmoid / STATE / "optimizer.safetensors", sigmoid / STATE / "state.json"
    good = load_file(moments)
    raw = bytearray(moments.read_bytes())
    raw[-3] ^= 1
    moments.write_bytes(raw)
    assert "optimizer.safetensors is damaged (its bytes have changed" in fails(sigmoid, grown, *sleeping)
    name = "model.layers.1.mlp.gate.weight/exp_avg"
    save_file(good | {name: torch.zeros(5, 32)}, moments)
    document = json.loads(state.read_text())
    document["files"][f"{STATE}/optimizer.safetensors"] = digest(moments)
    state.write_text(json.dumps(document))
    assert "has shape [5, 32], but the model has 4 experts" in fails(sigmoid, grown, *sleeping)
    moments.unlink()
    assert "optimizer.safetensors: no such file" in fails(sigmoid, grown, *sleeping)
    state.write_text(json.dumps(document | {"format": 1}))
    assert "was made by another version of moetool" in fails(sigmoid, grown, *sleeping)
    assert not grown.exists()
    shutil.rmtree(sigmoid / STATE)  # a step folder without it is a checkpoint
    assert not grow(sigmoid, grown, *sleeping)["training_state"]


def test_the_state_is_part_of_the_folder(sigmoid: Path, jsonl: Path, tmp_path: Path) -> None:
    """Repeated, replaced, verified and damaged like the rest."""
    grown, sleeping = tmp_path / "grown", ("--num-experts", 8, "--start", "sleeping")
    grow(sigmoid, grown, *sleeping)
    assert grow(sigmoid, grown, *sleeping)["already_finished"]
    assert grow(sigmoid, grown, "--num-experts", 6, "--start", "sleeping", "--overwrite")["num_experts"]["after"] == 6
    assert {len(t) for t in experts(stored(grown), "exp_avg").values()} == {6}
    moments = grown / STATE / "optimizer.safetensors"
    raw = bytearray(moments.read_bytes())
    raw[-3] ^= 1
    moments.write_bytes(raw)
    code, _, err = tiny.in_process("verify", grown)
    assert (code, "should be a copy" in " ".join(err.split())) == (1, True)
    run = ("cpt", grown, tmp_path / "x", "--train", f"a={jsonl}", "--max-steps", 1, *NEXT)
    code, _, err = tiny.in_process(*run)
    assert (code, "optimizer.safetensors is damaged" in err) == (1, True)
    # The folder of a run is none of grow's own: it is not deleted.
    code, _, err = tiny.in_process("grow", tmp_path / "moe", sigmoid, *sleeping, "--overwrite")
    assert (code, "also holds training_state" in " ".join(err.split())) == (1, True)
    assert (sigmoid / STATE / "state.json").exists()
    # Without its training state, the source is not the one that was grown.
    shutil.rmtree(sigmoid / STATE)
    code, _, err = tiny.in_process("verify", grown)
    assert (code, "has changed its training state since it was grown" in " ".join(err.split())) == (1, True)


def test_an_interrupted_growth_goes_on(sigmoid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grown, sleeping = tmp_path / "grown", ("--num-experts", 8, "--start", "sleeping", "--max-shard-size", "60KB")
    grow(sigmoid, tmp_path / "whole", *sleeping)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    with monkeypatch.context() as broken:
        broken.setattr("moetool.grow.plan.state_document", full)
        assert "no space left" in fails(sigmoid, grown, *sleeping)
    assert not (grown / "config.json").exists()
    assert (grown / STATE / "optimizer.safetensors").is_file()
    (grown / STATE / "optimizer.safetensors").unlink()  # of two kinds of files, one is left
    grow(sigmoid, grown, *sleeping)
    for path in sorted((tmp_path / "whole").rglob("*")):
        if path.is_file() and path.name != "moetool.yaml":
            assert path.read_bytes() == (grown / path.relative_to(tmp_path / "whole")).read_bytes(), path.name
