"""Processes that are killed, told to stop, or lose one of theirs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

from safetensors.torch import load_file

from moetool.checkpoint.reader import CheckpointReader
from moetool.errors import CheckpointError
from tests.faults.world import STEPS, World
from tests.forked import TIMEOUT, wait_until


def refused(out: Path) -> bool:
    """Whether a folder is refused as a checkpoint, as it must be while it is unfinished."""
    try:
        CheckpointReader(out)
    except CheckpointError:
        return True
    return False


def rewriting(world: World, chance: Random, command: str) -> str:
    """SIGKILL at a random instant while a checkpoint is written; then the same command."""
    number = chance.randrange(len(world.rewriting(command, Path())))

    def job(out: Path) -> list[object]:
        return [*world.rewriting(command, out)[number], "--max-shard-size", "10MB" if command == "upcycle" else "3MB"]

    key = f"{command} {number}"
    if key not in world.known:
        whole = world.new()
        running = world.start(*job(whole))
        wait_until(whole.exists, running)
        began = time.monotonic()
        assert running.wait().code == 0
        world.known[key] = time.monotonic() - began, {p.name: p.read_bytes() for p in whole.glob("*.safetensors")}
        shutil.rmtree(whole)
    lasts, expected = world.known[key]
    out = world.new()
    running = world.start(*job(out))
    wait_until(out.exists, running)
    time.sleep(chance.uniform(0, lasts))
    running.send(signal.SIGKILL)
    killed = running.wait().code == -signal.SIGKILL
    finished = (out / "config.json").exists() and not (out / "moetool.partial.json").exists()
    assert finished or refused(out)
    complete = len(list(out.glob("*.safetensors")))
    world.good(*job(out))
    assert {p.name: p.read_bytes() for p in out.glob("*.safetensors")} == expected
    shutil.rmtree(out)
    if not killed:
        return "finished before the kill"
    if finished:
        return "killed after the last file: whole, the same bytes"
    return f"not loadable; the same command gave the same bytes{' from the shards that were complete' * (complete > 0)}"


def cpt(world: World, chance: Random) -> str:
    """SIGKILL at a random instant of a training; then the same command, to the same weights bit for bit."""
    arguments: list[object] = ["cpt", world.moe, "--train", f"new={world.text}", *STEPS, "--max-steps", 60]
    if "cpt" not in world.known:
        whole = world.new()
        running = world.start(*arguments[:2], whole, *arguments[2:])
        wait_until(lambda: (whole / "metrics.jsonl").exists(), running)
        began = time.monotonic()
        assert running.wait().code == 0
        world.known["cpt"] = time.monotonic() - began, whole
    lasts, whole = world.known["cpt"]
    out = world.new()
    kills = 0
    running = world.start(*arguments[:2], out, *arguments[2:])
    wait_until(lambda: (out / "metrics.jsonl").exists(), running)
    time.sleep(chance.uniform(0, lasts))
    running.send(signal.SIGKILL)
    kills += running.wait().code == -signal.SIGKILL
    finished = (out / "config.json").exists() and not (out / "moetool.partial.json").exists()
    assert finished or refused(out)
    saved = sorted((out / "checkpoints").glob("step-*"))
    for step in saved:
        CheckpointReader(step)
    world.good(*arguments[:2], out, *arguments[2:])
    ours, theirs = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(bool((value == theirs[name]).all()) for name, value in ours.items())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 61))
    shutil.rmtree(out)
    if not kills:
        return "finished before the kill"
    if finished:
        return "killed after the last file: whole"
    where = "from a step folder" if saved else "from the beginning"
    return f"not loadable; the same command continued {where} to the same weights, bit for bit"


def report(world: World, chance: Random) -> str:
    """SIGKILL while a report replaces an earlier one."""
    return _replacing(world, chance, "analyze-routing", ["report.json", "report.html"], ["--max-tokens", 3000])


def results(world: World, chance: Random) -> str:
    """SIGKILL while results replace earlier ones."""
    return _replacing(world, chance, "eval", ["results.json"], ["--limit", 60])


def _replacing(world: World, chance: Random, command: str, files: list[str], change: list[object]) -> str:
    if command not in world.known:
        good, began = world.new(), time.monotonic()
        world.good(*world.commands(good)[command], *change)
        world.known[command] = time.monotonic() - began, good
    lasts, _ = world.known[command]
    out = world.new()
    world.good(*world.commands(out)[command])
    before = {name: (out / name).read_bytes() for name in files}
    running = world.start(*world.commands(out)[command], *change)
    # The most of these runs is work before the first file; the second half of them writes.
    time.sleep(chance.uniform(lasts * 0.5, lasts))
    running.send(signal.SIGKILL)
    killed = running.wait().code == -signal.SIGKILL
    after = {name: (out / name).read_bytes() for name in files}
    for name in files:
        assert after[name]
        if name.endswith(".json"):
            json.loads(after[name])
    world.good(*world.commands(out)[command], *change)
    left = [path.name for path in out.rglob("*.unfinished")]
    assert not left, left
    shutil.rmtree(out)
    if not killed:
        return "finished before the kill"
    return f"killed: the {'earlier' if after == before else 'new'} files were whole; the same command finished"


def tokenize(world: World, chance: Random) -> str:
    """SIGKILL at a random instant of a tokenisation."""
    if "tokenize" not in world.known:
        text, began = world.folder / "long.txt", time.monotonic()
        text.write_text("The quick brown fox jumps over the lazy dog.\n" * 60_000)
        good = world.new()
        world.good("tokenize", text, "--out", good, "--tokenizer", world.dense, "--document", "line", before="", X="1")
        world.known["tokenize"] = time.monotonic() - began, good
    lasts, good = world.known["tokenize"]
    out = world.new()
    job = ["tokenize", world.folder / "long.txt", "--out", out, "--tokenizer", world.dense, "--document", "line"]
    running = world.start(*job)
    time.sleep(chance.uniform(0, lasts))
    running.send(signal.SIGKILL)
    killed = running.wait().code == -signal.SIGKILL
    whole = (out / "manifest.json").exists()
    assert whole or not out.exists() or not list(out.iterdir())
    world.good(*job)
    assert (out / "tokens.bin").read_bytes() == (good / "tokens.bin").read_bytes()
    shutil.rmtree(out)
    if not killed:
        return "finished before the kill"
    return "killed: nothing or all of it was there; the same command gave the same tokens"


def told_to_stop(world: World, chance: Random) -> str:
    """SIGINT or SIGTERM, once or twice, at any instant of a process's life, its first and last included."""
    out = world.new()
    arguments: list[object] = chance.choice(
        [
            ["inspect", world.moe],
            ["upcycle", world.shards, out, "--max-shard-size", "100KB"],
            ["tokenize", world.text, "--out", out, "--tokenizer", world.dense],
            ["analyze-routing", world.moe, "--data", f"t={world.text}", "--out", out, "--max-tokens", 2000],
        ]
    )
    key = f"life of {arguments[0]}"
    command = [sys.executable, "-m", "moetool", *map(str, arguments)]
    if key not in world.known:
        began = time.monotonic()
        subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT)
        world.known[key] = time.monotonic() - began
        shutil.rmtree(out, ignore_errors=True)
    signum = chance.choice([signal.SIGINT, signal.SIGTERM])
    twice = chance.random() < 0.4
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(chance.uniform(0.02, float(world.known[key]) * 1.1))
        process.send_signal(signum)
        if twice:
            time.sleep(chance.uniform(0, 0.05))
            process.send_signal(signum)
        _, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    shutil.rmtree(out, ignore_errors=True)
    code = 130 if signum == signal.SIGINT else 143
    # Before Python has started, and at a second SIGTERM, the system itself ends a process.
    assert process.returncode in (0, code, -signum), (arguments, signum, process.returncode, err)
    if "KeyboardInterrupt" in err and "/moetool/" not in err:
        return "ended by the system or by Python (before moetool began, or at the second signal)"
    assert "Traceback" not in err, (arguments, err)
    assert len(err.strip().splitlines()) <= 1, (arguments, err)
    if process.returncode == 0:
        return "finished with 0"
    if process.returncode == -signum:
        return "ended by the system or by Python (before moetool began, or at the second signal)"
    assert err, (arguments, twice)
    return f"{code} and one line"


def one_of_two(world: World, chance: Random) -> str:
    """One of two training processes dies as the system's killer would end it; the other must not hang."""
    import socket

    out = world.new()
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    job = ["-m", "moetool", *map(str, [*world.commands(out)["cpt"], "--max-steps", 4000])]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    launched = subprocess.Popen(
        [*command, *job], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + TIMEOUT
        while not list((out / "checkpoints").glob("step-*")) and time.monotonic() < until:
            time.sleep(0.05)
        children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
        assert len(children) == 2, children
        main = _lock_holder(out, children)
        rank = chance.randrange(2)
        time.sleep(chance.uniform(0, 2))
        os.kill(int(main if rank == 0 else next(c for c in children if c != main)), signal.SIGKILL)
        began = time.monotonic()
        _, err = launched.communicate(timeout=TIMEOUT)
        seconds = time.monotonic() - began
    finally:
        launched.kill()
    assert launched.returncode != 0
    assert "bug in moetool" not in err, err
    assert not (out / "config.json").exists()
    for step in (out / "checkpoints").glob("step-*"):
        CheckpointReader(step)
    done = world.run(*world.commands(out)["cpt"], "--max-steps", 4000, "--json", before="tests.faults.kills:stop_soon:")
    assert done.code == 130, done.err  # it went on, and was stopped by us
    assert "continues from the checkpoint" in done.err.replace("\n", " "), done.err
    shutil.rmtree(out)
    assert seconds < 120
    which = "the first" if rank == 0 else "the second"
    return f"{which} killed: the other ended within two minutes, the run could be continued"


def stop_soon(_: str) -> None:
    """Send this process a Ctrl-C once it has trained for a moment."""
    import threading

    def stop() -> None:
        time.sleep(8)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()


def _lock_holder(folder: Path, processes: list[str]) -> str:
    inode = folder.stat().st_ino
    for process in processes:
        for entry in Path(f"/proc/{process}/fd").iterdir():
            try:
                if entry.stat().st_ino == inode:
                    return process
            except OSError:
                continue
    raise AssertionError("no process holds the folder")
