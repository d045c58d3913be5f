"""A damaged run stops neither the page of other runs nor a training: the page says what could not be read."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from moetool.commands.cpt import _leave_page
from moetool.watch import run as watched_run
from moetool.watch import server, tail
from moetool.watch.facts import read_facts
from moetool.watch.open import open_runs
from moetool.watch.page import collect
from moetool.watch.rows import Rows
from moetool.watch.scores import read_scores
from moetool.watch.server import Watcher
from tests import tiny
from tests.watched import HOSTILE, row, save_run


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "good", tmp_path / "bad"]
    for path in paths:
        save_run(path, steps=5)
    return paths


def until(watcher: Watcher, there: Any) -> dict[str, Any]:
    for _ in range(400):
        if there(watcher.document):
            return watcher.document
        time.sleep(0.01)
    raise AssertionError(watcher.document["problems"])


def test_what_a_folder_says_may_raise_anything(two: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def facts(path: Path) -> dict[str, Any]:
        if path.name == "bad":
            raise RecursionError(f"too deep {HOSTILE}")
        return read_facts(path)

    monkeypatch.setattr(watched_run, "read_facts", facts)
    code, out, err = tiny.in_process("watch", *two, "--json")
    document = json.loads(out)
    assert code == 0
    assert "bad: RecursionError (test_watch_problems.py:" in err
    assert "\u202e" not in err
    good, bad = document["runs"]
    assert good.keys() == bad.keys()
    assert (good["problem"], good["status"]["state"]) == ("", "running")
    assert bad["status"]["state"] == "unknown"
    assert bad["series"]["loss"] == good["series"]["loss"]  # the rows are there
    (problem,) = document["problems"]
    assert problem.startswith("bad: RecursionError (test_watch_problems.py:")
    assert problem == f"bad: {bad['problem']}"


def test_rows_that_cannot_be_read_are_read_anew_a_while_later(two: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    full = True
    add = Rows.add

    def adding(self: Rows, line: bytes) -> None:
        if full and b'"step": 3' in line and b"loss" in line:
            self.steps.append(3)  # and then no memory for the other columns
            raise MemoryError
        add(self, line)

    monkeypatch.setattr(Rows, "add", adding)
    monkeypatch.setattr(watched_run, "RETRY", 0.0)
    runs = open_runs([two[1]])
    watcher = Watcher(runs)
    (run,) = watcher.document["runs"]
    assert "MemoryError" in run["problem"]
    assert run["series"] == {}
    full = False
    assert runs[0].refresh()
    (run,) = collect(runs)["runs"]
    assert run["problem"] == ""
    assert run["series"]["loss"]["x"] == [1, 2, 3, 4, 5]
    monkeypatch.setattr(watched_run, "RETRY", 60.0)
    full = True
    (two[1] / "metrics.jsonl").write_text("".join(json.dumps(row(step)) + "\n" for step in range(2, 5)))
    assert runs[0].refresh()
    assert not runs[0].refresh()  # not each second: a training may want the memory
    assert collect(runs)["runs"][0]["series"]["loss"]["x"] == [1, 2, 3, 4, 5]  # the rows of before


def test_the_server_goes_on_after_an_error_and_says_it(two: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LOOK", 0.01)
    broken = [ZeroDivisionError("scores"), ZeroDivisionError("page")]

    def scores() -> tuple[list[dict[str, Any]], list[str]]:
        if broken[:1] and str(broken[0]) == "scores":
            raise broken[0]
        return [], []

    def collecting(*arguments: Any) -> dict[str, Any]:
        if broken[:1] and str(broken[0]) == "page":
            raise broken[0]
        return collect(*arguments)

    monkeypatch.setattr(server, "collect", collecting)
    watcher = Watcher(open_runs(two), scores)
    assert watcher.document["problems"][0].startswith("scores: ZeroDivisionError (test_watch_problems.py:")
    stop = threading.Event()
    thread = threading.Thread(target=watcher.run, args=(stop,), daemon=True)
    broken.pop(0)
    thread.start()
    with (two[0] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(6)) + "\n")
    seen = until(watcher, lambda document: any(one.startswith("ZeroDivisionError") for one in document["problems"]))
    assert seen["runs"][0]["status"]["step"] == 5  # the numbers of before
    assert json.loads(watcher.text)["problems"] == seen["problems"]
    broken.clear()
    assert until(watcher, lambda document: document["runs"][0]["status"]["step"] == 6)["problems"] == []
    stop.set()
    thread.join(10)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"cooldown_end": float("nan"), "constant_end": float("nan"), "schedule": "infinite"}, {}),
        ({"max_steps": None, "max_tokens": 10**14}, {"num_tokens": 1e-300}),
        ({"max_steps": 10**14}, {"num_tokens": 1e300, "tokens_per_second": 5e-324}),
        ({"lr": float("inf"), "train": float("nan")}, {}),
    ],
)
def test_numbers_that_are_absurd_together_make_a_page_too(tmp_path: Path, options: Any, rows: Any) -> None:
    save_run(tmp_path, steps=3)
    file = tmp_path / "moetool.partial.json"
    partial = json.loads(file.read_text())
    partial["options"] |= options
    partial["sources"]["code"]["epochs"] = float("nan")
    file.write_text(json.dumps(partial))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row(step) | rows) + "\n" for step in (1, 2, 3)))
    (run,) = open_runs([tmp_path])
    run.refresh()
    document = run.document()
    assert document["problem"] == ""
    assert document["series"]["loss"]["x"] == [1, 2, 3]


def test_a_file_without_lines_fills_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "_PIECE", 100)
    monkeypatch.setattr(tail, "_LONGEST", 1000)
    monkeypatch.setattr(tail, "_SAMPLED", 50)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\0" * 10_000)
    reader = tail.Tail(path)
    pieces = list(reader.look().lines)
    assert max(map(len, pieces)) <= 1100
    assert reader.read == sum(map(len, pieces)) > 8000
    assert list(tail.Tail(path).sample(20)) == []
    with path.open("ab") as file:
        file.write(b"\none\n")
    found = reader.look()
    assert not found.anew
    assert [line for line in found.lines if line.strip(b"\0")] == [b"one"]


def test_aliases_in_the_options_do_not_multiply(tmp_path: Path) -> None:
    save_run(tmp_path, steps=3)
    names = [chr(97 + i) for i in range(10)]
    lines = ["a: &a [x, x]", *(f"{b}: &{b} [{', '.join(['*' + a] * 10)}]" for a, b in itertools.pairwise(names))]
    (tmp_path / "moetool.yaml").write_text("\n".join(lines))
    (tmp_path / "moetool.partial.json").unlink()
    (run,) = open_runs([tmp_path])
    run.refresh()
    document = run.document()
    assert (document["options"], document["command"], document["problem"]) == ({}, "", "")
    assert document["series"]["loss"]["x"] == [1, 2, 3]


def test_a_page_never_stops_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Said:
        warn = staticmethod(said.append)

    save_run(tmp_path, steps=3)
    _leave_page(Said, tmp_path)  # type: ignore[arg-type]
    assert said == []
    assert (tmp_path / "run.html").read_text().startswith("<!doctype html>")

    def fails(*arguments: Any) -> str:
        raise MemoryError

    monkeypatch.setattr("moetool.watch.page.render", fails)
    _leave_page(Said, tmp_path)  # type: ignore[arg-type]
    assert len(said) == 1
    assert f"{tmp_path / 'run.html'} is not written (MemoryError" in said[0]
    assert "moetool watch" in said[0]
    monkeypatch.undo()
    (tmp_path / "run.html").unlink()
    (tmp_path / "run.html").mkdir()
    _leave_page(Said, tmp_path)  # type: ignore[arg-type]
    assert "run.html is not written (" in said[1]


def results(place: Path, **scored: float) -> None:
    """Results of `moetool eval`, of checkpoints by their paths."""
    place.mkdir(parents=True, exist_ok=True)
    score = {"stderr": None, "higher_is_better": True, "num_documents": 9}
    models = {f"m{i}": path for i, path in enumerate(scored)}
    found = {f"m{i}": {"arc": {"acc,none": score | {"value": value}}} for i, value in enumerate(scored.values())}
    (place / "results.json").write_text(json.dumps({"moetool": {"models": models, "results": found}}))


def test_scores_in_a_run_and_beside_it_are_found(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "code"
    save_run(run, steps=3)
    runs = open_runs([run])
    runs[0].refresh()
    assert read_scores([], runs) == ([], [])
    step = "checkpoints/step-00000"
    results(run / "eval", **{f"{run}/{step}1": 0.1, f"/elsewhere/runs/code/{step}8": 0.9, str(run): 0.3})
    results(run.parent / "eval-more", **{f"../runs/code/{step}2": 0.2, f"runs/other/{step}9": 0.8})
    results(tmp_path / "eval", **{f"{run}/{step}2": 0.7})  # neither in the run nor beside it
    results(run.parent / "scores", **{f"{run}/{step}2": 0.7})  # not called eval
    results(run.parent / "eval-theirs", **{f"{run}/{step}2": 0.7})
    if os.geteuid() == 0:
        os.chown(run.parent / "eval-theirs" / "results.json", 12345, -1)
    else:
        (run.parent / "eval-theirs" / "results.json").unlink()
    (run.parent / "eval-lm").mkdir()
    (run.parent / "eval-lm" / "results.json").write_text('{"results": {"arc": {}}}')  # of another program
    (found,), problems = read_scores([], runs)
    assert found["runs"] == {"code": {"x": [1, 2, 3], "y": [0.1, 0.2, 0.3], "stderr": [None] * 3}}
    assert problems == []
    # The folder that the user names counts as before: the end of a path is enough. Its score replaces the other.
    results(tmp_path / "named", **{f"/elsewhere/code/{step}2": 0.5})
    (found,), _ = read_scores([tmp_path / "named"], runs)
    assert found["runs"]["code"]["y"] == [0.1, 0.5, 0.3]
    (run / "eval" / "results.json").write_text("{")
    (found,), (problem,) = read_scores([], runs)
    assert found["runs"]["code"]["x"] == [2]
    assert f"{run / 'eval' / 'results.json'} is not valid JSON" in problem


@pytest.mark.parametrize("model", ["", "/", "..", "a\0b", "\ud800", "step-000001", "x" * 5000, "checkpoints/step-1"])
def test_a_model_that_is_no_path_of_a_run_is_passed_over(tmp_path: Path, model: str) -> None:
    save_run(tmp_path / "run", steps=3)
    runs = open_runs([tmp_path / "run"])
    runs[0].refresh()
    for place, named in ((tmp_path / "run" / "eval", []), (tmp_path / "named", [tmp_path / "named"])):
        results(place, **{model: 0.5})
        assert read_scores(named, runs) == ([], [])
