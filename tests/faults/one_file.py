"""Faults of commands whose OUT is one file: `sample`, and `plan --html`."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from random import Random

from moetool.sample.output import hidden
from tests.faults.disks import _filled, _said
from tests.faults.locks import _held
from tests.faults.shards import flip
from tests.faults.world import World, content, mounted, remount
from tests.forked import Running, wait_until


def _job(world: World, out: Path, model: Path | None = None) -> list[object]:
    size = ("--max-tokens", 2000, "--seq-len", 64, "--batch-size", 8)
    return ["sample", model or world.moe, out, *size, "--device", "cpu", "--quiet"]


def _undisturbed(world: World) -> tuple[float, bytes]:
    """How long the run samples, and its text."""
    if "sample" not in world.known:
        out = world.new().with_suffix(".jsonl")
        running = world.start(*_job(world, out))
        _begun(out, running)
        began = time.monotonic()
        assert running.wait().code == 0
        world.known["sample"] = time.monotonic() - began, out.read_bytes()
    found: tuple[float, bytes] = world.known["sample"]
    return found


def _begun(out: Path, running: Running) -> bool:
    return wait_until((hidden(out) / "state.json").exists, running)


def kill(world: World, chance: Random) -> str:
    """SIGKILL at a random instant of the sampling; then the same command."""
    lasts, text = _undisturbed(world)
    out = world.new().with_suffix(".jsonl")
    running = world.start(*_job(world, out))
    _begun(out, running)
    time.sleep(chance.uniform(0, lasts))
    running.send(signal.SIGKILL)
    if running.wait().code != -signal.SIGKILL:
        return "finished before the kill"
    assert not out.exists() or out.read_bytes() == text
    world.good(*_job(world, out))
    assert out.read_bytes() == text
    assert not hidden(out).exists()
    return "OUT absent or whole; the same command continued to the same text"


def full(world: World, chance: Random) -> str:
    """The disk fills up while text is written."""
    _, text = _undisturbed(world)
    with mounted(world.new(), 400) as disk:
        out = disk / "out.jsonl"
        running = world.start(*_job(world, out))
        if chance.random() < 0.7:
            _begun(out, running)
        _filled(disk)
        done = running.wait()
        if done.code == 0:
            return "finished before the disk was full"
        _said(done)
        assert not out.exists()
        (disk / "filler").unlink()
        world.good(*_job(world, out))
        assert out.read_bytes() == text
    return "one line; OUT absent; with space freed, the same command continued to the same text"


def two(world: World, chance: Random) -> str:
    """The first is held still while it has the lock; the second must be refused; then the first goes on."""
    _, text = _undisturbed(world)
    out = world.new().with_suffix(".jsonl")
    first = world.start(*_job(world, out), before="tests.faults.locks:stop_once_locked:")
    assert wait_until(lambda: _held(hidden(out), first.pid), first)
    line = world.run(*_job(world, out)).line()
    assert f"is being written by another process (process {first.pid}, " in line, line
    first.send(signal.SIGCONT)
    assert first.wait().code == 0
    assert out.read_bytes() == text
    return "the second was refused with the first one's process number, command and start time; the first finished"


def changed(world: World, chance: Random) -> str:
    """The model is another one when a killed run continues."""
    model, out = world.new(), world.new().with_suffix(".jsonl")
    shutil.copytree(world.moe, model)
    lasts, _ = _undisturbed(world)
    running = world.start(*_job(world, out, model))
    _begun(out, running)
    time.sleep(chance.uniform(0, lasts / 4))
    running.send(signal.SIGKILL)
    if running.wait().code != -signal.SIGKILL:
        return "finished before the kill"
    if chance.random() < 0.5:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    else:
        shard = chance.choice(sorted(model.glob("*.safetensors")))
        flip(shard, 8 + int.from_bytes(shard.read_bytes()[:8], "little"), 0)
    line = world.run(*_job(world, out, model)).line()
    assert "MODEL (other files)" in line, line
    assert not out.exists()
    shutil.rmtree(model)
    return "refused: begun with another MODEL"


def read_only(world: World, chance: Random) -> str:
    """OUT is to be made on a disk that is read-only."""
    with mounted(world.new(), 400) as disk:
        (disk / "mine.html").write_text("kept")
        before = content(disk)
        remount(disk, "ro")
        jobs = [
            _job(world, disk / "out.jsonl"),
            _plan(world, disk / "mine.html"),
            _plan(world, disk / "new" / "x.html"),
        ]
        line = world.run(*chance.choice(jobs)).line()
        assert "read-only" in line or "cannot be written" in line, line
        assert content(disk) == before
    return "one line, nothing changed"


def _plan(world: World, page: Path, model: Path | None = None) -> list[object]:
    return ["plan", model or world.dense, "--train-tokens", "1B", "--html", page]


def page(world: World, chance: Random) -> str:
    """The disk is full when a page replaces an earlier one."""
    with mounted(world.new(), 400) as disk:
        out = disk / "plan.html"
        world.good(*_plan(world, out))
        before = out.read_bytes()
        _filled(disk, chance.randrange(4096))
        _said(world.run(*_plan(world, out), "--top-k", 1))
        assert out.read_bytes() == before
        assert sorted(path.name for path in disk.iterdir()) == ["filler", "plan.html"]
        (disk / "filler").unlink()
        world.good(*_plan(world, out), "--top-k", 1)
        assert out.read_bytes() != before
    return "one line; the earlier page was as before; with space freed, the same command finished"


def damaged(world: World, chance: Random) -> str:
    """A bit of the header of the planned model is wrong."""
    model = world.new()
    shutil.copytree(world.dense, model)
    shard = model / "model.safetensors"
    flip(shard, chance.randrange(8 + int.from_bytes(shard.read_bytes()[:8], "little")), chance.randrange(8))
    out = world.new().with_suffix(".html")
    done = world.run(*_plan(world, out, model))
    shutil.rmtree(model)
    if done.code == 0:  # in a word that means nothing here, such as a dtype of the same size
        return "a page that describes what the header says"
    done.line()
    assert not out.exists()
    return "refused in one line, nothing written"
