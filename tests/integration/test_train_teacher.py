"""`moetool cpt --teacher` from the command line, on tiny models."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from moetool.checkpoint.model import skeleton
from moetool.cost.operations import flops_per_token
from moetool.cost.parameters import sizes_of
from tests import tiny
from tests.forked import start
from tests.integration.test_train_cpt import rows, untimed, wait_for_step, weights
from tests.launched import launch

SMALL = ["--seq-len", 16, "--global-batch-size", 4, "--micro-batch-size", 2, "--lr", 1e-3, "--val-fraction", 0.1]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The options for new and old text."""
    root = tmp_path_factory.mktemp("texts")
    new, old = tiny.save_jsonl(root / "new.jsonl"), tiny.save_jsonl(root / "old.jsonl", ["Old text, seen before."], 60)
    return ["--train", f"new={new}", "--replay", f"old={old}", "--replay-ratio", 0.4]


def taught(model: Path, out: Path, teacher: Path, texts: list[object], *more: object) -> tuple[list[Row], Row, str]:
    """Training rows, summary and what was printed."""
    code, stdout, stderr = tiny.in_process("cpt", model, out, *texts, *SMALL, "--teacher", teacher, *more)
    assert code == 0, stderr
    return [row for row in rows(out) if "loss" in row], json.loads((out / "summary.json").read_text()), stdout


def alike(ones: list[Row], others: list[Row], near: float = 1e-5) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=near)
        assert one["teacher"] == pytest.approx(other["teacher"], rel=100 * near, abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=100 * near)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_does_not_differ_from_itself_until_it_is_trained(
    tmp_path: Path, mixtral: Path, texts: list[object], precision: str
) -> None:
    same = ["--precision", precision, "--max-steps", 3, "--warmup-steps", 0, "--no-cross-document"]
    training, summary, printed = taught(mixtral, tmp_path / "out", mixtral, texts, *same)
    assert abs(training[0]["teacher"]) <= 1e-6  # rounding may leave it below 0
    assert all(row["teacher"] > 1e-4 for row in training[1:])
    assert summary["teacher"] == {"before": training[0]["teacher"], "after": training[-1]["teacher"]}
    assert "parameters on replayed sequences (40%), weight 0.5, temperature 1; 13% more operations" in printed
    assert f"{training[-1]['teacher']:.4f} in the last" in " ".join(printed.split())
    # The language loss is that of all tokens, as without a teacher, and validation does not know of one.
    code, _, stderr = tiny.in_process("cpt", mixtral, tmp_path / "alone", *texts, *SMALL, *same)
    assert code == 0, stderr
    alone = rows(tmp_path / "alone")
    assert alone[0] == rows(tmp_path / "out")[0]
    assert alone[1]["loss"] == pytest.approx(training[0]["loss"], rel=1e-5 if precision == "fp32" else 1e-3)
    assert "teacher" not in alone[1]
    # Nothing of the teacher is saved: as many files and bytes.
    sizes = [
        {str(p.relative_to(tmp_path / name)): p.stat().st_size for p in (tmp_path / name).rglob("*.safetensors")}
        for name in ("out", "alone")
    ]
    assert sizes[0] == sizes[1]
    assert json.loads((tmp_path / "out" / "moetool.json").read_text())["lineage"][-1]["teacher"]


def test_a_teacher_of_another_kind_holds_a_model_back(
    tmp_path: Path, mixtral: Path, llama: Path, texts: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense to MoE and MoE to dense; with a teacher alone, the model comes nearer to it."""
    monkeypatch.setattr("moetool.cost.devices.peak_flops", lambda device, precision: 1e9)
    padded = tiny.save_llama(tmp_path / "padded", vocab_size=320)
    kd = ["--teacher-on", "all", "--teacher-weight", 1, "--teacher-temperature", 2, "--max-steps", 12, "--lr", 1e-2]
    for number, (model, teacher) in enumerate(((mixtral, padded), (padded, mixtral))):
        training, summary, printed = taught(model, tmp_path / f"{number}", teacher, texts, *kd)
        assert training[-1]["teacher"] < training[0]["teacher"] - 0.1
        assert summary["teacher"]["after"] == training[-1]["teacher"]
        assert "parameters on all sequences, weight 1, temperature 2" in printed
        own, of_teacher = (flops_per_token(sizes_of(skeleton(one)), 16) for one in (model, teacher))
        operations = own + of_teacher / 3
        assert training[0]["mfu"] == pytest.approx(training[0]["tokens_per_second"] * operations / 1e9, rel=1e-6)


def test_a_killed_run_with_a_teacher_goes_on_bit_for_bit(
    tmp_path: Path, mixtral: Path, llama: Path, texts: list[object]
) -> None:
    more = ["--max-steps", 40, "--save-every", 4, "--eval-every", 20, "--precision", "bf16"]
    taught(mixtral, tmp_path / "whole", llama, texts, *more)
    out = tmp_path / "killed"
    running = start(tmp_path / "first", "cpt", mixtral, out, *texts, *SMALL, "--teacher", llama, *more)
    wait_for_step(running, out, 10)
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    assert not (out / "config.json").exists()
    other = tiny.save_llama(tmp_path / "other", seed=1)
    for changed, reason in (
        (["--teacher", other], "--teacher (other files)"),
        (["--teacher", llama, "--teacher-weight", 0.1], "--teacher-weight (0.5 before, 0.1 now)"),
        ([], "--teacher (gone)"),
    ):
        message = tiny.refusal("cpt", mixtral, out, *texts, *SMALL, *more, *changed)
        assert f"holds a run with other options: {reason}" in message
    moved = (tmp_path / "moved").resolve()
    moved.symlink_to(llama)
    _, _, printed = taught(mixtral, out, moved, texts, *more)
    assert "from step" in printed
    whole = weights(tmp_path / "whole")
    assert all((value == whole[name]).all() for name, value in weights(out).items())
    assert untimed(out) == untimed(tmp_path / "whole")
    assert "already finished" in taught(mixtral, out, llama, texts, *more)[2]


def test_gradients_are_the_same_with_checkpointing_and_other_micro_batches(
    tmp_path: Path, mixtral: Path, llama: Path, texts: list[object]
) -> None:
    more = ["--max-steps", 3, "--balance", "none", "--teacher-temperature", 2]
    ways: list[list[object]] = [[], ["--gradient-checkpointing"], ["--micro-batch-size", 4]]
    plain, *others = (
        taught(mixtral, tmp_path / f"{number}", llama, texts, *more, *options)[0] for number, options in enumerate(ways)
    )
    for other in others:
        alike(plain, other)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a loaded machine takes minutes to compile
def test_a_compiled_model_has_the_same_gradients_and_rounds_as_its_teacher(
    tmp_path: Path, mixtral: Path, texts: list[object]
) -> None:
    """The teacher is asked for one sequence of a micro-batch, and for two."""
    wide = ["--micro-batch-size", 4]
    half = taught(
        mixtral, tmp_path / "half", mixtral, texts, *wide, "--precision", "bf16", "--compile", "--max-steps", 2
    )
    assert abs(half[0][0]["teacher"]) <= 1e-6
    plain, compiled = (
        taught(mixtral, tmp_path / option, mixtral, texts, *wide, "--max-steps", 3, option)[0]
        for option in ("--no-compile", "--compile")
    )
    assert abs(compiled[0]["teacher"]) <= 1e-6
    alike(plain, compiled)


@pytest.mark.slow
def test_two_processes_with_a_teacher_train_as_one(
    tmp_path: Path, mixtral: Path, llama: Path, texts: list[object]
) -> None:
    """With whole weights and with shards; some micro-batches have no sequence with a teacher."""
    more = ["--max-steps", 4, "--balance", "none", "--micro-batch-size", 1, "--save-every", 2]
    kinds: list[tuple[str, list[object]]] = [
        (f"{precision}{shards}", ["--precision", precision, *options])
        for precision in ("fp32", "bf16")
        for shards, options in (("", []), (" fsdp", ["--fsdp", 2]))
    ]
    two = [
        ["cpt", mixtral, tmp_path / name, *texts, *SMALL, *more, "--teacher", llama, *options]
        for name, options in kinds
    ]
    for (name, options), done in zip(kinds, launch(2, tmp_path, *two), strict=True):
        assert [one.code for one in done] == [0, 0], done[0].stderr + done[1].stderr
        one, _, _ = taught(mixtral, tmp_path / f"{name} alone", llama, texts, *more, *options[:2])
        alike(one, [row for row in rows(tmp_path / name) if "loss" in row], 1e-5 if "fp32" in name else 1e-3)


def test_options_that_contradict_each_other(tmp_path: Path, mixtral: Path, texts: list[object], jsonl: Path) -> None:
    new = ["--train", f"new={jsonl}", *SMALL, "--max-steps", 1]
    for options, reason in (
        (["--teacher", mixtral], "there is no --replay; give text to replay (--replay NAME=PATH), or --teacher-on all"),
        (["--teacher-on", "all"], "--teacher-on has no effect without --teacher"),
        (["--teacher-weight", 0.1], "--teacher-weight has no effect without --teacher"),
        (["--teacher", mixtral, "--teacher-on", "all", "--teacher-temperature", 0], "a number above 0 is needed"),
        (["--teacher", mixtral, "--teacher-on", "all", "--teacher-weight", "nan"], "'--teacher-weight'"),
    ):
        code, _, stderr = tiny.in_process("cpt", mixtral, tmp_path / "out", *new, *options)
        assert code == 2
        assert reason in " ".join(stderr.replace("│", " ").split())
    run = tmp_path / "run"
    within = tiny.save_mixtral(run / "checkpoints" / "step-000001")
    (run / "summary.json").write_text("{}")
    command = ["cpt", mixtral, run, *texts, *SMALL, "--max-steps", 1, "--teacher", within, "--no-resume"]
    assert f"{within}, is part of the run in {run}; choose another OUT" in tiny.refusal(*command)
    assert within.is_dir()
    assert "no folder" in tiny.refusal("cpt", mixtral, tmp_path / "out", *new, "--teacher", "x", "--teacher-on", "all")
