"""Memory that is out, clocks that jump, streams that are closed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.kills import refused
from tests.faults.world import World
from tests.forked import TIMEOUT


def limit_memory(megabytes: str) -> None:
    """Let this process have no more than some megabytes of addresses beyond those that it has."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + int(float(megabytes) * 1e6)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def memory(world: World, chance: Random) -> str:
    """The system refuses memory (RLIMIT_AS) to a command, its workers included."""
    command = chance.choice(["upcycle", "cpt", "tokenize", "analyze-routing", "eval"])
    out = world.new()
    job = world.commands(out)[command]
    if command == "upcycle":
        job[1:2] = [world.folder / "large"]
        job += ["--workers", 4]
    done = world.run(*job, before=f"tests.faults.other:limit_memory:{chance.uniform(0, 60)}")
    if done.code == 0:
        shutil.rmtree(out, ignore_errors=True)
        return "the memory was enough"
    if done.code < 0 or done.code == 134:  # a library that ends the process when it gets none
        assert command in ("tokenize", "cpt", "analyze-routing", "eval"), done
    else:
        line = done.line()
        assert any(sign in line for sign in ("memory", "allocate", "thread")), line
    assert not out.exists() or refused(out)
    shutil.rmtree(out, ignore_errors=True)
    world.good(*job)
    shutil.rmtree(out)
    how = "one line" if done.code == 1 else "a library ended the process"
    return f"{how}; nothing loadable; with enough memory, the same command finished"


def fail_worker(number: str) -> None:
    """Let the n-th block that an upcycling makes (in each of its processes) find no memory."""
    from moetool.surgery import kinds

    real, left = kinds.Kind.make, int(number)

    def block(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise MemoryError
        return real(*arguments)

    setattr(kinds.Kind, "make", block)  # noqa: B010


def worker(world: World, chance: Random) -> str:
    """One of the workers of an upcycling gets no memory for a block."""
    out = world.new()
    job: list[object] = ["upcycle", world.folder / "large", out, "--max-shard-size", "10MB", "--workers", 4]
    number = chance.randrange(1, 40)
    line = world.run(*job, before=f"tests.faults.other:fail_worker:{number}").line()
    assert "out of memory" in line, line
    assert "--workers" in line, line
    assert refused(out)
    assert not list(out.glob("*.unfinished"))
    world.good(*job)
    shutil.rmtree(out)
    return "one line; not loadable; the same command finished"


def jumping_clock(seed: str) -> None:
    """Let the clock jump by up to a year, to and fro, each time that it is looked at; the steady one goes on."""
    chance, now, now_ns = Random(int(seed)), time.time, time.time_ns

    def jump() -> float:
        return chance.uniform(-3e7, 3e7)

    time.time = lambda: now() + jump()
    time.time_ns = lambda: now_ns() + int(jump() * 1e9)


def clock(world: World, chance: Random) -> str:
    """The system's clock jumps while a command runs; what it gives must be what it gives without."""
    command = chance.choice(["upcycle", "cpt", "tokenize", "analyze-routing", "eval"])
    out = world.new()
    job = [*world.commands(out)[command], "--json", "--quiet"]
    key = f"clock {command}"
    if key not in world.known:
        world.known[key] = _timeless(json.loads(world.good(*job).out))
        shutil.rmtree(out)
    done = world.run(*job, before=f"tests.faults.other:jumping_clock:{chance.randrange(10**6)}")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    for name in ("seconds", "tokens_per_second"):
        assert document.get(name) is None or 0 < document[name] < 1e9, document[name]
    assert _timeless(document) == world.known[key], command
    again = json.loads(world.good(*job).out)
    if command == "eval":
        assert again["num_kept"] == 1, again
    shutil.rmtree(out)
    return "the same result; times and speeds by the steady clock; kept results are found again"


def _timeless(value: object) -> object:
    """A document without times, speeds and where it lies."""
    told = ("seconds", "tokens_per_second", "out", "files", "num_kept", "path", "free_disk_bytes")
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in told}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def closed(world: World, chance: Random) -> str:
    """Standard input, output or error is closed, full, or a pipe whose reader leaves."""
    out = world.new()
    jobs: list[list[object]] = [
        ["inspect", world.moe, "--tensors"],
        ["inspect", world.moe, "--tensors", "--json"],
        ["upcycle", world.shards, out, "--num-experts", 16, "--json"],
        ["analyze-routing", world.moe, "--data", f"t={world.text}", "--out", out, "--max-tokens", 500, "--json"],
        ["--help"],
    ]
    job = chance.choice(jobs)
    how = chance.choice(["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "| head -1", "| true", ">/dev/full", "2>/dev/full"])
    words = " ".join(f"'{word}'" for word in [sys.executable, "-m", "moetool", *job])
    script = f"set -o pipefail; {words} {how}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    shutil.rmtree(out, ignore_errors=True)
    assert "Traceback" not in done.stderr, (job, how, done.stderr)
    assert "Exception" not in done.stderr, (job, how, done.stderr)
    if how == ">/dev/full":
        assert done.returncode == 1, (job, how, done)
        last = done.stderr.strip().splitlines()[-1]
        assert "standard output: no space left" in last, (job, how, done.stderr)
        return "full: 1 and one line"
    assert done.returncode == 0, (job, how, done)
    return "0, no traceback"
