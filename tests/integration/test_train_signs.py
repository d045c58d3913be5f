"""What `moetool cpt` tells while it trains: people a bar and a line of warning, machines lines of JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetool.commands import cpt
from moetool.commands.console import Console
from moetool.errors import ConfigError
from tests import tiny

ARGUMENTS = ("--max-steps", 21, "--seq-len", 16, "--global-batch-size", 4, "--freeze-router")


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral whose first router gives every expert the same score: each token goes to the same two of four."""
    folder = tiny.save_mixtral(tmp_path_factory.mktemp("collapsed") / "moe")
    tensors = load_file(folder / "model.safetensors")
    (router,) = (name for name in tensors if "layers.0" in name and name.endswith("gate.weight"))
    tensors[router] = torch.zeros_like(tensors[router])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_collapsed_router_is_told_once_in_one_line(
    collapsed: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []

    @contextlib.contextmanager
    def bars(self: Console) -> Iterator[Any]:
        yield lambda task, done, total, note="": notes.append(note) if task == "train" else None

    monkeypatch.setattr(Console, "progress", bars)
    code, _, err = tiny.in_process("cpt", collapsed, tmp_path / "out", "--train", f"a={jsonl}", *ARGUMENTS)
    assert code == 0, err
    (line,) = (line for line in err.splitlines() if "collapsed" in line)
    assert line.startswith("warning: the router of layer 0 has collapsed at step 20: one expert gets 100% of tokens")
    assert "where balance would give 50%; in a new run, give --balance aux=0.01 in place of --freeze-router" in line
    assert all("loss " in note and "mri 1.00" in note for note in notes)
    page = (tmp_path / "out" / "run.html").read_text(encoding="utf-8")
    assert '"answer":"Collapsed"' in page


def test_machines_get_lines_of_json(
    collapsed: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpt, "EVENTS", 0.0)
    arguments = ("cpt", collapsed, tmp_path / "out", "--train", f"a={jsonl}", *ARGUMENTS, "--json")
    code, out, err = tiny.in_process(*arguments)
    assert code == 0, err
    assert json.loads(out)["steps"] == 21
    events = [json.loads(line) for line in err.splitlines() if line.startswith('{"event"')]
    progress = [event for event in events if event["event"] == "progress"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert [(event["step"], event["loss"]) for event in progress] == [(row["step"], row["loss"]) for row in trained]
    assert [event["mri"] for event in progress] == [max(row["mri"]) for row in trained]
    assert {event["steps"] for event in progress} == {21}
    assert progress[-1]["seconds_left"] == 0
    (warning,) = (event for event in events if event["event"] == "warning")
    assert (warning["kind"], warning["step"], warning["layer"]) == ("collapse", 20, "0")
    code, _, err = tiny.in_process(*arguments, "--quiet", "--no-resume")
    assert (code, [line for line in err.splitlines() if "event" in line]) == (0, [])


def test_rows_have_the_load_of_each_expert_now_and_then(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    arguments = ("--train", f"a={jsonl}", "--max-steps", 3, "--seq-len", 16, "--global-batch-size", 4)
    code, _, err = tiny.in_process("cpt", mixtral, tmp_path / "out", *arguments)
    assert code == 0, err
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            assert list(row["load"]) == ["0", "1"]
            for mri, load, dead in zip(row["mri"], row["load"].values(), row["dead_experts"], strict=True):
                assert sum(load) == pytest.approx(1, abs=1e-4)
                assert max(load) * 2 == pytest.approx(mri, abs=1e-4)
                assert [expert for expert, share in enumerate(load) if share < 0.02] == dead
            assert "memory" not in row  # of a GPU


def test_a_page_that_cannot_be_written_fails_no_run(
    mixtral: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    arguments = ("--train", f"a={jsonl}", "--max-steps", 1, "--seq-len", 16, "--global-batch-size", 4)
    original = cpt._leave_page

    def leave(console: Console, out: Path) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("moetool.checkpoint.folder.write_file", full)
            original(console, out)

    monkeypatch.setattr(cpt, "_leave_page", leave)
    code, _, err = tiny.in_process("cpt", mixtral, tmp_path / "out", *arguments)
    assert code == 0
    assert "run.html is not written (No space left on device); moetool watch" in err
    assert not (tmp_path / "out" / "run.html").exists()


def test_a_run_that_is_stopped_leaves_its_page_too(
    mixtral: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--train", f"a={jsonl}", "--max-steps", 9, "--seq-len", 16, "--global-batch-size", 4)

    def run_that_ends_with(error: BaseException, code: int) -> None:
        def seen(row: dict[str, Any], signs: object) -> None:
            if row["step"] == 2:
                raise error

        monkeypatch.setattr(cpt, "_telling", lambda console, steps: seen)
        out = tmp_path / str(code)
        assert tiny.in_process("cpt", mixtral, out, *arguments)[0] == code
        page = (out / "run.html").read_text(encoding="utf-8")
        assert '"state":"stopped","step":2,"steps":9' in page

    run_that_ends_with(KeyboardInterrupt(), 130)
    run_that_ends_with(ConfigError("the loss is nan"), 1)
