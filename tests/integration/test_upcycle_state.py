"""`moetool upcycle --keep-optimizer`: AdamW's moments and the fp32 weights of a dense run go along."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetool import registry
from moetool.checkpoint.file_digest import digest
from moetool.checkpoint.model import load_model
from moetool.cost.parameters import is_selection_bias
from moetool.recipe import UpcycleRecipe
from moetool.train import resume
from moetool.train.config import TrainConfig
from moetool.train.optimizer import adamw
from moetool.units import permutation, redrawn_units
from tests import tiny
from tests.integration.test_convert import SOURCE_OF, weights
from tests.integration.test_grow_state import NEXT, STATE, cpt, stored

OPTIMIZER = f"{STATE}/optimizer.safetensors"
TOKENS = torch.randint(1, 300, (4, 16), generator=torch.Generator().manual_seed(1))


def upcycle(*arguments: object) -> dict[str, Any]:
    return tiny.result("upcycle", *arguments, "--keep-optimizer")


def fails(*arguments: object) -> str:
    return tiny.refusal("upcycle", *arguments, "--keep-optimizer")


def replaced(step: Path, tensors: dict[str, Tensor]) -> None:
    """Give a step folder another file of moments, and its digest."""
    save_file(tensors, step / OPTIMIZER)
    document = json.loads((step / STATE / "state.json").read_text())
    document["files"][OPTIMIZER] = digest(step / OPTIMIZER)
    (step / STATE / "state.json").write_text(json.dumps(document))


def gradients(folder: Path) -> dict[str, Tensor]:
    """Of the loss of some tokens, by the names of the model's parameters."""
    model = load_model(folder, "float32")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_selection_bias(name))
    model(TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def read_back(folder: Path) -> dict[str, Tensor]:
    """The optimizer's state as a run with --keep-optimizer reads it: everything must have its name and shape."""
    model = load_model(folder, "float32")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_selection_bias(name))
    resume.load_weights(folder, model, "-")
    parameters = dict(model.named_parameters())
    optimizer = adamw(parameters.values(), TrainConfig(model=folder, out=Path("o"), train={}))
    resume.load_moments(folder, parameters, optimizer, "-")
    trained = {name: optimizer.state[parameter] for name, parameter in parameters.items() if parameter.requires_grad}
    return {f"{name}/{moment}": value for name, state in trained.items() for moment, value in state.items()}


FINE = ("--granularity", 2, "--num-experts", 8, "--top-k", 4)  # groups of 2
BESIDE = ("--granularity", 4, "--shared-experts", 1, "--num-experts", 6, "--top-k", 3)  # a quarter shared, groups of 3
WHOLE = ("--shared-experts", 1, "--num-experts", 4, "--top-k", 2)  # half of the output each
CASES = [
    (family, layout)
    for family in registry.names("target")
    for layout in ([BESIDE, WHOLE] if registry.load("target", family).shared else [FINE])
]


@pytest.mark.parametrize(("family", "layout"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_moments_are_those_of_the_gradients_in_every_family(
    family: str, layout: tuple[object, ...], tmp_path: Path
) -> None:
    """The mean of a dense model's gradient is put in the place of its moments. What they become is held against the
    gradient of the Mixture of Experts on the same tokens, for which no formula is needed: copies of a unit get
    different tokens, but together all of them."""
    step = tiny.save_dense(SOURCE_OF[family], tmp_path / "step")
    (step / STATE).mkdir()
    state = {"format": 2, "step": 2, "master": False, "identity": {}, "files": {}}
    (step / STATE / "state.json").write_text(json.dumps(state))
    before = gradients(step)
    moments = {f"{name}/exp_avg": gradient for name, gradient in before.items()}
    moments |= {f"{name}/exp_avg_sq": gradient.square() for name, gradient in before.items()}
    moments |= {f"{name}/step": torch.tensor(2.0) for name in before}
    replaced(step, moments)

    document = upcycle(step, tmp_path / "moe", "--target", family, "--method", "copy", *layout)
    assert document["training_state_bytes"] > 2 * 4 * document["parameters"]["total"]
    found, after, spec = read_back(tmp_path / "moe"), gradients(tmp_path / "moe"), registry.load("target", family)
    E, K = (int(str(layout[layout.index(name) + 1])) for name in ("--num-experts", "--top-k"))
    group = 3 if layout is BESIDE else 2 if layout is FINE else 1
    new = 0
    for name, gradient in after.items():
        m, v, number = (found[f"{name}/{moment}"] for moment in ("exp_avg", "exp_avg_sq", "step"))
        if ".experts." in name:
            copies_m, copies_g = (t.unflatten(0, (E // group, group)) for t in (m, gradient))
            assert torch.equal(copies_m, copies_m[:1].expand_as(copies_m)), name
            near(copies_m.sum(0), copies_g.sum(0), name)
            near(v, m.square() * (E / K), name)  # c^2 / (E K) beside (c / E)^2
        elif float(number) == 0:  # new
            assert not m.any()
            assert not v.any()
            new += 1
            continue
        elif not spec.ties and name in ("model.embed_tokens.weight", "lm_head.weight"):
            pass  # both have the moments of one that was tied
        else:
            near(m, gradient, name)
            near(v, gradient.square(), name)
        assert float(number) == 2.0
    assert new >= 2  # the routers
    routers = [name for name in after if re.search(r"\.(gate|gate\.wg|router)\.weight$", name)]
    assert all(float(found[f"{name}/step"]) == 0 for name in routers)
    assert len(routers) == 2


def near(a: Tensor, b: Tensor, name: str) -> None:
    assert a.shape == b.shape, name
    if b.numel():
        assert float((a - b).abs().max()) <= 2e-4 * float(b.abs().max()) + 1e-12, name


def test_the_first_update_is_that_of_the_carried_moments(llama: Path, jsonl: Path, tmp_path: Path) -> None:
    """A fresh run's first moments are 0.1 and 0.05 of its gradient and the square; the carried ones add to that."""
    step, moe = cpt(llama, tmp_path / "run", jsonl, 3), tmp_path / "moe"
    document = upcycle(step, moe, "--num-experts", 4)
    assert document["redrawn_units"]["per_expert"] == 32
    assert document["proof"]["redrawn_units"] == 2 * 4 * 32  # those of the checkpoint, each once
    kept = cpt(moe, tmp_path / "kept", jsonl, 1, *NEXT)
    fresh = cpt(moe, tmp_path / "fresh", jsonl, 1, *NEXT[:-1])
    carried, after, begun = stored(moe), stored(kept), stored(fresh)
    assert carried.keys() == after.keys() == begun.keys()
    for name in after:
        if name.endswith("/exp_avg"):
            assert torch.allclose(after[name], 0.9 * carried[name] + begun[name], rtol=1e-5, atol=1e-9), name
        elif name.endswith("/exp_avg_sq"):
            assert torch.allclose(after[name], 0.95 * carried[name] + begun[name], rtol=1e-5, atol=1e-12), name
        else:
            assert (float(carried[name]), float(after[name])) == ((0, 1) if "mlp.gate" in name else (3, 4)), name
    # Weights move by what AdamW makes of these moments, not by what a fresh one does.
    name = "model.layers.1.mlp.experts.down_proj"
    m, v = after[f"{name}/exp_avg"] / (1 - 0.9**4), after[f"{name}/exp_avg_sq"] / (1 - 0.95**4)
    start, end = (dict(load_model(folder).named_parameters())[name] for folder in (moe, kept))
    assert torch.allclose(end, start - 1e-3 * m / (v.sqrt() + 1e-8), atol=1e-7)


def test_bf16_weights_are_the_fp32_ones_beside_them(llama: Path, jsonl: Path, tmp_path: Path) -> None:
    half = ("--precision", "bf16", "--save-dtype", "bfloat16")
    step, moe = cpt(llama, tmp_path / "run", jsonl, 3, *half), tmp_path / "moe"
    target = ("--target", "glm4_moe", "--granularity", 4, "--shared-experts", 1, "--num-experts", 6, "--top-k", 3)
    for options in (("--num-experts", 4), target):
        upcycle(step, moe, *options, "--overwrite")
        masters, model = stored(moe, "master"), load_model(moe, "bfloat16")
        assert masters.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            assert torch.equal(masters[name].bfloat16(), parameter), name
        carried = stored(step, "master")["model.norm.weight"]
        assert torch.equal(masters["model.norm.weight"], carried)
        assert not torch.equal(carried.bfloat16().float(), carried)
        done = cpt(moe, tmp_path / str(len(options)), jsonl, 1, *half, *NEXT)
        assert stored(done, "master").keys() == masters.keys()


@pytest.mark.parametrize("index", ["shared", "per-matrix"])
@pytest.mark.parametrize("ratio", ["0.5", "1"])
def test_redrawn_units_have_no_mean_and_the_square_of_kept_ones(
    llama: Path, jsonl: Path, tmp_path: Path, index: str, ratio: str
) -> None:
    step, moe = cpt(llama, tmp_path / "run", jsonl, 2), tmp_path / "moe"
    size = ("--num-experts", 4, "--top-k", 1, "--granularity", 1)
    upcycle(step, moe, *size, "--drop-ratio", ratio, "--drop-index", index)
    before, after = stored(step), stored(moe)
    recipe = UpcycleRecipe.from_json(json.loads((moe / "moetool.json").read_text())["lineage"][-1]["recipe"])
    both = "model.layers.1.mlp.experts.gate_up_proj"
    for expert in range(4):
        for number, projection in enumerate(("gate", "up", "down")):
            dense = f"model.layers.1.mlp.{projection}_proj.weight"
            m, v = (before[f"{dense}/{moment}"] for moment in ("exp_avg", "exp_avg_sq"))
            name = both if number < 2 else "model.layers.1.mlp.experts.down_proj"
            found_m, found_v = (after[f"{name}/{moment}"][expert] for moment in ("exp_avg", "exp_avg_sq"))
            if number < 2:
                found_m, found_v = (t[64 * number : 64 * (number + 1)] for t in (found_m, found_v))
            else:  # units are columns
                m, v, found_m, found_v = m.T, v.T, found_m.T, found_v.T
            order = permutation(recipe, 1, expert, 64)
            if order is not None:
                m, v = m[order], v[order]
            gone = torch.zeros(64, dtype=torch.bool)
            gone[redrawn_units(recipe, 1, expert, projection, 64)] = True
            assert int(gone.sum()) == (32 if ratio == "0.5" else 64)
            assert torch.equal(found_m[~gone], m[~gone] / 4)  # E = 4, K = 1, c = 1
            assert torch.equal(found_v[~gone], v[~gone] / 4)
            assert not found_m[gone].any()
            mean = v[~gone].double().mean() if ratio == "0.5" else v.double().mean()
            assert torch.allclose(found_v[gone].double(), mean / 4, rtol=1e-6)
    assert tiny.in_process("verify", moe)[0] == 0


def test_a_unit_with_noise_keeps_its_moments(llama: Path, jsonl: Path, tmp_path: Path) -> None:
    step, moe = cpt(llama, tmp_path / "run", jsonl, 2), tmp_path / "moe"
    upcycle(step, moe, "--num-experts", 4, "--method", "noise")
    before, after = stored(step), stored(moe)
    name, dense = "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(after[f"{name}/exp_avg"], (before[f"{dense}/exp_avg"] / 4).expand(4, -1, -1))
    assert torch.equal(after[f"{name}/exp_avg_sq"], (before[f"{dense}/exp_avg_sq"] / 8).expand(4, -1, -1))


def test_the_weights_are_those_without_the_option(llama: Path, jsonl: Path, tmp_path: Path) -> None:
    step = cpt(llama, tmp_path / "run", jsonl, 2)
    upcycle(step, tmp_path / "with")
    tiny.result("upcycle", step, tmp_path / "without")
    (with_, without) = (weights(tmp_path / name) for name in ("with", "without"))
    assert with_.keys() == without.keys()
    assert all(torch.equal(with_[name], without[name]) for name in with_)
    assert not (tmp_path / "without" / STATE).exists()
    entries = [json.loads((tmp_path / n / "moetool.json").read_text())["lineage"][-1] for n in ("with", "without")]
    assert entries[0].pop("training_state") is True
    assert entries[0]["source"].pop("sha256").keys() > entries[1]["source"].pop("sha256").keys()
    assert entries[0] == entries[1]


def test_fp32_weights_need_no_others_beside_them(llama: Path, jsonl: Path, tmp_path: Path) -> None:
    step = cpt(llama, tmp_path / "run", jsonl, 3, "--precision", "bf16", "--save-dtype", "bfloat16")
    upcycle(step, tmp_path / "wide", "--num-experts", 4, "--dtype", "fp32", "--method", "copy")
    assert not stored(tmp_path / "wide", "master")
    assert json.loads((tmp_path / "wide" / STATE / "state.json").read_text())["master"] is False
    master = stored(step, "master")
    for name, tensor in weights(tmp_path / "wide").items():  # made of them, not of the rounded ones
        if name in master:
            assert torch.equal(tensor, master[name]), name
    assert not stored(cpt(tmp_path / "wide", tmp_path / "next", jsonl, 1, *NEXT), "master")


def test_bf16_weights_of_an_fp32_run_have_fp32_ones_beside_them(llama: Path, jsonl: Path, tmp_path: Path) -> None:
    step = cpt(llama, tmp_path / "run", jsonl, 2)
    assert not stored(step, "master")
    upcycle(step, tmp_path / "moe", "--num-experts", 4, "--dtype", "bf16", "--method", "copy")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(stored(tmp_path / "moe", "master")[name], weights(step)[name])
    assert torch.equal(weights(tmp_path / "moe")[name], weights(step)[name].bfloat16())


def test_moments_of_every_kind(jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(sys.prefix) / "optional"))
    pytest.importorskip("torchao", reason="make puts torchao into .venv/optional")
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    llama = tiny.save_llama(tmp_path / "llama", intermediate_size=128)  # torchao keeps small tensors in fp32
    half = cpt(llama, tmp_path / "half", jsonl, 2, "--moments", "bf16")
    arguments = ("--num-experts", 4, "--method", "copy", "--keep-optimizer")
    code, _, err = tiny.in_process("upcycle", half, tmp_path / "moe", *arguments)
    assert (code, "are not all fp32 (cpt --moments bf16)" in " ".join(err.split())) == (0, True), err
    before, after = stored(half)["model.layers.1.mlp.down_proj.weight/exp_avg"], stored(tmp_path / "moe")
    assert before.dtype == torch.bfloat16
    assert torch.equal(after["model.layers.1.mlp.experts.down_proj/exp_avg"][2], before.float() / 4)
    cpt(tmp_path / "moe", tmp_path / "next", jsonl, 1, *NEXT)
    eight = cpt(llama, tmp_path / "eight", jsonl, 2, "--moments", "8bit")
    assert "are blocks of 8 bits (cpt --moments 8bit)" in fails(eight, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_cannot_go_along_is_one_line(llama: Path, jsonl: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    assert "holds no optimizer state (training_state/); give a step folder" in fails(llama, out)
    step = cpt(llama, tmp_path / "run", jsonl, 2)
    assert "say nothing about the gradients of a donor's experts" in fails(step, out, "--donor", llama)
    code, _, err = tiny.in_process("upcycle", step, out, "--method", "scratch", "--keep-optimizer")
    assert (code, "--keep-optimizer has no effect with --method scratch" in " ".join(err.split())) == (2, True)
    whole = (step / OPTIMIZER).read_bytes()
    middle = len(whole) // 2
    (step / OPTIMIZER).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert "optimizer.safetensors is damaged (its bytes have changed" in fails(step, out)
    (step / OPTIMIZER).write_bytes(whole)
    good, norm = load_file(step / OPTIMIZER), "model.norm.weight"
    replaced(step, good | {f"{norm}/exp_avg": torch.zeros(31)})
    assert f"{norm} is [31] in its training state, but [32] in the model" in fails(step, out)
    replaced(step, {name: tensor for name, tensor in good.items() if name != f"{norm}/exp_avg_sq"})
    assert f"{norm} is absent in its training state, but [32] in the model" in fails(step, out)
    replaced(step, good | {"model.other.weight/exp_avg": torch.zeros(3)})
    assert "model.other.weight is [3] in its training state, but absent in the model" in fails(step, out)
    replaced(step, good | {f"{norm}/momentum_buffer": torch.zeros(32)})
    assert "holds exp_avg, exp_avg_sq, momentum_buffer, step, but AdamW has" in fails(step, out)
    replaced(step, good | {f"{norm}/step": torch.tensor(7.0)})
    assert "not all tensors have had the same number of updates" in fails(step, out)
    replaced(step, good | {f"{norm}/exp_avg": torch.full((32,), float("nan"))})
    assert "holds NaN or infinity" in fails(step, out)
    assert not (out / "config.json").exists()
    replaced(step, good)
    (step / OPTIMIZER).unlink()
    assert "optimizer.safetensors: no such file" in fails(step, out)


def test_the_state_is_part_of_the_folder(llama: Path, jsonl: Path, tmp_path: Path) -> None:
    """Planned, repeated, replaced, verified and damaged like the rest."""
    step, moe = cpt(llama, tmp_path / "run", jsonl, 2), tmp_path / "moe"
    code, told, err = tiny.in_process("upcycle", step, moe, "--keep-optimizer", "--plan")
    assert (code, "moments kept for cpt --keep-optimizer" in " ".join(told.split())) == (0, True), err
    assert not moe.exists()
    upcycle(step, moe)
    assert upcycle(step, moe)["already_finished"]
    assert tiny.in_process("inspect", moe)[0] == 0
    assert "is a different finished checkpoint" in tiny.refusal("upcycle", step, moe)  # without the state
    whole = (moe / OPTIMIZER).read_bytes()
    tensors = load_file(moe / OPTIMIZER)
    recipe = UpcycleRecipe.from_json(json.loads((moe / "moetool.json").read_text())["lineage"][-1]["recipe"])
    unit = int(redrawn_units(recipe, 1, 3, "down", 64)[0])
    name = "model.layers.1.mlp.experts.down_proj"
    for moment, factor, message in (
        ("exp_avg", None, "should be a copy, but rows"),
        ("exp_avg_sq", 2.0, "standard errors apart"),
    ):
        changed = tensors[f"{name}/{moment}"].clone()
        changed[3, :, unit] = changed[3, :, unit] * factor if factor else 1e-3
        start = whole.index(tensors[f"{name}/{moment}"].numpy().tobytes())
        raw = changed.numpy().tobytes()
        (moe / OPTIMIZER).write_bytes(whole[:start] + raw + whole[start + len(raw) :])
        code, _, err = tiny.in_process("verify", moe)
        assert (code, message in " ".join(err.split())) == (1, True), err
    run = ("cpt", moe, tmp_path / "x", "--train", f"a={jsonl}", "--max-steps", 1, *NEXT)
    code, _, err = tiny.in_process(*run)
    assert (code, "optimizer.safetensors is damaged" in err) == (1, True)
    upcycle(step, moe, "--overwrite")
    assert (moe / OPTIMIZER).read_bytes() == whole
    # Without its training state, the source is not the one that was upcycled.
    shutil.rmtree(step / STATE)
    code, _, err = tiny.in_process("verify", moe)
    assert (code, "holds no optimizer state" in " ".join(err.split())) == (1, True)


def test_a_proof_fits_routers_to_the_fp32_weights_that_were_read(llama: Path, jsonl: Path, tmp_path: Path) -> None:
    half = ("--precision", "bf16", "--save-dtype", "bfloat16")
    step, moe = cpt(llama, tmp_path / "run", jsonl, 3, *half), tmp_path / "moe"
    text = ("--calibrate", f"a={jsonl}")
    upcycle(step, moe, "--router", "balanced", *text, "--seq-len", 32, "--drop-ratio", "0.25")
    code, out, err = tiny.in_process("verify", moe, *text, "--json")
    assert code == 0, err
    assert json.loads(out)["proof"]["load_difference"] == 0


def test_an_interrupted_upcycling_goes_on(
    llama: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, moe = cpt(llama, tmp_path / "run", jsonl, 2), tmp_path / "moe"
    small = ("--max-shard-size", "60KB", "--dtype", "bf16")
    upcycle(step, tmp_path / "whole", *small)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    with monkeypatch.context() as broken:
        broken.setattr("moetool.upcycle.plan.state_document", full)
        assert "no space left" in fails(step, moe, *small)
    assert not (moe / "config.json").exists()
    (moe / OPTIMIZER).unlink()  # of two kinds of files, one is left
    upcycle(step, moe, *small)
    for path in sorted((tmp_path / "whole").rglob("*")):
        if path.is_file() and path.name != "moetool.yaml":
            assert path.read_bytes() == (moe / path.relative_to(tmp_path / "whole")).read_bytes(), path.name
