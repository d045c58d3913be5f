"""`moetool cpt` from the command line to the checkpoint, on tiny models."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moetool.average.plan import rounded
from moetool.checkpoint.file_digest import digest
from moetool.checkpoint.folder import FolderLock
from moetool.checkpoint.model import load_model, skeleton
from moetool.cost.operations import flops_per_token
from moetool.cost.parameters import sizes_of
from moetool.errors import CheckpointError
from moetool.lineage import recorded_sources
from moetool.train import resume
from moetool.train.batches import mix, open_corpus
from moetool.train.config import TrainConfig
from tests import tiny
from tests.forked import Running, start, wait_until

SMALL = ["--seq-len", 16, "--global-batch-size", 4, "--micro-batch-size", 2, "--lr", 1e-3]


def cpt(model: Path, out: Path, text: Path, *more: object, steps: int = 4) -> tuple[int, str, str]:
    return tiny.in_process("cpt", model, out, "--train", f"new={text}", "--max-steps", steps, *SMALL, *more)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def untimed(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows(out)]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_leaves_a_stock_checkpoint(tmp_path: Path, jsonl: Path, family: str, dtype: torch.dtype) -> None:
    save = tiny.save_llama if family == "llama" else tiny.save_mixtral
    source, out = save(tmp_path / "source", dtype=dtype), tmp_path / "out"
    (source / "moetool.json").write_text(json.dumps({"format": 1, "lineage": [{"command": "upcycle"}]}))
    code, stdout, stderr = cpt(source, out, jsonl, "--json", "--quiet", "--save-every", 2)
    assert (code, stderr) == (0, "")

    for folder in (out, out / "checkpoints" / "step-000004"):
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert model.dtype == dtype
        with (
            safe_open(folder / "model.safetensors", "pt") as after,
            safe_open(source / "model.safetensors", "pt") as before,
        ):
            assert sorted(after.keys()) == sorted(before.keys())  # per expert, as published
    assert any(not torch.equal(value, weights(out)[name]) for name, value in weights(source).items())
    config = json.loads((out / "config.json").read_text())
    assert "output_router_logits" not in config
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    lineage = json.loads((out / "moetool.json").read_text())["lineage"]
    assert [entry["command"] for entry in lineage] == ["upcycle", "cpt"]
    assert lineage[1]["tokens"] == 4 * 4 * 16
    assert not (out / "moetool.partial.json").exists()

    document = json.loads(stdout)
    assert document["steps"] == 4
    assert document["tokens"] == 256
    assert document["ledger"]["new"]["tokens"] == 256
    assert set(document["val"]["new"]) == {"before", "after"}
    assert json.loads((out / "summary.json").read_text())["val"] == document["val"]
    training = [row for row in rows(out) if "loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3, 4]
    assert [row["num_tokens"] for row in training] == [64, 128, 192, 256]
    assert set(training[0]["balance"]) == ({"aux", "z-loss"} if family == "mixtral" else set())
    assert ("mri" in training[0]) == (family == "mixtral")
    if family == "mixtral":
        assert all(0.5 <= mri <= 1 for row in training for mri in row["mri"])
        assert all(row["balance"]["aux"] > 0.9 for row in training)
    state = out / "checkpoints" / "step-000004" / "training_state"
    names = {"optimizer.safetensors", "state.json"} | ({"master.safetensors"} if dtype == torch.bfloat16 else set())
    assert {path.name for path in state.iterdir()} == names


def test_the_first_loss_is_the_language_loss_of_the_first_batch(tmp_path: Path, mixtral: Path, jsonl: Path) -> None:
    out = tmp_path / "out"
    assert cpt(mixtral, out, jsonl, "--balance", "aux=5", "--val-fraction", 0, "--seed", 3, steps=1)[0] == 0
    config = TrainConfig(
        model=mixtral, out=out, train={"new": str(jsonl)}, val_fraction=0, max_steps=1, seq_len=16,
        global_batch_size=4, micro_batch_size=2, replay_ratio=0.0, seed=3,
    )  # fmt: skip
    mixture = mix(open_corpus(config, 300), config)
    tokens = torch.stack([torch.from_numpy(mixture.tokens(n)) for n in range(4)])
    with torch.no_grad():
        logits = load_model(mixtral, "float32")(input_ids=tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert rows(out)[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert not any("val" in row for row in rows(out))


def test_the_update_does_not_depend_on_micro_batches(tmp_path: Path, mixtral: Path, jsonl: Path) -> None:
    for size in (1, 4):
        args = ["--balance", "none", "--micro-batch-size", size, "--val-fraction", 0.2]
        assert cpt(mixtral, tmp_path / str(size), jsonl, *args, steps=3)[0] == 0
    for one, four in zip(rows(tmp_path / "1"), rows(tmp_path / "4"), strict=True):
        if "loss" in one:
            assert one["loss"] == pytest.approx(four["loss"], abs=1e-5)
            assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-4)
        else:
            assert one["val"]["new"] == pytest.approx(four["val"]["new"], abs=1e-5)


def test_replay_is_an_exact_share_and_is_validated(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    old = tiny.save_jsonl(tmp_path / "old.jsonl", ["Old text, seen before."])
    out = tmp_path / "out"
    code, stdout, _ = cpt(llama, out, jsonl, "--replay", f"old={old}", "--replay-ratio", 0.25, "--json")
    assert code == 0
    document = json.loads(stdout)
    assert document["ledger"]["old"]["tokens"] == 64
    assert set(document["val"]) == {"new", "old"}
    assert [row["step"] for row in rows(out) if "val" in row] == [0, 1, 2, 3, 4]


def test_a_validation_set_of_its_own(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    val = tiny.save_jsonl(tmp_path / "val.jsonl", ["Something else."], repeat=3)
    code, stdout, _ = cpt(llama, tmp_path / "out", jsonl, "--val", f"new={val}", "--val", f"more={val}", "--json")
    assert code == 0
    found = json.loads(stdout)["val"]
    assert set(found) == {"new", "more"}  # nothing is held out of the source that has one
    assert found["new"] == found["more"]


def test_options_that_define_the_run_may_not_change(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    out = tmp_path / "out"
    assert cpt(llama, out, jsonl)[0] == 0
    before = weights(out)
    code, _, stderr = cpt(llama, out, jsonl, "--lr", 5e-4, "--seed", 1)
    assert code == 1
    assert "--lr (0.001 before, 0.0005 now)" in stderr
    assert "--seed (0 before, 1 now)" in stderr
    assert "--no-resume" in stderr
    other = tiny.save_jsonl(tmp_path / "other.jsonl", ["Different."])
    code, _, stderr = cpt(llama, out, other)
    assert code == 1
    assert "--train new (other text)" in stderr

    code, stdout, stderr = cpt(llama, out, jsonl, "--save-every", 1, "--eval-every", 3, "--keep-checkpoints", 1)
    assert code == 0
    assert "already finished" in stdout
    assert all(torch.equal(value, before[name]) for name, value in weights(out).items())

    code, stdout, _ = cpt(llama, out, jsonl, "--lr", 5e-4, "--no-resume", "--json")
    assert code == 0
    assert json.loads(stdout)["already_finished"] is False
    assert any(not torch.equal(value, before[name]) for name, value in weights(out).items())


def test_a_refused_command_deletes_nothing(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    out = tmp_path / "out"
    assert cpt(llama, out, jsonl, "--save-every", 2)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for model, options, message in (
        (llama, ("--warmup-steps", 9), "9 warm-up steps do not fit"),
        (llama, ("--seq-len", 128, "--val-fraction", 0.99), "fewer than one window"),
        (llama, ("--replay", f"new={jsonl}"), "two sources are named 'new'"),
        (out / "checkpoints" / "step-000002", (), "is part of the run in"),
    ):
        code, _, stderr = cpt(model, out, jsonl, *options, "--no-resume")
        assert code == 1
        assert message in stderr
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_run_ends_without_its_metrics(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    out = tmp_path / "out"
    assert cpt(llama, out, jsonl)[0] == 0
    (out / "metrics.jsonl").unlink()
    (out / "config.json").unlink()
    (out / "moetool.partial.json").write_text(json.dumps({"command": "cpt"}))
    code, stdout, _ = cpt(llama, out, jsonl)
    assert code == 0
    assert "256 tokens; the checkpoint is" in " ".join(stdout.split())
    assert (out / "config.json").exists()


def test_another_model_under_the_same_path_is_noticed(tmp_path: Path, jsonl: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    tiny.save_llama(model, seed=1)
    assert cpt(model, out, jsonl, steps=1)[0] == 0
    tiny.save_llama(model, seed=2)
    code, _, stderr = cpt(model, out, jsonl, steps=1)
    assert code == 1
    assert "MODEL (other files)" in stderr


def test_a_step_folder_is_a_model(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    assert cpt(llama, tmp_path / "one", jsonl, steps=2)[0] == 0
    step = tmp_path / "one" / "checkpoints" / "step-000002"
    assert cpt(step, tmp_path / "two", jsonl, steps=2)[0] == 0
    assert rows(tmp_path / "one")[-1]["val"] == rows(tmp_path / "two")[0]["val"]
    assert len(json.loads((tmp_path / "two" / "moetool.json").read_text())["lineage"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either --max-tokens 2B or --max-steps 1000"),
        (
            ["--max-steps", 1, "--max-tokens", "1k"],
            "--max-tokens 1000 and --max-steps 1 both give the length of the run",
        ),
        (["--max-steps", 1, "--weight-decay", "inf"], "--weight-decay inf: a finite number is needed"),
        (["--max-steps", 1, "--weight", "0.5"], "--weight '0.5': expected NAME=W, such as --weight code=0.5"),
        (["--max-steps", 1, "--balance", "seq-aux=0"], "must be a number above 0, such as seq-aux=0.0001"),
        (["--max-tokens", "many"], "'many' is not a count"),
        (["--max-steps", 1, "--warmup-steps", 1, "--warmup-ratio", 0.1], "not both"),
        (
            ["--max-steps", 1, "--schedule", "constant", "--min-lr", 0.1],
            "--min-lr has no effect with --schedule constant",
        ),
        (["--max-steps", 1, "--constant-end", 0.5], "--constant-end has no effect with --schedule cosine"),
        (
            ["--max-steps", 1, "--schedule", "wsd", "--cooldown-end", 0.5],
            "--cooldown-end has no effect with --schedule wsd",
        ),
        (["--max-steps", 1, "--schedule", "cosin"], "did you mean 'cosine'"),
        (["--max-steps", 1, "--balance", "auxx"], "did you mean 'aux'"),
        (["--max-steps", 1, "--weight", "x=1"], "--weight x: no --train or --replay has that name"),
        (["--max-steps", 1, "--weight", "new=0"], "above 0"),
        (
            ["--max-steps", 1, "--weight", "new=2"],
            "--weight new has no effect, because there is no other source of its kind",
        ),
        (["--max-steps", 1, "--average-last", 2], "--average-last 2: give --keep-weights N"),
        (["--max-steps", 1, "--lr", 0], "--lr 0: a number above 0 is needed"),
        (["--max-steps", 1, "--lr", "inf"], "--lr inf: a number above 0 is needed"),
        (["--max-steps", 1, "--val", "new=x", "--val-fraction", 0.1], "--val-fraction has no effect"),
        (["--max-steps", 1, "--val-fraction", 0, "--eval-every", 2], "--eval-every has no effect: there is no --val"),
        (
            ["--max-steps", 1, "--schedule", "wsd", "--constant-end", 1, "--min-lr", 1e-5],
            "--min-lr has no effect with --constant-end 1",
        ),
        (["--max-steps", 1, "--global-batch-size", 6, "--micro-batch-size", 4], "--micro-batch-size may be 1, 2, 3, 6"),
    ],
)
def test_usage_mistakes(tmp_path: Path, llama: Path, jsonl: Path, options: list[object], message: str) -> None:
    code, _, stderr = tiny.in_process("cpt", llama, tmp_path / "out", "--train", f"new={jsonl}", *options)
    assert code == 2
    assert message in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--balance", "aux"], "is a dense model without a router"),
        (["--seq-len", 999], "the model has only 128 positions"),
        (["--warmup-steps", 9], "9 warm-up steps do not fit into 4 steps"),
        (["--train", "more=absent.txt"], "absent.txt"),
        (["--replay-ratio", 0.5], "--replay"),
        (["--liger"], "--liger: liger-kernel's kernels need a GPU, but this run is on cpu; leave it out"),
        (["--experts-implementation", "eager"], "a llama has no experts; leave it out"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path, llama: Path, jsonl: Path, options: list[object], message: str
) -> None:
    code, _, stderr = cpt(llama, tmp_path / "out", jsonl, *options)
    assert code == 1
    assert message in stderr
    assert len(stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_out_must_be_free(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("my only copy")
    for out in (foreign, llama, llama / "out"):
        for option in ("--resume", "--no-resume"):
            code, _, stderr = cpt(llama, out, jsonl, option)
            assert code == 1
            assert "choose another OUT" in stderr
    assert (foreign / "thesis.txt").read_text() == "my only copy"


def test_a_second_process_is_refused(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    out = tmp_path / "out"
    assert cpt(llama, out, jsonl, steps=1)[0] == 0
    with FolderLock(out):
        code, _, stderr = cpt(llama, out, jsonl, steps=1)
    assert code == 1
    assert "being written by another process" in stderr


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    out = tmp_path / "out"
    bad = ["--lr", 1e30, "--schedule", "constant", "--warmup-steps", 0, "--save-every", 4]
    code, _, stderr = cpt(llama, out, jsonl, *bad)
    assert code == 1
    assert (
        "at step 2; stopped before the update, no checkpoint is saved. Lower --lr or --grad-clip and run it again"
        in stderr
    )
    assert not (out / "checkpoints").exists()
    assert [row["step"] for row in rows(out) if "loss" in row] == [1]
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("save_every", [1, 2])
def test_a_model_that_an_update_ruined_is_not_saved(
    tmp_path: Path, llama: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch, save_every: int
) -> None:
    """Its weights may be finite: the first loss that is not comes an update later."""

    def ruinous(step: int, total_steps: int, *, lr: float, warmup_steps: int) -> float:
        return 1e30 if step == 2 else lr

    monkeypatch.setattr("moetool.train.schedules.constant", ruinous)
    out = tmp_path / "out"
    more = ["--schedule", "constant", "--save-every", save_every]
    code, _, stderr = cpt(llama, out, jsonl, *more)
    assert code == 1
    assert "at step 4; stopped before the update, the last good checkpoint is" in stderr
    assert (
        "step-000002. Lower --lr or --grad-clip and start a run in another OUT (MODEL may be that checkpoint)" in stderr
    )
    assert sorted(path.name for path in (out / "checkpoints").iterdir())[-1] == "step-000002"
    assert load_model(out / "checkpoints" / "step-000002")


def test_a_damaged_newest_checkpoint_is_not_gone_on_from(tmp_path: Path, mixtral: Path, jsonl: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert cpt(mixtral, one, jsonl, "--save-every", 1, "--keep-checkpoints", 3)[0] == 0
    shutil.copytree(one, two)
    for name in ("config.json", "summary.json"):
        (two / name).unlink()
    (two / "moetool.partial.json").write_text('{"command": "cpt"}')
    steps = two / "checkpoints"
    shutil.rmtree(steps / "step-000004")
    moments = steps / "step-000003" / "training_state" / "optimizer.safetensors"
    moments.write_bytes(moments.read_bytes()[:-9])
    code, _, stderr = cpt(mixtral, two, jsonl, "--save-every", 1, "--keep-checkpoints", 3)
    assert code == 0
    assert stderr.replace("\n", " ").startswith(
        f"warning: {moments} is damaged (its bytes have changed since it was written); continuing from step 2"
    )
    assert untimed(two) == untimed(one)
    assert all(torch.equal(value, weights(one)[name]) for name, value in weights(two).items())
    assert sorted(path.name for path in steps.iterdir()) == ["step-000002", "step-000003", "step-000004"]


def test_a_full_disk_leaves_the_earlier_checkpoint(
    tmp_path: Path, mixtral: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, out = tmp_path / "one", tmp_path / "out"
    assert cpt(mixtral, one, jsonl, "--save-every", 2)[0] == 0
    written = resume.save

    def full(folder: Path, digests: Any, master: bool, step: int, *more: Any) -> None:
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(folder, digests, master, step, *more)

    with monkeypatch.context() as patched:
        patched.setattr("moetool.train.resume.save", full)
        code, _, stderr = cpt(mixtral, out, jsonl, "--save-every", 2)
    assert code == 1
    assert "space" in stderr
    assert "run the same command again" in stderr
    assert len(stderr.splitlines()) == 1
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    assert cpt(mixtral, out, jsonl, "--save-every", 2)[0] == 0
    assert untimed(out) == untimed(one)


def test_going_on_with_the_optimizer_of_another_run(tmp_path: Path, llama: Path) -> None:
    """Every window of the text is the same, so two runs in a row see what one does."""
    text = tmp_path / "same.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(llama)
    document = tokenizer.decode(tokenizer("A router sends each token to a few experts; the load")["input_ids"][:15])
    assert len(tokenizer(document)["input_ids"]) == 15
    text.write_text((json.dumps({"text": document}) + "\n") * 40)
    steady = [
        "--schedule",
        "infinite",
        "--cooldown-end",
        0,
        "--constant-end",
        1,
        "--warmup-steps",
        0,
        "--val-fraction",
        0,
    ]
    whole, first, second, fresh = (tmp_path / name for name in ("whole", "first", "second", "fresh"))
    assert cpt(llama, whole, text, *steady, steps=6)[0] == 0
    assert cpt(llama, first, text, *steady, steps=4)[0] == 0
    step = first / "checkpoints" / "step-000004"
    assert cpt(step, second, text, *steady, "--keep-optimizer", steps=2)[0] == 0
    assert cpt(step, fresh, text, *steady, steps=2)[0] == 0
    losses = [[row["loss"] for row in rows(out) if "loss" in row] for out in (whole, second, fresh)]
    assert losses[1] == losses[0][4:]
    assert losses[2][0] == losses[0][4]
    assert losses[2][1] != losses[0][5]
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(second).items())
    moments = [
        load_file(out / "checkpoints" / step / "training_state" / "optimizer.safetensors")
        for out, step in ((second, "step-000002"), (fresh, "step-000002"))
    ]
    assert [moment["lm_head.weight/step"].item() for moment in moments] == [6.0, 2.0]


def test_an_optimizer_that_is_not_there_or_does_not_fit(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    code, _, stderr = cpt(llama, tmp_path / "out", jsonl, "--keep-optimizer")
    assert code == 1
    assert "holds no optimizer state" in stderr
    assert len(stderr.splitlines()) == 1
    assert cpt(llama, tmp_path / "run", jsonl, steps=1)[0] == 0
    step = tmp_path / "run" / "checkpoints" / "step-000001"
    moments = step / "training_state" / "optimizer.safetensors"
    stored = load_file(moments)
    save_file(stored | {"lm_head.weight/exp_avg": torch.zeros(3)}, moments)
    code, _, stderr = cpt(step, tmp_path / "out", jsonl, "--keep-optimizer")
    assert code == 1
    assert "optimizer.safetensors is damaged (its bytes have changed since it was written)" in stderr
    assert "leave the option out" in stderr
    assert len(stderr.splitlines()) == 1
    # Another step's, whole in itself, but of another model.
    save_file({**stored, "lm_head.weight/exp_avg": torch.zeros(3)}, moments)
    state = json.loads((step / "training_state" / "state.json").read_text())
    state["files"]["training_state/optimizer.safetensors"] = digest(moments)
    (step / "training_state" / "state.json").write_text(json.dumps(state))
    code, _, stderr = cpt(step, tmp_path / "out", jsonl, "--keep-optimizer")
    assert code == 1
    assert "lm_head.weight has shape [3], the model's [300, 32]" in stderr
    assert len(stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_top_1_with_weights_divided_by_their_sum_is_warned_of(tmp_path: Path, jsonl: Path) -> None:
    model = tiny.save_mixtral(tmp_path / "model", num_experts_per_tok=1)
    code, _, stderr = cpt(model, tmp_path / "out", jsonl, steps=1)
    assert code == 0
    assert "the language loss gives the router no gradient" in stderr


@pytest.mark.parametrize("sizes", [{"hidden_size": 36, "intermediate_size": 30}, {"intermediate_size": 31}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_expert_sizes_that_are_no_multiple_of_16_bytes(
    tmp_path: Path, jsonl: Path, sizes: dict[str, Any], precision: str
) -> None:
    model = tiny.save_mixtral(tmp_path / "model", num_attention_heads=2, num_key_value_heads=1, **sizes)
    code, _, stderr = cpt(model, tmp_path / "out", jsonl, "--precision", precision, "--quiet", steps=1)
    assert (code, stderr) == (0, "")


def test_memory_is_told_before_anything_is_loaded(
    tmp_path: Path, mixtral: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, stdout, _ = cpt(mixtral, tmp_path / "one", jsonl, "--json", "--quiet", steps=1)
    assert code == 0
    memory = json.loads(stdout)["memory"]
    assert memory["weights"] == 4 * 74912
    assert memory["total"] == sum(value for name, value in memory.items() if name != "total")

    def fail(*_: Any) -> None:
        raise CheckpointError("too large")

    monkeypatch.setattr("moetool.train.build.load_model", fail)
    code, stdout, stderr = cpt(mixtral, tmp_path / "out", jsonl, steps=1)
    assert code == 1
    assert "memory about" in stdout
    assert stderr == "moetool: too large\n"
    assert not (tmp_path / "out").exists()


def test_model_flop_utilisation(tmp_path: Path, llama: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetool.cost.devices.peak_flops", lambda device, precision: 1e9)
    assert cpt(llama, tmp_path / "out", jsonl, steps=1)[0] == 0
    row = next(row for row in rows(tmp_path / "out") if "loss" in row)
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops_per_token(sizes_of(skeleton(llama)), 16) / 1e9)


def test_trackers(tmp_path: Path, mixtral: Path, jsonl: Path) -> None:
    """A stand-in for wandb notes what it is told; accelerate finds it by its metadata."""
    site, told = tmp_path / "site", tmp_path / "told.jsonl"
    (site / "wandb").mkdir(parents=True)
    (site / "wandb-9.0.dist-info").mkdir()
    (site / "wandb-9.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 9.0\n")
    (site / "wandb" / "__init__.py").write_text(f"""import json
def tell(**what):
    with open({str(told)!r}, "a") as file:
        file.write(json.dumps(what) + "\\n")
class config:
    update = staticmethod(lambda values, **_: tell(config=values))
class Run:
    log = staticmethod(lambda values, step: tell(step=step, values=values))
    finish = staticmethod(lambda: tell(finished=True))
init = lambda project: (tell(project=project), Run)[1]
""")
    out = tmp_path / "out"
    more = ["--max-steps", 2, "--val-fraction", 0.1, *SMALL, "--log-with", "wandb"]
    done = tiny.cli("cpt", mixtral, out, "--train", f"new={jsonl}", *more, env={"PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    notes = [json.loads(line) for line in told.read_text().splitlines()]
    assert notes[0] == {"project": "moetool"}
    assert notes[1]["config"]["lr"] == "0.001"
    assert notes[-1] == {"finished": True}
    logged = [note for note in notes if "step" in note]
    assert [note["step"] for note in logged] == [row["step"] for row in rows(out)]
    for note, row in zip(logged, rows(out), strict=True):
        if "loss" in row:
            assert note["values"]["train/loss"] == row["loss"]
            assert note["values"]["train/mri"] == max(row["mri"])
            assert note["values"]["balance/aux"] == row["balance"]["aux"]
        else:
            assert note["values"]["val/new"] == row["val"]["new"]
            assert note["values"]["entropy/new"] == min(row["routing"]["new"]["entropy"])


def test_a_tracker_that_is_not_there(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    code, _, stderr = cpt(llama, tmp_path / "out", jsonl, "--log-with", "swanlab")
    assert code == 1
    assert stderr == "moetool: --log-with swanlab: that package is not installed; run pip install swanlab\n"
    code, _, stderr = cpt(llama, tmp_path / "out", jsonl, "--log-with", "wandbb")
    assert code == 2
    assert "did you mean 'wandb'" in stderr


def test_snapshots_are_weights_alone_and_none_is_deleted(tmp_path: Path, jsonl: Path) -> None:
    model, out = tiny.save_mixtral(tmp_path / "model", dtype=torch.bfloat16), tmp_path / "out"
    (model / "moetool.json").write_text(json.dumps({"format": 1, "lineage": [{"command": "upcycle"}]}))
    options = ["--keep-weights", 2, "--save-every", 2, "--keep-checkpoints", 1]
    assert cpt(model, out, jsonl, *options, "--eval-every", 7, steps=7)[0] == 0
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000007"]
    snapshots = sorted((out / "weights").iterdir())
    assert [path.name for path in snapshots] == ["step-000002", "step-000004", "step-000006"]
    assert (
        cpt(model, tmp_path / "without", jsonl, "--eval-every", 7, "--save-every", 2, "--keep-checkpoints", 4, steps=7)[
            0
        ]
        == 0
    )
    for snapshot in snapshots:
        step = tmp_path / "without" / "checkpoints" / snapshot.name
        files = {path.name for path in step.iterdir()} - {"training_state"}
        assert {path.name for path in snapshot.iterdir()} == files
        assert (snapshot / "model.safetensors").read_bytes() == (step / "model.safetensors").read_bytes()
        lineage, other = (json.loads((folder / "moetool.json").read_text())["lineage"] for folder in (snapshot, step))
        assert lineage[-1]["tokens"] == other[-1]["tokens"] == int(snapshot.name[-1]) * 4 * 16
        load_model(snapshot)
    assert untimed(out) == untimed(tmp_path / "without")  # keeping them changes nothing
    assert weights(out).keys() == weights(tmp_path / "without").keys()
    assert all(torch.equal(value, weights(tmp_path / "without")[name]) for name, value in weights(out).items())
    code, _, stderr = cpt(model, out, jsonl, *options, "--lr", 5e-4, "--no-resume", "--eval-every", 3, steps=3)
    assert code == 0, stderr
    assert [path.name for path in (out / "weights").iterdir()] == ["step-000002"]


def mean_of(snapshots: list[Path]) -> dict[str, torch.Tensor]:
    stored = [weights(folder) for folder in snapshots]
    return {
        name: rounded(torch.stack([one[name].double() for one in stored]).sum(0) / len(stored), stored[0][name].dtype)
        for name in stored[0]
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_average_of_the_last_snapshots_lies_beside_the_last_model(
    tmp_path: Path, jsonl: Path, precision: str
) -> None:
    model, out = tiny.save_mixtral(tmp_path / "model", dtype=torch.bfloat16), tmp_path / "out"
    options = ["--precision", precision, "--keep-weights", 2, "--average-last", 2, "--val-fraction", 0.2, "--lr", 1e-2]
    code, stdout, stderr = cpt(model, out, jsonl, *options, "--json", "--quiet", steps=7)
    assert (code, stderr) == (0, "")
    snapshots = sorted((out / "weights").iterdir())[-2:]
    mean, found = mean_of(snapshots), weights(out / "average")
    assert found.keys() == mean.keys()
    assert all(torch.equal(found[name], mean[name]) for name in mean)
    assert any(not torch.equal(found[name], weights(out)[name]) for name in mean)
    lineage = json.loads((out / "average" / "moetool.json").read_text())["lineage"]
    assert lineage[-1]["command"] == "average"
    assert len(recorded_sources(lineage[-1])) == 2
    assert tiny.in_process("verify", out / "average")[0] == 0
    summary = json.loads((out / "summary.json").read_text())
    told = summary["average"]
    assert told == json.loads(stdout)["average"]
    assert told["steps"] == [4, 6]
    # A run that starts from the average measures the same before its first step.
    again = tmp_path / "again"
    copy = shutil.copytree(out / "average", tmp_path / "average")  # a run may not start from a part of another
    assert cpt(copy, again, jsonl, *options[:2], "--val-fraction", 0.2, steps=1)[0] == 0
    assert json.loads((again / "summary.json").read_text())["val"]["new"]["before"] == told["val"]["new"]
    assert told["val"]["new"] != summary["val"]["new"]["after"]
    code, stdout, _ = cpt(model, out, jsonl, *options, steps=7)
    assert code == 0
    assert "already finished" in stdout
    assert f"{told['val']['new']:.4f}" in stdout
    assert "steps 4, 6 is in" in " ".join(stdout.split())


def test_a_run_killed_before_its_average_makes_it(
    tmp_path: Path, mixtral: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--keep-weights", 1, "--save-every", 3, "--val-fraction", 0.2]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cpt(mixtral, one, jsonl, *options, "--average-last", 3)[0] == 0
    for where in ("moetool.surgery.apply.write", "moetool.train.build.validate_other", "moetool.train.loop.publish"):

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(where, killed)
            assert cpt(mixtral, two, jsonl, *options, "--average-last", 2)[0] == 130
        assert not (two / "config.json").exists()
    code, _, stderr = cpt(mixtral, two, jsonl, *options, "--average-last", 3)
    assert code == 0, stderr
    assert all(torch.equal(value, weights(one / "average")[name]) for name, value in weights(two / "average").items())
    summaries = [json.loads((out / "summary.json").read_text()) for out in (one, two)]
    assert summaries[0]["average"] == summaries[1]["average"]
    assert summaries[0]["val"] == summaries[1]["val"]
    code, stdout, stderr = cpt(mixtral, two, jsonl, *options, "--average-last", 2)
    assert code == 0
    assert "already finished" in stdout
    assert "the run is finished, so --average-last has no effect" in " ".join(stderr.split())
    for asked in ([], ["--average-last", 3]):  # nothing is asked for that is not there
        code, stdout, stderr = cpt(mixtral, two, jsonl, *options, *asked)
        assert (code, stderr) == (0, "")
        assert "already finished" in stdout
    code, _, stderr = cpt(mixtral, two, jsonl, *options, "--average-last", 3, "--no-resume", "--lr", 5e-4)
    assert code == 0, stderr


def test_an_average_that_cannot_be_is_refused_before_the_run(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    code, _, stderr = cpt(llama, tmp_path / "out", jsonl, "--keep-weights", 2, "--average-last", 3)
    assert code == 1
    assert "--average-last 3: --keep-weights 2 keeps 2 in this run of 4 steps" in stderr
    assert not (tmp_path / "out").exists()
    assert cpt(llama, tmp_path / "out", jsonl, "--keep-weights", 2)[0] == 0
    code, _, stderr = cpt(llama, tmp_path / "out", jsonl, "--keep-weights", 2, "--average-last", 2)
    assert code == 0
    assert "moetool average NEW" in stderr
    assert tiny.in_process("average", tmp_path / "new", tmp_path / "out", "--last", 2)[0] == 0
    mean, found = mean_of(sorted((tmp_path / "out" / "weights").iterdir())), weights(tmp_path / "new")
    assert all(torch.equal(found[name], mean[name]) for name in mean)


def wait_for_step(running: Running, out: Path, step: int) -> None:
    def reached() -> bool:
        path = out / "metrics.jsonl"
        return path.exists() and path.read_text().count('"loss"') >= step

    assert wait_until(reached, running, 120), f"the run did not reach step {step}: {running.wait().err}"


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, jsonl: Path) -> None:
    model = tiny.save_mixtral(tmp_path / "model", dtype=torch.bfloat16, attention_dropout=0.1)

    def arguments(out: Path) -> list[object]:
        more = ["--save-every", 10, "--eval-every", 35, "--max-steps", 120, "--keep-weights", 15, "--average-last", 8]
        return ["cpt", model, out, "--train", f"new={jsonl}", "--val-fraction", 0.2, *SMALL, *more]

    undisturbed = start(tmp_path / "zeroth", *arguments(tmp_path / "whole")).wait()
    assert undisturbed.code == 0, undisturbed.err
    out = tmp_path / "killed"
    running = start(tmp_path / "first", *arguments(out))
    wait_for_step(running, out, 33)
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    assert not (out / "config.json").exists()
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(out)

    running = start(tmp_path / "second", *arguments(out))
    wait_for_step(running, out, 45)
    running.send(signal.SIGINT)
    stopped = running.wait()
    assert stopped.code == 130
    # The step under way was finished and saved, between two regular checkpoints.
    done = len([row for row in rows(out) if "loss" in row])
    assert f"stopped after step {done}; the same command continues from the checkpoint of step {done}" in (
        stopped.err.replace("\n", " ")
    )
    assert (out / "checkpoints" / f"step-{done:06d}").is_dir()

    resumed = start(tmp_path / "third", *arguments(out)).wait()
    assert resumed.code == 0, resumed.err
    assert "from step" in resumed.out
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(value, whole[name]) for name, value in weights(out).items())
    assert untimed(out) == untimed(tmp_path / "whole")
    for folder in ("average", *(f"weights/step-{step:06d}" for step in range(15, 121, 15))):
        one, other = ((run / folder / "model.safetensors").read_bytes() for run in (out, tmp_path / "whole"))
        assert one == other, folder
    assert len(list((out / "weights").iterdir())) == 8
    ours, theirs = (
        load_file(folder / "checkpoints" / "step-000120" / "training_state" / "master.safetensors")
        for folder in (out, tmp_path / "whole")
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.slow
def test_sigterm_is_143_and_writes_a_checkpoint(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    out = tmp_path / "out"
    running = start(tmp_path / "run", "cpt", llama, out, "--train", f"new={jsonl}", "--max-steps", 5000, *SMALL)
    wait_for_step(running, out, 3)
    running.send(signal.SIGTERM)
    stopped = running.wait()
    stderr = stopped.err.replace("\n", " ")
    done = len([row for row in rows(out) if "loss" in row])
    assert f"the same command continues from the checkpoint of step {done}" in stderr
    assert stopped.code == 143


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.bfloat16, "bf16")]
)
def test_two_processes_train_as_one(tmp_path: Path, jsonl: Path, dtype: torch.dtype, precision: str) -> None:
    model = tiny.save_mixtral(tmp_path / "model", dtype=dtype)
    more = ["--save-every", 3, "--eval-every", 3, "--max-steps", 6, "--val-fraction", 0.3, "--precision", precision]

    def arguments(out: Path) -> list[str]:
        return [str(a) for a in ["cpt", model, out, "--train", f"new={jsonl}", *SMALL, *more]]

    one, two = tmp_path / "one", tmp_path / "two"
    assert tiny.cli(*arguments(one)).returncode == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "moetool"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launch, *arguments(two)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the checkpoint is") == 1
    for ours, theirs in zip(rows(one), rows(two), strict=True):
        assert ours["step"] == theirs["step"]
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
            assert ours["balance"] == pytest.approx(theirs["balance"], rel=1e-4)
            assert ours["mri"] == pytest.approx(theirs["mri"], abs=0.05)
        else:
            assert ours["val"] == pytest.approx(theirs["val"], rel=1e-5)


@pytest.mark.slow
def test_processes_that_are_separate_runs_are_refused(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    arguments = ["cpt", llama, tmp_path / "out", "--train", f"new={jsonl}", "--max-steps", 1, *SMALL]
    done = tiny.cli(*arguments, env={"WORLD_SIZE": "2"})
    assert done.returncode == 1
    assert "2 processes were launched, but accelerate sees 1" in done.stderr
