"""llama.cpp in fp32: its own converter, then its own library."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import llama_cpp as library
import numpy as np
from common import work

SOURCE = os.environ["LLAMA_SOURCE"]
# The converter knows published tokenizers by a hash, and stops at one that it does not know. Nothing else is changed.
CONVERT = f"""
import runpy, sys
sys.path.insert(0, {SOURCE!r})
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
runpy.run_path({SOURCE + "/convert_hf_to_gguf.py"!r}, run_name="__main__")
"""


def run(folder: Path, tokens: np.ndarray, number: int) -> tuple[np.ndarray, list[int]]:
    """Logits, and tokens."""
    file = folder / "model.gguf"
    command = [sys.executable, "-c", CONVERT, folder / "moe", "--outtype", "f32", "--outfile", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise ValueError(f"converter: {said[-1] if said else done.returncode}")
    settings = library.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = library.llama_model_load_from_file(str(file).encode(), settings)
    if not model:
        raise ValueError("the library does not load what the converter wrote")
    options = library.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 256
    options.flash_attn_type = 0
    options.type_k = options.type_v = 0  # fp32
    options.n_threads = options.n_threads_batch = 1
    context = library.llama_init_from_model(model, options)
    batch = library.llama_batch_init(len(tokens), 0, 1)
    vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))

    def decode(some: list[int], start: int) -> np.ndarray:
        batch.n_tokens = len(some)
        for i, token in enumerate(some):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
            batch.seq_id[i][0] = 0
        if library.llama_decode(context, batch):
            raise ValueError("llama_decode failed")
        return np.ctypeslib.as_array(library.llama_get_logits(context), shape=(len(some), vocabulary)).copy()

    logits = decode(tokens.tolist(), 0)
    greedy, last = [], logits[-1]
    for i in range(number):
        greedy.append(int(last.argmax()))
        last = decode(greedy[-1:], len(tokens) + i)[-1]
    library.llama_batch_free(batch)
    library.llama_free(context)
    library.llama_model_free(model)
    file.unlink()
    return logits, greedy


# The library's own lines about why it stops go to stderr, where the harness reads them.
log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda level, text, _: print(text.decode(errors="replace"), end="", file=sys.stderr) if level >= 4 else None
)
library.llama_log_set(log, None)
library.llama_backend_init()
work("llama.cpp", run)
