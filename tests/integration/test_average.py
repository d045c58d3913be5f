"""`moetool average`: the mean of checkpoints, from fp32 weights, rounded once, in any order, proven and resumed."""

from __future__ import annotations

import json
import shutil
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetool import registry
from moetool.average.plan import exact_tensors, rounded
from moetool.average.recipe import coefficients, parse_weights
from moetool.checkpoint.model import load_model
from moetool.checkpoint.step_folder import StepReader
from moetool.errors import ConfigError
from tests import tiny
from tests.integration.test_convert import SOURCE_OF, same, weights

STEPS = ("step-000001", "step-000002", "step-000003")


def average(*arguments: object) -> dict[str, Any]:
    return tiny.result("average", *arguments)


def fails(*arguments: object) -> str:
    return tiny.refusal("average", *arguments)


def train(model: Path, out: Path, text: Path, *more: object) -> Path:
    sizes = ("--seq-len", 16, "--global-batch-size", 4, "--max-steps", 3, "--save-every", 1, "--keep-checkpoints", 9)
    done = tiny.in_process(
        "cpt", model, out, "--train", f"a={text}", "--val-fraction", 0, *sizes, "--lr", "1e-2", *more
    )
    assert done[0] == 0, done[2]
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of an upcycled GLM-4-MoE (a selection bias, shared experts) in bf16, with loss-free balancing."""
    folder = tmp_path_factory.mktemp("average")
    dense = tiny.save_llama(folder / "dense", dtype=torch.bfloat16)
    text = tiny.save_jsonl(folder / "text.jsonl")
    done = tiny.in_process("upcycle", dense, folder / "moe", "--target", "glm4_moe", "--num-experts", 4)
    assert done[0] == 0, done[2]
    return train(folder / "moe", folder / "run", text, "--balance", "loss-free", "--precision", "bf16")


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / STEPS[number - 1]


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return load_model(folder).eval()(torch.arange(1, 25)[None]).logits  # type: ignore[no-any-return]


def test_of_one_checkpoint_it_is_the_checkpoint(run: Path, tmp_path: Path) -> None:
    document = average(tmp_path / "a", step(run, 2))
    assert document["checkpoints"][0]["fp32"]
    assert same(weights(tmp_path / "a"), weights(step(run, 2)))
    assert (tmp_path / "a" / "config.json").read_text() == (step(run, 2) / "config.json").read_text()


def test_of_two_it_is_half_their_sum_rounded_once(run: Path, tmp_path: Path) -> None:
    """By the names of the model's own parameters, from the fp32 weights that the run keeps."""
    average(tmp_path / "a", step(run, 1), step(run, 3))
    masters = [load_file(step(run, n) / "training_state" / "master.safetensors") for n in (1, 3)]
    found = load_model(tmp_path / "a").state_dict()
    biases = [name for name in found if name.endswith("e_score_correction_bias")]
    assert biases
    assert masters[0].keys() == found.keys() - set(biases)
    for name in masters[0]:
        one, two = (master[name].double() for master in masters)
        assert torch.equal(found[name], rounded((one + two) / 2, torch.bfloat16)), name
    stored = [weights(step(run, n)) for n in (1, 3)]
    for name in biases:
        assert found[name].dtype == torch.float32
        assert not torch.equal(stored[0][name], stored[1][name])
        assert torch.equal(found[name], (stored[0][name] + stored[1][name]) / 2)
    rounded_first = [
        one
        for one in masters[0]
        if not torch.equal(found[one], ((masters[0][one].bfloat16() + masters[1][one].bfloat16()) / 2))
    ]
    assert rounded_first  # the test can tell


def test_order_does_not_matter_and_weights_go_with_their_checkpoint(run: Path, tmp_path: Path) -> None:
    one, two, three = (step(run, n) for n in (1, 2, 3))
    made = [
        average(tmp_path / "a", one, two, three, "--weights", "0.5,0.3,0.2"),
        average(tmp_path / "b", three, one, two, "--weights", "2,5,3"),
    ]
    assert [entry["weight"] for entry in made[0]["checkpoints"]] == pytest.approx([0.5, 0.3, 0.2])
    assert [entry["weight"] for entry in made[1]["checkpoints"]] == pytest.approx([0.5, 0.3, 0.2])
    average(tmp_path / "c", one, two, three)
    average(tmp_path / "d", two, three, one)
    average(tmp_path / "e", run, "--weights", "mean")
    assert same(weights(tmp_path / "c"), weights(tmp_path / "d"))
    assert same(weights(tmp_path / "c"), weights(tmp_path / "e"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))
    shapes = [
        average(tmp_path / name, *order, "--weights", "minus-sqrt")
        for name, order in (("f", (one, two, three)), ("g", (three, two, one)))
    ]
    assert same(weights(tmp_path / "f"), weights(tmp_path / "g"))
    assert shapes[0]["checkpoints"] == shapes[1]["checkpoints"]
    assert (
        average(tmp_path / "h", run, "--last", 2)["checkpoints"] == average(tmp_path / "i", two, three)["checkpoints"]
    )
    assert same(weights(tmp_path / "h"), weights(tmp_path / "i"))


def test_coefficients_by_hand() -> None:
    # s = 1 - sqrt(x) at 0, 1/4, 2/4, 3/4: 1, 0.5, 0.2929, 0.1340; differences, and what is left for the last.
    assert coefficients("minus-sqrt", 4) == pytest.approx([0.5, 0.207107, 0.158919, 0.133975], abs=1e-6)
    assert coefficients("mean", 3) == (1.0, 1.0, 1.0)
    assert coefficients("2,6", 2) == (2.0, 6.0)
    for n in range(1, 40):
        assert sum(coefficients("minus-sqrt", n)) == pytest.approx(1)
        assert min(coefficients("minus-sqrt", n)) > 0
    assert parse_weights(" 0.50,3") == "0.5,3"
    for wrong in ("means", "1,", "1,0", "1,-2", "nan", "", "1,1e999"):
        with pytest.raises(ConfigError, match="numbers above 0"):
            parse_weights(wrong)


def test_fp64_is_rounded_once_where_torch_rounds_twice() -> None:
    # Just above the middle of two bf16 numbers, by less than fp32 shows: rounded to fp32 first, it is a tie.
    wide = torch.tensor(
        [1 + 2**-8 + 2**-40, 1 + 3 * 2**-8 - 2**-40, -(1 + 2**-8 + 2**-40), 0.0, 2.0], dtype=torch.float64
    )
    assert rounded(wide, torch.bfloat16).tolist() == [1 + 2**-7, 1 + 2**-7, -(1 + 2**-7), 0.0, 2.0]
    assert wide.bfloat16().tolist() != rounded(wide, torch.bfloat16).tolist()
    draw = torch.Generator().manual_seed(0)
    many = torch.randn(2000, generator=draw, dtype=torch.float64)
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        for value, found in zip(many.tolist(), rounded(many, dtype).double().tolist(), strict=True):
            exponent = Fraction(2) ** (torch.tensor(value).abs().log2().floor().int().item() - bits + 1)
            assert found == float(round(Fraction(value) / exponent) * exponent) or abs(value) < 1e-4


@pytest.mark.parametrize("family", registry.names("target"))
def test_fp32_weights_are_found_in_every_family(family: str, tmp_path: Path) -> None:
    dense, moe = tiny.save_dense(SOURCE_OF[family], tmp_path / "dense"), tmp_path / "moe"
    assert tiny.in_process("upcycle", dense, moe, "--target", family, "--num-experts", 4, "--verify", "none")[0] == 0
    parameters = {name: tensor.detach() + 1 for name, tensor in load_model(moe).named_parameters()}
    (moe / "training_state").mkdir()
    names = sorted(parameters)
    for number, part in enumerate((names[::2], names[1::2]), start=1):  # in one file or several
        save_file(
            {name: parameters[name] for name in part},
            moe / "training_state" / f"master-0000{number}-of-00002.safetensors",
        )
    average(tmp_path / "out", moe)
    before, after = load_model(moe).state_dict(), load_model(tmp_path / "out").state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name] + 1 if name in parameters or "lm_head" in name else before[name]), name
    with StepReader(moe) as reader:
        exact = exact_tensors(reader)
        assert all(
            info.shard.startswith("training_state/master") for name, info in exact.items() if not name.endswith("bias")
        )


def test_a_dense_run_and_what_the_lineage_says(llama: Path, jsonl: Path, tmp_path: Path) -> None:
    run = train(llama, tmp_path / "run", jsonl)
    document = average(tmp_path / "a", run, "--last", 2)
    assert [one["tokens"] for one in document["checkpoints"]] == [128, 192]
    found = [weights(step(run, n)) for n in (2, 3)]
    assert same(
        weights(tmp_path / "a"),
        {name: (found[0][name].double() + found[1][name].double()).div(2).float() for name in found[0]},
    )
    lineage = json.loads((tmp_path / "a" / "moetool.json").read_text())["lineage"]
    assert [entry["command"] for entry in lineage] == ["average"]
    assert [source["lineage"][0]["steps"] for source in (lineage[0]["source"], *lineage[0]["donors"])] == [2, 3]
    assert "average of 2" in tiny.in_process("inspect", tmp_path / "a")[1]
    assert tiny.in_process("verify", tmp_path / "a")[0] == 0


def test_it_can_be_verified_analysed_and_trained_on(run: Path, jsonl: Path, tmp_path: Path) -> None:
    average(tmp_path / "a", run, "--max-shard-size", "40KB", "--workers", 2)
    assert bool(torch.isfinite(logits(tmp_path / "a")).all())
    lineage = json.loads((tmp_path / "a" / "moetool.json").read_text())["lineage"]
    assert [entry["command"] for entry in lineage] == ["upcycle", "average"]  # what they have in common, once
    assert tiny.in_process("verify", tmp_path / "a")[0] == 0
    code, _, err = tiny.in_process(
        "analyze-routing", tmp_path / "a", "--data", f"a={jsonl}", "--out", tmp_path / "report"
    )
    assert code == 0, err
    more = train(tmp_path / "a", tmp_path / "more", jsonl, "--precision", "bf16")
    document = average(tmp_path / "b", step(more, 3), tmp_path / "a", "--weights", "minus-sqrt")
    assert [one["tokens"] for one in document["checkpoints"]] == [192, 384]
    assert [entry["command"] for entry in json.loads((tmp_path / "b" / "moetool.json").read_text())["lineage"]] == [
        "upcycle",
        "average",
        "average",
    ]
    master = step(run, 2) / "training_state" / "master.safetensors"
    whole = master.read_bytes()
    try:
        master.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert "is not the file that was averaged" in tiny.in_process("verify", tmp_path / "a")[2]
    finally:
        master.write_bytes(whole)


def test_checkpoints_of_different_models_are_refused(run: Path, llama: Path, mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = tmp_path / "moe"
    dense = tiny.save_llama(tmp_path / "dense", dtype=torch.bfloat16)
    assert tiny.in_process("upcycle", dense, other, "--target", "glm4_moe", "--num-experts", 4, "--seed", 1)[0] == 0
    assert "do not come from one upcycling" in fails(out, step(run, 1), other)
    assert "are different models: architectures" in fails(out, llama, mixtral)
    assert "do not correspond" in fails(out, step(run, 1), other, "--plan")
    assert "given twice" in fails(out, llama, llama)
    assert "does not say which were trained more" in fails(
        out, llama, tiny.save_llama(tmp_path / "b", 1), "--weights", "minus-sqrt"
    )
    assert "2 numbers, but there are 3 checkpoints" in fails(out, run, "--weights", "1,2")
    assert "has 3 step folders" in fails(out, run, "--last", 4)
    assert len(average(out, run / "checkpoints", "--last", 2, "--plan")["checkpoints"]) == 2
    assert "is not the folder of a run" in fails(out, llama, "--last", 1)
    longer = Path(shutil.copytree(llama, tmp_path / "longer"))
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}})
    )
    assert "rope_parameters" in fails(out, llama, longer)
    words = Path(shutil.copytree(llama, tmp_path / "words"))
    tiny.save_tokenizer(words, vocab_size=280)
    assert "different tokenizers" in fails(out, llama, words)
    half = tiny.save_llama(tmp_path / "half", dtype=torch.bfloat16)
    assert "is BF16 [300, 32] and F32 [300, 32]" in fails(out, llama, half)
    quantised = Path(shutil.copytree(llama, tmp_path / "quantised"))
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "quantised" in fails(out, quantised)
    bad = Path(shutil.copytree(llama, tmp_path / "bad"))
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    assert "NaN" in fails(out, llama, bad)
    assert not out.exists()


def test_runs_from_different_models_are_refused(jsonl: Path, tmp_path: Path) -> None:
    starts = [tiny.save_llama(tmp_path / str(seed), seed) for seed in range(2)]
    runs = [train(starts[n], tmp_path / f"run-{n}{name}", jsonl, *more) for n, name, more in (
        (0, "", ()), (0, "-other", ("--seed", 1)), (1, "", ()),
    )]  # fmt: skip
    assert "were trained from two models" in fails(tmp_path / "out", runs[0], runs[2])
    assert len(average(tmp_path / "out", runs[0], runs[1])["checkpoints"]) == 6
    damaged = tmp_path / "out" / "moetool.json"
    document = json.loads(damaged.read_text())
    document["lineage"][0]["source"]["lineage"] = [3]
    damaged.write_text(json.dumps(document))
    assert "has no lineage or a damaged one" in fails(tmp_path / "more", tmp_path / "out", runs[0])


def test_fp32_weights_that_do_not_fit_are_one_line(run: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(step(run, 1), tmp_path / "step"))
    master = source / "training_state" / "master.safetensors"
    tensors = load_file(master)
    save_file(tensors | {"model.more.weight": torch.ones(2)}, master)
    assert "model.more.weight, which its checkpoint does not hold" in fails(tmp_path / "out", source)
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, master)
    assert "model.norm.weight has shape [32], its fp32 weights [3]" in fails(tmp_path / "out", source)
    master.unlink()
    assert "has lost its fp32 weights" in fails(tmp_path / "out", source)
    shutil.rmtree(source / "training_state")
    assert average(tmp_path / "out", source)["checkpoints"][0]["fp32"] is False


def test_a_killed_average_is_finished_by_the_same_command(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 3000}
    sources = [tiny.save_llama(tmp_path / str(n), n, **sizes) for n in range(2)]
    command = ("average", tmp_path / "out", *sources, "--max-shard-size", "1MB", "--verify", "none", "--workers", 1)
    average(tmp_path / "whole", *sources, "--max-shard-size", "1MB")
    out = tmp_path / "out"
    complete = tiny.killed_while_writing(out, *command)
    assert "weights mean -> 1,2" in fails(out, *sources, "--max-shard-size", "1MB", "--weights", "1,2")
    assert tiny.in_process(*command)[0] == 0
    assert {name: (out / name).stat().st_ino for name in complete} == complete
    assert same(weights(out), weights(tmp_path / "whole"))
    assert tiny.in_process("verify", out)[0] == 0


def test_a_plan_writes_nothing(run: Path, tmp_path: Path) -> None:
    code, out, err = tiny.in_process("average", tmp_path / "out", run, "--plan")
    assert code == 0, err
    out = "".join(out.split())  # paths wrap
    assert out.count("x0.333") == 3
    assert "fp32weightsof3stepfolders" in out
    assert not (tmp_path / "out").exists()
    assert (
        Decimal(
            json.loads(tiny.in_process("average", tmp_path / "out", run, "--plan", "--json")[1])["checkpoints"][0][
                "weight"
            ]
        )
        > 0
    )
