"""What is read of a run's metrics.jsonl while it is written, and how long series are thinned."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moetool.watch.course import total_steps
from moetool.watch.page import collect, document_json
from moetool.watch.rows import Rows
from moetool.watch.run import WatchedRun
from moetool.watch.scan import scanned
from moetool.watch.tail import Tail
from moetool.watch.thin import heat, thinned


def row(step: int, loss: float = 2.0, **more: Any) -> bytes:
    values = {
        "step": step,
        "loss": loss,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "balance": {"aux": 1.0},
        "num_tokens": step * 64,
    }
    return json.dumps({**values, "tokens_per_second": 640.0, **more}).encode() + b"\n"


def look(tail: Tail) -> tuple[bool, list[bytes]]:
    found = tail.look()
    return found.anew, [line for line in found.lines if line]


def test_each_line_is_given_once_and_a_half_written_one_waits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert look(tail) == (False, [])
    assert tail.changed is None
    path.write_bytes(b"one\ntw")
    assert look(tail) == (True, [b"one"])
    assert look(tail) == (False, [])
    with path.open("ab") as file:
        file.write(b"o\nthree\n")
    assert look(tail) == (False, [b"two", b"three"])


def test_a_resume_that_replaces_the_file_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"one\ntwo\nthree\n")
    tail = Tail(path)
    look(tail)
    (tmp_path / "new").write_bytes(b"one\nzwei\nthree\nfour\n")  # longer than what was read: only its content tells
    inode = os.stat(path).st_ino
    path.write_bytes((tmp_path / "new").read_bytes())  # in place: the same inode
    assert os.stat(path).st_ino == inode
    assert look(tail) == (True, [b"one", b"zwei", b"three", b"four"])
    path.write_bytes(b"one\n")  # shorter
    assert look(tail) == (True, [b"one"])
    path.unlink()
    assert look(tail) == (True, [])
    assert look(tail) == (False, [])
    path.write_bytes(b"five\n")
    assert look(tail) == (True, [b"five"])


def test_a_pipe_in_its_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert look(Tail(tmp_path / "metrics.jsonl")) == (False, [])


def test_a_sample_is_spread_over_the_file_and_holds_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(row(step) for step in range(1, 5001)) + b'{"step": 5001, "lo')
    steps = {json.loads(line)["step"] for line in Tail(path).sample(10)}
    assert {1, 5000} <= steps
    for tenth in range(10):
        assert any(500 * tenth < step <= 500 * (tenth + 1) for step in steps)


def test_rows_of_a_step_count_once_and_the_run_may_go_back() -> None:
    rows = Rows()
    for step in (1, 2, 3, 4, 5):
        rows.add(row(step, float(step)))
        rows.add(json.dumps({"step": step, "val": {"a": step}}).encode())
    rows.add(row(3, 33.0))
    rows.add(json.dumps({"step": 3, "val": {"a": 30}}).encode())
    assert rows.steps.tolist() == [1, 2, 3]
    assert rows.columns["loss"].tolist() == [1, 2, 33]
    assert rows.val["a"] == ([1, 2, 3], [1, 2, 30])


def test_measures_that_begin_or_stop_leave_gaps() -> None:
    rows = Rows()
    rows.add(row(1))
    measured: dict[str, Any] = {"mri": [0.5, 0.25], "entropy": [0.9, 1.0], "dead_experts": [[], [1, 3]]}
    rows.add(row(2, **measured, load={"0": [0.5, 0.5], "4": [1.0, 0.0]}, mfu=0.4))
    rows.add(row(3))
    assert rows.num_layers == 2
    assert [math.isnan(value) for value in rows.measures["mri"]] == [True, True, False, False, True, True]
    assert rows.measures["dead_experts"].tolist()[2:4] == [0, 2]
    assert rows.loads == [(2, {"0": [0.5, 0.5], "4": [1.0, 0.0]})]
    assert [math.isnan(value) for value in rows.columns["mfu"]] == [True, False, True]
    assert list(rows.dead) == [(2, [[], [1, 3]])]


@pytest.mark.parametrize(
    "line",
    [
        b"{", b"[]", b"5", b'{"step": true, "loss": 1}', b'{"step": -1, "loss": 1}', b'{"step": 1, "loss": "1"}',
        b'{"step": 1, "loss": 1, "mri": 5}',
        b'{"step": 1, "loss": 1, "mri": [1], "entropy": [1, 2], "dead_experts": [[]]}',
        b'{"step": 1, "loss": 1, "mri": [1], "entropy": [1], "dead_experts": [["x"]]}',
        b'{"step": 1, "loss": 1, "mri": [1], "entropy": [1], "dead_experts": [[]], "load": {"0": ["x"]}}',
        b'{"step": 1, "loss": 1, "balance": []}', b'{"step": 1, "val": []}',
        b'{"step": 1, "loss": 1e999999, "lr": null}', b'{"step": 99999999999999999999, "loss": 1}',
        b"[" * 100_000, b'{"step": 1, "loss": 1' + b"0" * 400 + b"}", b"\xff\xfe",
    ],
)  # fmt: skip
def test_what_is_no_row_is_left_out_whole(line: bytes) -> None:
    rows = Rows()
    rows.add(row(1))
    rows.add(line)
    rows.add(row(2))
    assert rows.steps.tolist() == [1, 2]
    assert rows.skipped == 1
    assert {len(column) for column in rows.columns.values()} == {2}


absurd = st.sampled_from([0, -1, 1e308, -1e308, 5e-324, 2**60, 0.5, 1])
layers = st.lists(absurd, min_size=2, max_size=2)


@given(
    st.lists(
        st.fixed_dictionaries(
            {"loss": absurd},
            optional={
                **dict.fromkeys(("lr", "grad_norm", "tokens_per_second", "num_tokens", "mfu"), absurd),
                **dict.fromkeys(("mri", "entropy"), layers),
                "dead_experts": st.just([[], [7]]),
                "load": st.dictionaries(st.sampled_from(["0", "1", "x"]), layers),
                "balance": st.dictionaries(st.text(max_size=3), absurd, max_size=2),
                "sources": st.dictionaries(st.sampled_from(["a", "b"]), absurd),
            },
        ),
        max_size=45,
    ),
    st.lists(st.dictionaries(st.text(max_size=2), absurd, max_size=2), max_size=4),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_absurd_numbers_make_a_page_too(tmp_path: Path, trained: list[dict[str, Any]], validated: list[Any]) -> None:
    run = WatchedRun(tmp_path, "run")
    for step, values in enumerate(trained, 1):
        run.rows.add(json.dumps({"step": step, **values}).encode())
    for step, losses in enumerate(validated):
        run.rows.add(json.dumps({"step": step, "val": losses}).encode())
    with np.errstate(all="ignore"):
        json.loads(document_json(collect([run]), 0, 0))


def test_short_series_are_whole_and_long_ones_keep_their_extremes() -> None:
    assert thinned([1, 2, 3], [1.0, math.nan, 3.0], 5) == {"x": [1, 3], "y": [1.0, 3.0], "mean": None}
    y = np.ones(10_000)
    y[[1234, 7777]] = 9.0, -9.0
    found = thinned(np.arange(1, 10_001), y, 100)
    points = dict(zip(found["x"], found["y"], strict=True))
    assert points[1235] == 9.0
    assert points[7778] == -9.0
    assert {1, 10_000} <= points.keys()
    assert len(points) <= 102
    # 50 buckets of 200: the seventh has the 9, so its mean is (199 + 9) / 200.
    assert found["mean"]["y"][6] == pytest.approx(1.04)
    assert found["mean"]["x"][6] == 1400


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(2, 60))
def test_no_extreme_of_a_bucket_is_lost(y: list[float], most: int) -> None:
    found = thinned(range(len(y)), y, most)
    points = dict(zip(found["x"], found["y"], strict=True))
    assert found["x"] == sorted(points)
    assert all(y[x] == value for x, value in points.items())
    assert max(points.values()) == max(y)
    assert min(points.values()) == min(y)
    assert len(points) <= max(most, 2 * (most // 2)) + 2


def test_a_heatmap_shows_the_worst_row_of_each_column() -> None:
    values_NL = np.array([[0.1, 0.5], [0.9, 0.2], [math.nan, math.nan], [0.3, 0.3], [0.2, 0.8]])
    assert heat([1, 2, 3, 4, 5], values_NL, 2, np.maximum) == {"x": [2, 5], "rows": [[0.9, 0.3], [0.5, 0.8]]}
    assert heat([1, 2, 3, 4, 5], values_NL, 9, np.minimum)["x"] == [1, 2, 4, 5]


def test_the_first_look_at_a_large_file_has_every_spike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetool.watch.run.SAMPLED", 1000)
    monkeypatch.setattr("moetool.watch.run.SAMPLE", 5)
    lines = [row(step, 2.0 + 7 * (step == 1777)) for step in range(1, 3001)]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    run = WatchedRun(tmp_path, "run")
    run.sample()
    first = run.document()
    assert first["status"]["sampled"]
    assert first["status"]["step"] == 3000
    assert 9.0 in first["series"]["loss"]["y"]
    assert first["marks"]["loss"] == {"x": [1777], "y": [9.0]}
    run.refresh()
    whole = run.document()
    assert not whole["status"]["sampled"]
    assert whole["status"]["rows"] == 3000
    assert whole["series"]["loss"] == first["series"]["loss"]


@pytest.mark.parametrize(
    "rows",
    [row(2) + row(1), row(1).replace(b"2.0", b"two"), b"", row(1) + row(10**14), b'{"val": {"a": 1}}' * 10],
    ids=["back", "no number", "empty", "gap", "no rows"],
)
def test_rows_of_other_programs_are_not_scanned(tmp_path: Path, rows: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(rows)
    assert scanned(path) == {}
    path.write_bytes(row(1) + row(2))
    columns = scanned(path)
    assert {name: (x.tolist(), y.tolist()) for name, (x, y) in columns.items()} == {
        "loss": ([1, 2], [2.0, 2.0]), "grad_norm": ([1, 2], [0.5, 0.5])
    }  # fmt: skip


def test_a_process_that_scans_may_end_and_nothing_else_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be killed, and a map of a file that is cut short ends it, too (SIGBUS)."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(row(1) + row(2))
    monkeypatch.setattr("moetool.watch.scan.open_regular", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    assert scanned(path) == {}


@pytest.mark.parametrize("steps", ["²", "9" * 5000, "1e3", "-5", True, 0.5, None, [100]])
def test_a_number_of_steps_that_is_none_is_not_known(steps: Any) -> None:
    assert total_steps({"max_steps": steps}, 64.0) is None


def test_steps_come_from_the_tokens_where_they_are_not_given() -> None:
    assert total_steps({"max_steps": "0", "max_tokens": "6500"}, 64.0) == 101  # of 101.6
