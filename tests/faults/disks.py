"""Disks that are full or read-only, and folders that vanish. A disk is a small tmpfs, which root alone can mount."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from random import Random

from tests.faults.kills import refused
from tests.faults.world import World, content, mounted, remount
from tests.forked import Done, wait_until


def _filled(disk: Path, leave: int = 0) -> None:
    """Fill a disk but for some bytes."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 65536)
        except OSError:
            pass
        file.truncate(max(0, file.tell() - leave))


def _said(done: Done) -> str:
    line = done.line()
    assert "no space left" in line or "free" in line, line
    return line


def rewriting(world: World, chance: Random, command: str) -> str:
    """The disk fills up while shards are written."""
    with mounted(world.new(), 160_000) as disk:
        out = disk / "out"
        job = [*world.rewriting(command, out)[0], "--max-shard-size", "1MB"]
        running = world.start(*job)
        there = chance.randrange(12)
        wait_until(lambda: len(list(out.glob("*.safetensors"))) >= there, running)
        _filled(disk)
        done = running.wait()
        if done.code == 0:
            return "finished before the disk was full"
        _said(done)
        assert refused(out)
        assert not list(out.glob("*.unfinished"))
        (disk / "filler").unlink()
        world.good(*job)
        assert not refused(out)
    return "one line; not loadable; with space freed, the same command finished"


def too_small(world: World, chance: Random, command: str) -> str:
    """A disk that is too small from the beginning."""
    with mounted(world.new(), chance.randrange(8, 3000)) as disk:
        _said(world.run(*world.rewriting(command, disk / "out")[0]))
        assert not list(disk.glob("out/*"))
    return "refused before anything was written, with what is needed and what is free"


def cpt(world: World, chance: Random) -> str:
    """The disk fills up while a training writes step folders, its log or its result."""
    job = world.commands(Path())["cpt"]
    with mounted(world.new(), 60_000) as disk:
        out = disk / "out"
        job[2] = out
        running = world.start(*job)
        saved = chance.randrange(4)
        wait_until(lambda: len(list((out / "checkpoints").glob("step-*"))) >= min(saved, 2), running)
        time.sleep(chance.uniform(0, 1))
        _filled(disk, chance.randrange(1_500_000))
        done = running.wait()
        if done.code == 0:
            return "finished before the disk was full"
        _said(done)
        assert refused(out)
        (disk / "filler").unlink()
        world.good(*job)
        assert not refused(out)
    return "one line; not loadable; with space freed, the same command finished"


def report(world: World, chance: Random) -> str:
    """The disk fills up while a report replaces an earlier one."""
    return _replacing(world, chance, "analyze-routing", ["--max-tokens", 3000], 300_000)


def results(world: World, chance: Random) -> str:
    """The disk fills up while results replace earlier ones."""
    return _replacing(world, chance, "eval", ["--limit", 60], 30_000)


def _replacing(world: World, chance: Random, command: str, change: list[object], room: int) -> str:
    with mounted(world.new(), 20_000) as disk:
        out = disk / "out"
        world.good(*world.commands(out)[command])
        before = content(out)
        _filled(disk, chance.randrange(room))
        done = world.run(*world.commands(out)[command], *change)
        if done.code == 0:
            return "there was enough room"
        _said(done)
        after = content(out)
        good = [name for name in before if name.endswith(("report.json", "report.html", "results.json", ".png"))]
        assert all(after[name] == before[name] for name in good), command
        (disk / "filler").unlink()
        world.good(*world.commands(out)[command], *change)
    return "one line; the earlier files were as before; with space freed, the same command finished"


def tokenize(world: World, chance: Random) -> str:
    """The disk is full before or during a tokenisation."""
    with mounted(world.new(), 20_000) as disk:
        job = world.commands(disk / "out")["tokenize"]
        _filled(disk, chance.randrange(20_000))
        done = world.run(*job)
        if done.code == 0:
            return "there was enough room"
        _said(done)
        assert [path.name for path in disk.iterdir()] == ["filler"]
        (disk / "filler").unlink()
        world.good(*job)
    return "one line; nothing was left; with space freed, the same command finished"


def temporary(world: World, chance: Random) -> str:
    """TMPDIR and the caches are on a full disk, OUT is not."""
    command = chance.choice(["upcycle", "cpt", "tokenize", "analyze-routing", "eval"])
    with mounted(world.new(), 64) as disk:
        _filled(disk)
        out = world.new()
        places = {"TMPDIR": disk, "MOETOOL_CACHE": disk / "cache", "HF_HOME": disk / "hf"}
        done = world.run(*world.commands(out)[command], **{name: str(path) for name, path in places.items()})
        shutil.rmtree(out, ignore_errors=True)
        if done.code == 0:
            return "not needed: finished"
        _said(done)
    return "one line"


def read_only(world: World, chance: Random) -> str:
    """OUT is to be made on a disk that is read-only, or lies on one that has become so."""
    command = chance.choice(["upcycle", "cpt", "tokenize", "analyze-routing", "eval", "quickstart"])
    with mounted(world.new(), 20_000) as disk:
        out = disk / "out"
        job = [*world.commands(out)[command]]
        if there := chance.random() < 0.5:
            out.mkdir()
            if command in ("analyze-routing", "eval"):
                world.good(*job)
        before = content(disk)
        remount(disk, "ro")
        line = world.run(*job).line()
        assert "read-only" in line or "cannot be written" in line, line
        assert content(disk) == before
    return f"one line, nothing changed ({'OUT there' if there else 'OUT new'})"


def turns_read_only(world: World, chance: Random) -> str:
    """The disk becomes read-only while a command works, as a damaged one does."""
    command = chance.choice(["upcycle", "cpt", "analyze-routing", "eval"])
    with mounted(world.new(), 60_000) as disk:
        out = disk / "out"
        job = world.commands(out)[command]
        running = world.start(*job)
        wait_until(lambda: out.exists() and any(out.iterdir()), running)
        time.sleep(chance.uniform(0, 0.5))
        for _ in range(200):  # refused while a file is open for writing
            if os.system(f"mount -o remount,ro {disk} 2>/dev/null") == 0:
                break
            time.sleep(0.002)
        else:
            running.wait()
            return "could not be done: a file was open for writing"
        done = running.wait()
        if done.code == 0:
            return "finished before"
        assert "read-only" in done.line(), done.err
        remount(disk, "rw")
        world.good(*job)
    return "one line; once it was writable again, the same command finished"


def vanished(world: World, chance: Random) -> str:
    """OUT is deleted or moved away while a command works."""
    command = chance.choice(["upcycle", "cpt", "analyze-routing", "eval", "tokenize"])
    out, away = world.new(), world.new()
    job = world.commands(out)[command]
    if command == "upcycle":
        job[1] = world.folder / "large"
    running = world.start(*job)
    wait_until(lambda: out.exists(), running)
    time.sleep(chance.uniform(0, 0.7))
    if moved := chance.random() < 0.5:
        if out.exists():
            out.rename(away)
    else:
        shutil.rmtree(out, ignore_errors=True)
    done = running.wait()
    if done.code != 0:
        line = done.line()
        told = ("no such file", "was deleted", "which is missing", "not empty")
        assert any(words in line for words in told), line
    good = away if moved and away.exists() and any(away.iterdir()) else out
    if done.code == 0 and command == "analyze-routing":
        json.loads((good / "report.json").read_text())
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(away, ignore_errors=True)
    world.good(*job)
    shutil.rmtree(out)
    return "finished" if done.code == 0 else "one line; the same command then started over"
