"""Scores over training, from the step folders of a run."""

import json
import shutil
from pathlib import Path

import pytest

from moetool.evaluate.score_plots import training_tokens
from tests import tiny


def test_many_models_are_readable_on_eighty_columns(llama: Path, tmp_path: Path) -> None:
    steps = [save_step(llama, tmp_path / run, step) for run in "ab" for step in (1, 2)]
    text = tiny.save_jsonl(tmp_path / "t.jsonl", repeat=2)
    code, stdout, stderr = tiny.in_process("eval", *steps, "--text", f"t={text}", "--baseline", llama)
    assert code == 0, stderr
    for step in steps:
        (line,) = [line for line in stdout.splitlines() if f"{step.parts[-3]}/{step.name}" in line]
        assert line.rstrip().endswith("+0.0000±0.0000")
    assert "…" not in stdout


def save_step(llama: Path, run: Path, step: int, last: bool = False) -> Path:
    """A checkpoint as `moetool cpt` leaves it."""
    folder = run if last else run / "checkpoints" / f"step-{step:06d}"
    shutil.copytree(llama, folder, dirs_exist_ok=True)
    lineage = [{"command": "upcycle"}, {"command": "cpt", "steps": step, "tokens": step * 100}]
    (folder / "moetool.json").write_text(json.dumps({"format": 1, "lineage": lineage}))
    return folder


def test_tokens_come_from_the_lineage(llama: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert training_tokens(save_step(llama, run, 5)) == (str(run), 500)
    assert training_tokens(save_step(llama, run, 9, last=True)) == (str(run), 900)
    assert training_tokens(llama) is None


@pytest.mark.parametrize("number", [1, 2])
def test_a_plot_for_each_task_when_a_run_has_two_steps(llama: Path, tmp_path: Path, number: int) -> None:
    steps = [save_step(llama, tmp_path / "run", step) for step in (5, 10)[:number]]
    text = tiny.save_jsonl(tmp_path / "t.jsonl", repeat=2)
    out = tmp_path / "out"
    code, stdout, stderr = tiny.in_process(
        "eval", *steps, "--text", f"one={text}", "--text", f"$^{{$={text}", "--baseline", llama, "--out", out, "--json"
    )
    assert code == 0, stderr
    plots = json.loads(stdout)["plots"]
    assert [Path(p).name for p in plots] == (["one.png", "$^{$.png"] if number == 2 else [])
    assert all(Path(p).read_bytes().startswith(b"\x89PNG") for p in plots)
