"""What the command line makes of memory that is out, of a process that is gone, and of pipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny


def broken(monkeypatch: pytest.MonkeyPatch, error: Exception) -> tuple[int, str]:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("moetool.checkpoint.reader.CheckpointReader.__init__", fail)
    code, _, err = tiny.in_process("inspect", os.getcwd())
    return code, err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("can't start new thread"),
    ],
    ids=str,
)
def test_memory_that_is_out_is_no_bug(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    code, err = broken(monkeypatch, error)
    assert code == 1
    assert err.startswith("moetool: out of memory")
    assert len(err.splitlines()) == 1


def test_another_process_that_ended_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:39080: Connection reset by peer")
    assert broken(monkeypatch, error)[0] == 70  # alone, there is no other process
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, err = broken(monkeypatch, error)
    assert code == 1
    assert "another process of this launch has ended" in err


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-"])
def test_a_message_that_no_one_can_read_does_not_end_the_work(tmp_path: Path, where: str) -> None:
    counts = tmp_path / "counts.json"
    counts.write_text('{"code": {"0": [5, 3, 1, 1]}}')
    script = f"'{sys.executable}' -m moetool analyze-routing --counts {counts} --top-k 2 --out {tmp_path}/out --json"
    done = subprocess.run(["bash", "-c", f"{script} {where}"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert "domains" in done.stdout
    script = f"'{sys.executable}' -m moetool inspect {tmp_path} {where}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1  # the error cannot be said; its exit code is


def test_a_warning_that_no_one_can_read_does_not_end_the_work() -> None:
    program = """
import typer
from moetool.commands.console import Console
app = typer.Typer()
@app.command()
def main(context: typer.Context):
    console = Console(context, True, False)
    console.warn("one")
    console.say("two")
    print("done")
app()
"""
    script = f"'{sys.executable}' -c '{program}' 2>/dev/full"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n")


@pytest.mark.parametrize("words", ["--help", "cpt --help"])
def test_help_whose_reader_leaves(words: str) -> None:
    script = f"set -o pipefail; '{sys.executable}' -m moetool {words} | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_standard_output_is_flushed(signum: signal.Signals, code: int, llama: Path) -> None:
    """The last instant before the end: a reader that does not read holds the process there."""
    program = f"""
import os, signal, sys
from moetool import cli
class Stuck:
    def __getattr__(self, name): return getattr(sys.__stdout__, name)
    def flush(self):
        sys.stdout = sys.__stdout__
        os.kill(os.getpid(), {int(signum)})
run = cli.run
def then_stuck(arguments):
    code = run(arguments)
    sys.stdout = Stuck()
    return code
cli.run = then_stuck
sys.argv = ["moetool", "inspect", {str(llama)!r}]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == 1


def test_a_signal_after_the_last_instant_comes_too_late(llama: Path) -> None:
    program = f"""
import atexit, os, signal, sys
from moetool import cli
for signum in (signal.SIGTERM, signal.SIGINT):
    atexit.register(os.kill, os.getpid(), signum)
sys.argv = ["moetool", "inspect", {str(llama)!r}]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
