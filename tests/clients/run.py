"""Run rows in the engines: a crash or a silence is a verdict on one row, and loses no other."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.clients.environments import CACHE, llama_source, python

EXACT = 1e-3  # of logits or log-probabilities of up to some tens, in fp32; other kernels add in another order
ROW_SECONDS = 240
BATCH = 40  # rows in one process
WORKERS = {
    "transformers-4": "on_transformers_4.py",
    "vllm": "on_vllm.py",
    "llama.cpp": "on_llama.py",
    "mlx": "on_mlx.py",
    "mergekit": "on_mergekit.py",
}


def run(client: str, folders: Sequence[Path], say: Callable[[str, dict[str, Any]], None], until: float) -> None:
    """Run a client over folders that `models.make` wrote.

    Args:
        client: a name in `WORKERS`.
        folders: one a row.
        say: is given a folder's name and its verdict: {"difference"} or {"refused"}.
        until: the time (as time.monotonic gives it) after which no row is begun.
    """
    left = list(folders)
    while left and time.monotonic() < until:
        done = _batch(client, left[:BATCH], say)
        left = left[done:]


def _batch(client: str, folders: Sequence[Path], say: Callable[[str, dict[str, Any]], None]) -> int:
    """Run some rows in one process; how many have a verdict when it ends."""
    log = CACHE / f"{client}.log"
    command = [python(client), Path(__file__).parent / "workers" / WORKERS[client], *folders]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LLAMA_SOURCE": str(llama_source())}
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    done = 0
    while True:
        try:
            line = lines.get(timeout=ROW_SECONDS)
        except queue.Empty:
            process.kill()
            say(folders[done].name, {"refused": f"no answer in {ROW_SECONDS} s"})
            return done + 1
        if line is None:
            break
        word, _, rest = line.strip().partition(" ")
        name, _, reason = rest.partition(" ")
        if word == "REFUSED":
            say(name, {"refused": reason.replace(str(folders[done]), "")})
            done += 1
        elif word == "DONE":
            say(name, compare(client, folders[done]))
            done += 1
    if process.wait() and done < len(folders):
        say(folders[done].name, {"refused": _death(process.returncode, log)})
        done += 1
    return done


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout
    for line in process.stdout:
        if line.split(" ")[0] in ("BEGIN", "DONE", "REFUSED"):
            lines.put(line)
    lines.put(None)


def _death(code: int, log: Path) -> str:
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    abort = [line for line in said if "GGML_ASSERT" in line or "Error" in line]
    return f"the process dies ({name}): {(abort or said or ['no word'])[-1][-300:]}"


def compare(client: str, folder: Path) -> dict[str, Any]:
    """The largest difference from transformers 5: of logits, or of log-probabilities where an engine gives those."""
    wanted = torch.from_numpy(np.load(folder / "logits.npy"))
    found = torch.from_numpy(np.load(folder / f"{client}.npy"))
    if found.shape != wanted.shape:
        return {"refused": f"logits of shape {tuple(found.shape)} instead of {tuple(wanted.shape)}"}
    if client == "vllm":
        wanted, found = wanted.log_softmax(-1)[:-1], found[:-1]
    difference = float((wanted - found).abs().max())
    verdict: dict[str, Any] = {"difference": float(f"{difference:.1e}") if difference == difference else "NaN"}
    if (folder / "greedy.npy").exists():
        same = np.load(folder / "greedy.npy") == np.load(folder / f"{client}.greedy.npy")
        verdict["greedy"] = f"{int(same.cumprod().sum())} of {len(same)}"
    return verdict
