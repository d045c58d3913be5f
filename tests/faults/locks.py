"""Two processes that write one folder at the same time."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from random import Random

from moetool.checkpoint.folder import FolderLock
from tests.faults.world import World
from tests.forked import wait_until


def _held(out: Path, process: int) -> bool:
    """Whether a process has the lock on a folder, as /proc/locks says."""
    try:
        inode = out.stat().st_ino
    except FileNotFoundError:
        return False
    lines = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return any(w[1] == "FLOCK" and w[4] == str(process) and w[5].endswith(f":{inode}") for w in lines)


def stop_once_locked(_: str) -> None:
    """Let this process hold still once it has locked its folder."""
    real = FolderLock.__enter__

    def enter(self: FolderLock) -> FolderLock:
        lock = real(self)
        os.kill(os.getpid(), signal.SIGSTOP)
        return lock

    setattr(FolderLock, "__enter__", enter)  # noqa: B010


def two_writers(world: World, command: str) -> str:
    """The first is held still while it has the folder; the second must be refused; then the first goes on."""
    out = world.new()
    job = world.commands(out)[command]
    first = world.start(*job, before="tests.faults.locks:stop_once_locked:")
    assert wait_until(lambda: _held(out, first.pid), first), command
    line = world.run(*job).line()
    assert f"is being written by another process (process {first.pid}, " in line, line
    assert ", since 20" in line, line
    refused = "the second was refused with the first one's process number, command and start time"
    if command == "quickstart":  # it takes minutes: the lock alone is looked at
        first.send(signal.SIGKILL)
        first.send(signal.SIGCONT)
        first.wait()
    else:
        first.send(signal.SIGCONT)
        assert first.wait().code == 0
    # Nobody holds it now, however the first has ended.
    third = world.start(*job)
    if command == "quickstart":
        assert wait_until(lambda: _held(out, third.pid), third)
        third.send(signal.SIGKILL)
        third.wait()
        shutil.rmtree(out)
        return f"{refused}; once the first was killed, a third got the folder"
    assert third.wait().code == 0
    shutil.rmtree(out)
    return f"{refused}; the first finished undisturbed"


def all_at_once(world: World, chance: Random) -> str:
    """Four start within the same moment; whoever writes, writes alone, and all that is there is whole."""
    command = chance.choice(["upcycle", "cpt", "tokenize", "analyze-routing", "eval"])
    out = world.new()
    job = world.commands(out)[command]
    running = [world.start(*job) for _ in range(4)]
    ends = [one.wait() for one in running]
    assert any(done.code == 0 for done in ends), ends
    for done in ends:
        if done.code:
            assert "is being written by another process" in done.line(), done.err
    world.good(*job)
    assert not list(out.rglob("*.unfinished"))
    shutil.rmtree(out)
    return "one wrote, the others were refused or found it finished"


def after_a_kill(world: World, chance: Random) -> str:
    """A lock whose holder was killed does not block."""
    command = chance.choice(["upcycle", "cpt", "tokenize", "analyze-routing", "eval"])
    out = world.new()
    job = world.commands(out)[command]
    first = world.start(*job)
    assert wait_until(lambda: _held(out, first.pid), first), command
    first.send(signal.SIGKILL)
    first.wait()
    world.good(*job)
    shutil.rmtree(out)
    assert not os.path.exists(out)
    return "the same command continued at once"
