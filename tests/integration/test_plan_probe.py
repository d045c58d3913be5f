"""`moetool plan --probe`: the time of a long run from 20 of its steps."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from moetool.budget import probe
from moetool.budget.probe import Probe
from tests import tiny

STEPS = 200
RUN = ("--seq-len", 64, "--global-batch-size", 4)


def test_the_first_steps_count_as_they_were() -> None:
    found = Probe(20, "cpu", 1, first_seconds=9.0, step_seconds=0.5, tokens_per_second=512.0)
    assert found.seconds(200) == 9.0 + 195 * 0.5
    assert found.to_json(200)["predicted_seconds"] == found.seconds(200)


def test_steps_are_read_from_the_metrics(tmp_path: Path) -> None:
    # Five steps of 2 s, fifteen of half a second; 256 tokens each, and a validation row.
    rows: list[dict[str, Any]] = [{"step": 0, "val": {"text": 5.0}}]
    rows += [{"step": n + 1, "loss": 5.0, "tokens_per_second": 128 if n < 5 else 512} for n in range(20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = probe._read(tmp_path / "metrics.jsonl", 256, "cpu", 1)
    assert found == Probe(20, "cpu", 1, 10.0, 0.5, 512.0)


@pytest.mark.parametrize(("typed", "other"), [(("--mfu", "0.3"), "--mfu"), (("--tokens-per-second", "9"), "--tokens-")])
def test_a_speed_is_given_or_measured(llama: Path, typed: tuple[str, str], other: str) -> None:
    code, _, err = tiny.in_process("plan", llama, "--probe", *typed)
    assert code == 2
    assert f"give --probe or {other}" in " ".join(err.split())


def test_a_disk_that_is_too_small_is_said_before(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_num_gpus", lambda: 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 1000, 0))
    said = tiny.refusal("plan", llama, "--train-tokens", "1M", *RUN, "--probe")
    assert "which has 0 B free; set TMPDIR to a larger disk" in said


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_200_steps_take_what_20_predict(tmp_path: Path) -> None:
    """Within 15 % by the median of three, because other programs share the machine's cores."""
    dense = tiny.save_llama(tmp_path / "dense", hidden_size=64, intermediate_size=128)
    text = tiny.save_jsonl(tmp_path / "text.jsonl", repeat=200)
    assert tiny.in_process("upcycle", dense, tmp_path / "moe")[0] == 0
    ratios = []
    for attempt in range(3):
        code, out, err = tiny.in_process(
            "plan", dense, "--train-tokens", STEPS * 64 * 4, *RUN, "--probe", "--json"
        )  # fmt: skip
        assert code == 0, err
        found = json.loads(out)
        assert found["steps"] == STEPS
        assert found["probe"]["steps"] == 20
        code, out, err = tiny.in_process(
            "cpt", tmp_path / "moe", tmp_path / f"run-{attempt}", "--train", f"text={text}", "--max-steps", STEPS,
            "--val-fraction", 0, "--micro-batch-size", found["meshes"]["fitting"][0]["micro_batch_size"],
            "--gradient-checkpointing", "--save-every", STEPS, *RUN, "--json",
        )  # fmt: skip
        assert code == 0, err
        ratios.append(found["probe"]["predicted_seconds"] / json.loads(out)["seconds"])
    assert statistics.median(ratios) == pytest.approx(1, abs=0.15), ratios
