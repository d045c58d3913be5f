"""`moetool watch` from the command line: the document, the file, and what the server answers."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from moetool.watch.open import open_runs, short_names
from moetool.watch.run import WatchedRun
from moetool.watch.scores import read_scores
from moetool.watch.server import Watcher, serve
from tests import tiny
from tests.watched import HOSTILE, save_run


def document(*arguments: object) -> dict[str, Any]:
    code, out, err = tiny.in_process("watch", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)  # type: ignore[no-any-return]


def test_the_document_has_the_numbers_of_the_files(tmp_path: Path) -> None:
    rows = save_run(tmp_path / "run", steps=60, total=200)
    (run,) = document(tmp_path / "run")["runs"]
    trained = [row for row in rows if "loss" in row]
    assert run["series"]["loss"] == {"x": list(range(1, 61)), "y": [row["loss"] for row in trained], "mean": None}
    assert run["series"]["memory"]["y"] == [row["memory"] for row in trained]
    assert run["balance"]["aux"]["y"] == [row["balance"]["aux"] for row in trained]
    assert run["val"]["code"] == {
        "kind": "adaptation",
        "x": [row["step"] for row in rows if "val" in row],
        "y": [row["val"]["code"] for row in rows if "val" in row],
        "mean": None,
    }
    assert run["val"]["prose"]["kind"] == "forgetting"
    assert run["routers"]["layers"] == ["1", "2", "3"]
    assert (run["routers"]["num_experts"], run["routers"]["top_k"]) == (8, 2)
    assert run["routers"]["mri"][1] == pytest.approx([row["mri"][1] for row in trained], abs=1e-5)
    assert run["dead_experts"]["y"] == [sum(map(len, row["dead_experts"])) for row in trained]
    loaded = [row for row in trained if "load" in row]
    assert run["load"]["x"] == [row["step"] for row in loaded]
    assert run["load"]["layers"]["2"] == [row["load"]["2"] for row in loaded]
    assert run["phases"] == [
        {"name": "warm-up", "from": 0, "to": 10},
        {"name": "constant", "from": 10, "to": 160},
        {"name": "decay", "from": 160, "to": 200},
    ]
    # The run will read 2.5 epochs of code in 200 x 2500 tokens.
    assert run["sources"]["code"] == {"tokens": 60 * 2500, "epochs": 0.75, "replay": False}
    # In 60 of 200 steps of a run whose rows do not tell: three tenths of what the source will give.
    assert run["sources"]["prose"] == {"tokens": 60 * 1596, "epochs": pytest.approx(0.15), "replay": True}
    assert run["status"]["state"] == "running"
    assert run["status"]["seconds_left"] == pytest.approx(140 * 4096 / 10_000)
    assert run["command"] == "moetool cpt models/moe 'runs/a b' --train code=data/code.jsonl --lr 0.001 --no-resume"
    assert [answer["question"] for answer in run["verdict"]] == [
        "Learning?", "Forgetting?", "Balanced?", "Slower than before?", "How long still?"
    ]  # fmt: skip


def test_a_real_run_is_told_from_start_to_end(tmp_path: Path, jsonl: Path) -> None:
    tiny.save_mixtral(tmp_path / "moe")
    train = ("--train", f"new={jsonl}", "--seq-len", 16, "--global-batch-size", 4, "--max-steps", 6, "--lr", 1e-3)
    code, _, err = tiny.in_process("cpt", tmp_path / "moe", tmp_path / "out", *train)
    assert code == 0, err
    (run,) = document(tmp_path / "out")["runs"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert run["status"] | {"seconds": 0} == {
        "state": "finished", "step": 6, "steps": 6, "tokens": 6 * 64, "seconds_left": None, "seconds": 0,
        "seconds_since_row": run["status"]["seconds_since_row"], "rows": 6, "skipped_lines": 0, "sampled": False,
    }  # fmt: skip
    assert run["sources"]["new"]["tokens"] == summary["ledger"]["new"]["tokens"]
    assert run["series"]["loss"]["y"][-1] == summary["loss"]
    assert run["val"]["new"]["y"] == pytest.approx([summary["val"]["new"]["before"], *run["val"]["new"]["y"][1:]])
    assert run["val"]["new"]["y"][-1] == summary["val"]["new"]["after"]
    assert run["routers"]["num_experts"] == 4
    assert len(run["load"]["x"]) == 6
    assert [entry["command"] for entry in run["lineage"]] == ["cpt"]
    page = (tmp_path / "out" / "run.html").read_text(encoding="utf-8")
    assert json.dumps(summary["loss"]) in page


def test_one_file_with_hostile_names_cannot_leave_its_data(tmp_path: Path) -> None:
    save_run(tmp_path / "run", steps=5, domain=HOSTILE)
    code, _, err = tiny.in_process("watch", tmp_path / "run", "--html", tmp_path / "page.html")
    assert code == 0, err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<script") == 9
    assert "alert(1)" in page
    assert "<img" not in page
    assert "default-src 'none'" in page
    assert not any(word in page for word in ('src="http', 'href="http', "@import", "url(http"))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    assert "is no folder; give the OUT of a moetool cpt run" in tiny.refusal("watch", tmp_path / "none", "--json")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    assert "holds no run of moetool cpt" in tiny.refusal("watch", tmp_path / "other", "--json")
    save_run(tmp_path / "run", steps=2)
    assert "is a folder; give a file" in tiny.refusal("watch", tmp_path / "run", "--html", tmp_path)
    assert "is no folder; make it first" in tiny.refusal("watch", tmp_path / "run", "--html", tmp_path / "x" / "y.html")
    assert tiny.in_process("watch", tmp_path / "run", "--json", "--open")[0] == 2
    assert tiny.in_process("watch", tmp_path / "run", "--html", "x.html", "--port", 9000)[0] == 2
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port}: taken" in tiny.refusal("watch", tmp_path / "run", "--port", port)


def test_every_state_of_a_run_is_told(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (run,) = open_runs([out])
    run.refresh()
    assert run.document()["status"]["state"] == "starting"
    save_run(out, steps=30, total=100)
    assert run.refresh()
    assert run.document()["status"]["state"] == "running"
    os.utime(out / "metrics.jsonl", (time.time() - 3600,) * 2)
    run.refresh()
    assert run.document()["status"]["state"] == "quiet"
    partial = json.loads((out / "moetool.partial.json").read_text())
    partial["writer"] = {"process": 2**22 + 1, "host": socket.gethostname()}
    (out / "moetool.partial.json").write_text(json.dumps(partial))
    assert run.document()["status"]["state"] == "stopped"
    (out / "metrics.jsonl").unlink()
    (out / "moetool.partial.json").unlink()
    (out / "moetool.yaml").unlink()
    out.rmdir()
    assert run.refresh()
    gone = run.document()
    assert gone["status"]["state"] == "gone"
    assert gone["series"] == {}
    assert gone["verdict"] == []


def balance_of(out: Path) -> dict[str, str]:
    run = WatchedRun(out, "run")
    run.refresh()
    return run.document()["verdict"][2]  # type: ignore[no-any-return]


def test_rows_of_an_earlier_version_are_judged_by_a_checkpoint_of_the_run(tmp_path: Path) -> None:
    rows = save_run(tmp_path, steps=30)
    lines = [json.dumps({name: value for name, value in one.items() if name != "load"}) + "\n" for one in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert balance_of(tmp_path)["answer"] == "See the numbers"
    assert "known from its first checkpoint on" in balance_of(tmp_path)["text"]
    step = tmp_path / "checkpoints" / "step-000020"
    step.mkdir(parents=True)
    config = {"model_type": "glm4_moe", "n_routed_experts": 8, "num_experts_per_tok": 2}
    (step / "config.json").write_text(json.dumps(config))
    assert balance_of(tmp_path)["answer"] == "Yes"
    assert "balance would be 25%" in balance_of(tmp_path)["text"]
    # 4 experts, of which number 7 is dead, and an mri below 1/1 at top-4: the checkpoint is of another run.
    changes: list[dict[str, Any]] = [
        {"n_routed_experts": 4}, {"num_experts_per_tok": 8}, {"n_routed_experts": None}, {"x": {}}
    ]  # fmt: skip
    for wrong in changes:
        (step / "config.json").write_text(json.dumps(config | wrong))
        assert balance_of(tmp_path)["answer"] == ("Yes" if "x" in wrong else "See the numbers")
    (step / "config.json").write_text(json.dumps({"text_config": config}))
    (tmp_path / "config.json").write_text("[")
    assert balance_of(tmp_path)["answer"] == "Yes"


def test_an_expert_is_dead_that_is_dead_in_each_of_the_last_rows(tmp_path: Path) -> None:
    """The last row alone would say that all experts but two are; a step may leave any of them out."""
    rows = save_run(tmp_path, steps=30)
    for one in rows:
        if "loss" in one:
            one["dead_experts"] = [[], [3, one["step"] % 8], [1] if one["step"] > 11 else []]
    rows[-2]["dead_experts"][0] = [0, 1, 2, 4, 5, 6]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    run = WatchedRun(tmp_path, "run")
    run.refresh()
    document = run.document()
    assert document["dead_now"] == {"2": [3]}
    assert "Over the last 20 steps" in document["verdict"][2]["text"]
    assert "1 of 24 experts is dead in each of them." in document["verdict"][2]["text"]
    again = json.loads(json.dumps(rows[-2])) | {"step": 25}  # the run went back
    run.rows.add(json.dumps(again).encode())
    assert run.document()["dead_now"] == {"2": [3]}
    assert "Over the last 15 steps" in run.document()["verdict"][2]["text"]


@pytest.mark.parametrize("name", ["moetool.partial.json", "moetool.yaml", "summary.json", "moetool.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{" * 9999, b'{"options": 5, "writer": 5, "lineage": [5]}'])
def test_damaged_files_beside_the_rows_are_left_out(tmp_path: Path, name: str, content: bytes) -> None:
    save_run(tmp_path, steps=3)
    (tmp_path / name).write_bytes(content)
    run = WatchedRun(tmp_path, "run")
    run.refresh()
    assert run.document()["series"]["loss"]["x"] == [1, 2, 3]


def test_runs_are_told_apart_by_as_much_of_their_path_as_it_takes() -> None:
    assert short_names([Path("/a/x"), Path("/b/x"), Path("/b/y")]) == ["a/x", "b/x", "y"]
    assert short_names([Path("/x"), Path("/b/x")]) == ["x", "b/x"]


def test_scores_are_those_of_the_checkpoints(tmp_path: Path) -> None:
    save_run(tmp_path / "a" / "run", steps=3)
    runs = open_runs([tmp_path / "a" / "run"])
    runs[0].refresh()
    score = {"value": 0.5, "stderr": 0.1, "higher_is_better": True, "num_documents": 9}
    models = {"one": "/elsewhere/run/checkpoints/step-000002", "end": str(tmp_path / "a" / "run"), "no": "/other/thing"}
    results = {name: {"arc": {"acc,none": score | {"value": i / 10}}} for i, name in enumerate(models)}
    (tmp_path / "results.json").write_text(json.dumps({"moetool": {"models": models, "results": results}}))
    (found,), _ = read_scores([tmp_path], runs)
    assert found["runs"] == {"run": {"x": [2, 3], "y": [0.0, 0.1], "stderr": [0.1, 0.1]}}
    assert (found["task"], found["metric"], found["higher_is_better"]) == ("arc", "acc", True)
    (tmp_path / "results.json").write_text("{}")
    assert "is not of moetool eval" in tiny.refusal("watch", tmp_path / "a" / "run", "--eval", tmp_path, "--json")


@pytest.fixture
def served(tmp_path: Path) -> tuple[Path, int]:
    save_run(tmp_path / "run", steps=5)
    address: list[str] = []
    there = threading.Event()

    def ready(said: str) -> None:
        address.append(said)
        there.set()

    watcher = Watcher(open_runs([tmp_path / "run"]))
    threading.Thread(target=serve, args=(watcher, None, ready), daemon=True).start()
    assert there.wait(20)
    return tmp_path / "run", int(address[0].rstrip("/").rpartition(":")[2])


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def test_the_server_answers_two_addresses_on_this_machine_alone(served: tuple[Path, int]) -> None:
    run, port = served
    code, page, headers = ask(port, "/")
    assert code == 200
    assert b"<!doctype html>" in page
    assert b"connect-src 'self'" in page
    assert headers["Cache-Control"] == "no-store"
    document = json.loads(ask(port, "/runs.json")[1])
    assert document["runs"][0]["status"]["step"] == 5
    assert ask(port, f"/runs.json?have={document['version']}")[0] == 204
    for path in (
        "/metrics.jsonl",
        "/../run/metrics.jsonl",
        "/%2e%2e/",
        str(run / "metrics.jsonl"),
        "/?x",
        "/runs.json/",
    ):
        assert ask(port, path)[0] == 404
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1.evil.example:{port}", ""):
        assert ask(port, "/runs.json", Host=host)[0] == 403
    assert ask(port, "/", Host=f"localhost:{port}")[0] == 200
    assert ask(port, "/", method="POST")[0] == 501
    with socket.socket() as other, pytest.raises(OSError, match="refused"):
        other.connect(("127.0.0.2", port))


def test_new_rows_a_resume_and_a_deleted_run_are_seen(served: tuple[Path, int]) -> None:
    run, port = served

    def until(steps: int, state: str) -> dict[str, Any]:
        for _ in range(100):
            status = json.loads(ask(port, "/runs.json")[1])["runs"][0]["status"]
            if (status["step"], status["state"]) == (steps, state):
                return status  # type: ignore[no-any-return]
            time.sleep(0.1)
        raise AssertionError(status)

    lines = (run / "metrics.jsonl").read_bytes()
    last = lines.splitlines(keepends=True)[-1]
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(last.replace(b'"step": 5', b'"step": 6') + last[:40])
    assert until(6, "running")["skipped_lines"] == 0
    (run / "new").write_bytes(b"".join(lines.splitlines(keepends=True)[:3]))
    os.replace(run / "new", run / "metrics.jsonl")
    until(2, "running")
    for path in run.iterdir():
        path.unlink()
    run.rmdir()
    until(0, "gone")


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    save_run(tmp_path / "run", steps=5)
    command = [sys.executable, "-m", "moetool", "watch", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    said = process.stdout.readline()
    port = int(said.split("/")[2].rpartition(":")[2])
    assert ask(port, "/")[0] == 200
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    imported = "import sys, moetool.watch.server, moetool.watch.open; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imported], check=False).returncode == 0
