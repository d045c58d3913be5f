"""The small models of a case, and what stock transformers computes with the result."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moetool import registry
from moetool.checkpoint.folder import beside
from tests import tiny
from tests.clients.cases import LENGTH, VOCABULARY, Case
from tests.clients.environments import CACHE, python

SPECS = [registry.load("target", name) for name in registry.names("target")]
GREEDY = 32  # tokens
GLM = ["[gMASK]", "[MASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]


def make(case: Case, folder: Path) -> dict[str, Any]:
    """Write `dense/`, `moe/`, `tokens.npy` (T,), `logits.npy` (T, V) and perhaps `greedy.npy` in a folder.

    Returns:
        What is known of the row before an engine has run: `config`, `beside` (what limits ask for) and a
        `digest` of all that the engines see; or `refused`, moetool's own line.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tiny.save_dense(case.dense, folder / "dense", **case.settings)
    tiny.save_tokenizer(folder / "dense", 400)
    if case.tokenizer == "glm":
        _add_tokens(folder / "dense")
    if case.tokenizer == "sentencepiece":
        shutil.copy(_sentencepiece(), folder / "dense" / "tokenizer.model")
    code, _, said = tiny.in_process("upcycle", folder / "dense", folder / "moe", *case.command)
    if code:
        return {"refused": said.strip().removeprefix("moetool: ")}
    tokens = torch.randint(1, 300, (LENGTH,), generator=torch.Generator().manual_seed(1))
    np.save(folder / "tokens.npy", tokens.numpy())
    logits, greedy = _run(folder / "moe", tokens, GREEDY * case.greedy)
    np.save(folder / "logits.npy", logits)
    if case.greedy:
        np.save(folder / "greedy.npy", greedy)
    config = (folder / "moe" / "config.json").read_bytes()
    near = sorted(beside(folder / "moe") & {limit.unless for spec in SPECS for limit in spec.limits})
    weights = (folder / "moe" / "model.safetensors").read_bytes()
    digest = hashlib.sha256(config + weights + "".join(near).encode()).hexdigest()[:16]
    return {"config": json.loads(config), "beside": near, "digest": digest}


@torch.no_grad()
def _run(folder: Path, tokens: torch.Tensor, number: int) -> tuple[np.ndarray, np.ndarray]:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model.eval()
    found: np.ndarray = model(tokens[None]).logits[0].numpy()
    assert found.shape == (len(tokens), VOCABULARY)
    longer = tokens
    for _ in range(number):
        longer = torch.cat([longer, model(longer[None]).logits[0, -1].argmax()[None]])
    return found, longer[len(tokens) :].numpy()


def _add_tokens(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": GLM})
    tokenizer.save_pretrained(folder)


@cache
def _sentencepiece() -> Path:
    """A tokenizer.model, which llama.cpp's environment can train."""
    prefix = CACHE / "sentencepiece"
    code = (
        "import sys, sentencepiece as s\n"
        "s.SentencePieceTrainer.train(sentence_iterator=iter(sys.argv[2:]), model_prefix=sys.argv[1], vocab_size=400,"
        " byte_fallback=True, hard_vocab_limit=False, minloglevel=2)"
    )
    subprocess.run([python("llama.cpp"), "-c", code, prefix, *tiny.TEXT * 4], check=True)
    return prefix.with_suffix(".model")
