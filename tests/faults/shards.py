"""Shards that are cut short, changed or exchanged: of a source, and of a finished folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from random import Random

from safetensors.torch import load_file

from moetool.checkpoint.reader import INDEX
from tests.faults.kills import refused
from tests.faults.world import World
from tests.forked import wait_until


def _shard(folder: Path, chance: Random) -> Path:
    return chance.choice(sorted(folder.glob("*.safetensors")))


def _header(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def flip(path: Path, byte: int, bit: int) -> None:
    """Turn one bit of a file over."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def _readers(world: World, folder: Path, out: Path) -> dict[str, list[object]]:
    """The commands that read a finished folder."""
    data = f"text={world.text}"
    return {
        "inspect": ["inspect", folder],
        "verify": ["verify", folder, "--source", world.shards],
        "cpt": ["cpt", folder, out, "--train", f"new={world.text}", "--max-steps", 1, "--seq-len", 16],
        "analyze-routing": ["analyze-routing", folder, "--data", data, "--out", out, "--max-tokens", 500],
        "eval": ["eval", folder, "--text", data, "--limit", 4, "--out", out],
    }


def truncated_source(world: World, chance: Random) -> str:
    """A source's shard ends early, as an interrupted download does."""
    source, out = world.new(), world.new()
    shutil.copytree(world.shards, source)
    path = _shard(source, chance)
    os.truncate(path, chance.randrange(path.stat().st_size))
    line = world.run("upcycle", source, out).line()
    assert path.name in line, line
    assert not out.exists()
    shutil.rmtree(source)
    return "refused before anything was written, with the shard's name"


def truncated_meanwhile(world: World, chance: Random, command: str) -> str:
    """A source's shard is cut short, or replaced by another, while it is read."""
    source, out = world.new(), world.new()
    shutil.copytree(world.folder / "large", source)
    path = source / "model.safetensors"
    cut = chance.random() < 0.5
    running = world.start(command, source, out, "--max-shard-size", "5MB", "--workers", 1)
    wait_until(lambda: (out / "moetool.partial.json").exists(), running)
    time.sleep(chance.uniform(0, 0.5))
    if cut:
        os.truncate(path, chance.randrange(path.stat().st_size))
    else:
        data = bytearray(path.read_bytes())
        data[-1000] ^= 64
        path.write_bytes(data)
    done = running.wait()
    shutil.rmtree(source)
    if done.code == 0:
        shutil.rmtree(out)
        return "finished before"
    line = done.line()
    assert "model.safetensors" in line or "changed" in line, line
    loadable = not refused(out)
    shutil.rmtree(out)
    # The proof reads the source once more, after the result is complete.
    return f"one line that names it; {'found by the proof' if loadable else 'OUT not loadable'}"


def flipped_header(world: World, chance: Random) -> str:
    """One bit of the header of a source's shard is wrong."""
    source, out = world.new(), world.new()
    shutil.copytree(world.shards, source)
    path = _shard(source, chance)
    flip(path, chance.randrange(_header(path)), chance.randrange(8))
    done = world.run("upcycle", source, out, "--num-experts", 4, "--max-shard-size", "200KB")
    shutil.rmtree(source)
    if done.code == 0:
        same = {p.name: p.read_bytes() for p in out.glob("*.safetensors")}
        shutil.rmtree(out)
        assert same == {p.name: p.read_bytes() for p in world.moe.glob("*.safetensors")}
        return "in a word that means nothing (metadata): the same bytes"
    done.line()
    assert not out.exists()
    return "refused before anything was written"


def flipped_source(world: World, chance: Random) -> str:
    """One bit of a source's weights is wrong before it is upcycled."""
    source, out = world.new(), world.new()
    shutil.copytree(world.shards, source)
    path = _shard(source, chance)
    flip(path, chance.randrange(_header(path), path.stat().st_size), chance.randrange(8))
    done = world.run("upcycle", source, out)
    shutil.rmtree(source)
    shutil.rmtree(out, ignore_errors=True)
    if done.code == 0:
        return "not detected: safetensors has no checksum"
    assert "NaN or infinity" in done.line()
    return "refused: it made NaN or infinity"


def flipped_hub(world: World, chance: Random) -> str:
    """One bit of a model in the hub's cache is wrong; there, a file is named by its hash."""
    import hashlib

    cache, out = world.new(), world.new()
    (cache / "blobs").mkdir(parents=True)
    shutil.copytree(world.shards, cache / "snapshot")
    for path in (cache / "snapshot").glob("*.safetensors"):
        blob = cache / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(blob)
    world.good("upcycle", cache / "snapshot", out)
    shutil.rmtree(out)
    path = _shard(cache / "snapshot", chance).resolve()
    flip(path, chance.randrange(_header(path), path.stat().st_size), chance.randrange(8))
    line = world.run("upcycle", cache / "snapshot", out).line()
    assert "SHA-256" in line or "NaN or infinity" in line, line
    assert refused(out)
    shutil.rmtree(cache)
    shutil.rmtree(out, ignore_errors=True)
    return "refused: its SHA-256 does not match its name"


def _swap(folder: Path, chance: Random) -> None:
    """Give two shards each other's names."""
    one, other = chance.sample(sorted(folder.glob("*.safetensors")), 2)
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)


def swapped_source(world: World, chance: Random) -> str:
    """Two of a source's shards have each other's names."""
    source, out = world.new(), world.new()
    shutil.copytree(world.shards, source)
    _swap(source, chance)
    line = world.run("upcycle", source, out).line()
    assert "places tensor" in line, line
    assert not out.exists()
    shutil.rmtree(source)
    return "refused before anything was written: the index places a tensor elsewhere"


def absent(world: World, chance: Random) -> str:
    """The index names a file that is not there; read by each command in turn."""
    folder, out = world.new(), world.new()
    shutil.copytree(world.moe, folder)
    if chance.random() < 0.5:
        gone = _shard(folder, chance).name
        (folder / gone).unlink()
    else:
        gone = "model-99999-of-00009.safetensors"
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][chance.choice(sorted(index["weight_map"]))] = gone
        (folder / INDEX).write_text(json.dumps(index))
    command = chance.choice([*_readers(world, folder, out), "upcycle"])
    job = ["upcycle", folder, out] if command == "upcycle" else _readers(world, folder, out)[command]
    line = world.run(*job).line()
    assert gone in line, line
    assert not out.exists() or not list(out.glob("*.json")), line
    shutil.rmtree(folder)
    shutil.rmtree(out, ignore_errors=True)
    return "one line with the file's name, nothing written"


def truncated_result(world: World, chance: Random) -> str:
    """A shard of a finished folder ends early; read by each command in turn."""
    folder, out = world.new(), world.new()
    shutil.copytree(world.moe, folder)
    path = _shard(folder, chance)
    os.truncate(path, chance.randrange(path.stat().st_size))
    command = chance.choice(list(_readers(world, folder, out)))
    line = world.run(*_readers(world, folder, out)[command]).line()
    assert path.name in line, line
    shutil.rmtree(folder)
    shutil.rmtree(out, ignore_errors=True)
    return "one line with the shard's name, by inspect, verify, cpt, analyze-routing and eval alike"


def swapped_result(world: World, chance: Random) -> str:
    """Two shards of a finished folder have each other's names; read by each command in turn."""
    folder, out = world.new(), world.new()
    shutil.copytree(world.moe, folder)
    _swap(folder, chance)
    command = chance.choice(list(_readers(world, folder, out)))
    line = world.run(*_readers(world, folder, out)[command]).line()
    assert "places tensor" in line, line
    shutil.rmtree(folder)
    shutil.rmtree(out, ignore_errors=True)
    return "one line, by inspect, verify, cpt, analyze-routing and eval alike"


def flipped_result(world: World, chance: Random) -> str:
    """One bit of the weights of a finished upcycling is wrong: `verify --level full` against the same, quick."""
    folder = world.new()
    shutil.copytree(world.moe, folder)
    path = _shard(folder, chance)
    flip(path, chance.randrange(_header(path), path.stat().st_size), chance.randrange(8))
    world.run("verify", folder, "--source", world.shards, "--level", "full").line()
    quick = world.run("verify", folder, "--source", world.shards, "--level", "quick").code
    shutil.rmtree(folder)
    return f"found by verify --level full; {'found' if quick else 'missed'} by --level quick, which looks at samples"


def flipped_step(world: World, chance: Random) -> str:
    """One bit of any file of the newest step folder of a training is wrong; then the run is gone on with."""
    if "stopped run" not in world.known:
        whole, kept = world.new(), world.new()
        job = world.commands(whole)["cpt"]
        running = world.start(*job)
        wait_until(lambda: (whole / "checkpoints" / "step-000015").exists(), running)
        running.send(signal.SIGKILL)
        running.wait()
        shutil.copytree(whole, kept)
        world.good(*job)
        world.known["stopped run"] = kept, load_file(whole / "model.safetensors")
    kept, expected = world.known["stopped run"]
    out = world.new()
    shutil.copytree(kept, out)
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    path = chance.choice(sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size))
    flip(path, chance.randrange(path.stat().st_size), chance.randrange(8))
    done = world.good(*world.commands(out)["cpt"])
    found = load_file(out / "model.safetensors")
    assert all(bool((value == expected[name]).all()) for name, value in found.items())
    shutil.rmtree(out)
    if path.name == "state.json" and "continuing from step" not in done.err:
        return "in state.json, where it changed nothing that is read: the same weights, bit for bit"
    assert "continuing from step" in done.err.replace("\n", " "), (path, done.err)
    return "found; continued from the step folder before it to the same weights, bit for bit"
