"""What each worker does: run an engine on folders, one after the other, and say how far it is.

A worker is run by the interpreter of its engine's environment, which knows nothing of moetool. For each
FOLDER it reads `tokens.npy` (T,), runs `moe/`, and writes `CLIENT.npy`, float32 (T, V). Where there is a
`greedy.npy` (N,), it also writes `CLIENT.greedy.npy`: the N likeliest tokens, one after the other.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np


def work(client: str, run: Callable[[Path, np.ndarray, int], tuple[np.ndarray, list[int]]]) -> None:
    """Run each folder of the command line; what a folder gave or said is a line on stdout."""
    for name in sys.argv[1:]:
        folder = Path(name)
        print(f"\nBEGIN {folder.name}", flush=True)
        try:
            wanted = folder / "greedy.npy"
            number = len(np.load(wanted)) if wanted.exists() else 0
            logits, greedy = run(folder, np.load(folder / "tokens.npy"), number)
            np.save(folder / f"{client}.npy", logits.astype(np.float32))
            np.save(folder / f"{client}.greedy.npy", np.array(greedy, dtype=np.int64))
            print(f"\nDONE {folder.name}", flush=True)
        except Exception as error:
            traceback.print_exc()
            said = " ".join(str(error).split()) or type(error).__name__
            print(f"\nREFUSED {folder.name} {type(error).__name__}: {said[-400:]}", flush=True)
