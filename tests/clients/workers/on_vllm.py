"""vLLM in fp32, eager, on a CPU."""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

import numpy as np
from common import work
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def run(folder: Path, tokens: np.ndarray, number: int) -> tuple[np.ndarray, list[int]]:
    """Log-probabilities after each token, NaN where vLLM gives none, which is after the last; and tokens."""
    vocabulary = 512
    engine = LLM(
        str(folder / "moe"), dtype="float32", enforce_eager=True, max_model_len=128, max_logprobs=vocabulary,
        skip_tokenizer_init=True, disable_log_stats=True, enable_prefix_caching=False,
    )  # fmt: skip
    try:
        settings = SamplingParams(
            max_tokens=max(1, number), temperature=0, prompt_logprobs=vocabulary, detokenize=False, ignore_eos=True
        )
        answers = engine.generate({"prompt_token_ids": tokens.tolist()}, settings, use_tqdm=False)
        found = np.full((len(tokens), vocabulary), np.nan)
        for i, row in enumerate(answers[0].prompt_logprobs[1:]):
            for token, entry in row.items():
                found[i, token] = entry.logprob
        return found, list(answers[0].outputs[0].token_ids)[:number]
    finally:
        del engine
        cleanup_dist_env_and_memory()
        gc.collect()


if __name__ == "__main__":
    work("vllm", run)
