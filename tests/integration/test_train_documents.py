"""`--no-cross-document`: documents in one sequence do not see each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from moetool.errors import ConfigError
from moetool.train.batches import MicroBatch, micro_batches, mix, open_corpus
from moetool.train.config import TrainConfig
from moetool.train.loss import logits
from moetool.train.validate import check_documents_apart
from tests import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "glm4_moe": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "head_dim": 8, "n_group": 1, "topk_group": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_window_is_its_documents_alone(family: str, attention: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    check_documents_apart(model)
    # The end of one document, a whole one, one of a single token, the beginning of one; two rows that differ.
    lengths = [[3, 8, 1, 4], [16]]
    tokens = torch.randint(1, 300, (2, 16))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.no_grad():
        together = logits(model, MicroBatch(tokens, tokens, positions), torch.device("cpu"))
        for row, pieces in enumerate(lengths):
            alone = torch.cat([model(piece[None]).logits[0] for piece in tokens[row].split(pieces)])
            torch.testing.assert_close(together[row], alone, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(together[0], model(tokens).logits[0], atol=1e-2)


def test_a_model_that_ignores_positions_is_refused(mixtral: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    forward = model.forward
    model.forward = lambda position_ids=None, **kwargs: forward(**kwargs)
    with pytest.raises(
        ConfigError, match="--no-cross-document: MixtralForCausalLM lets tokens attend to earlier documents"
    ):
        check_documents_apart(model)


def test_training_and_validation_keep_documents_apart(tmp_path: Path, mixtral: Path, jsonl: Path) -> None:
    out = tmp_path / "out"
    size = ["--seq-len", 48, "--global-batch-size", 2, "--micro-batch-size", 1, "--val-fraction", 0.1]
    run = ["cpt", mixtral, out, "--train", f"new={jsonl}", "--max-steps", 1, *size, "--no-cross-document"]
    assert tiny.in_process(*run, "--quiet")[0] == 0
    settings = TrainConfig(
        model=mixtral, out=out, train={"new": str(jsonl)}, max_steps=1, seq_len=48, global_batch_size=2,
        micro_batch_size=1, val_fraction=0.1,
    ).resolve(128, {}, gpu=False)  # fmt: skip
    corpus = open_corpus(settings, 300)
    model = AutoModelForCausalLM.from_pretrained(mixtral).eval()

    def loss(inputs: torch.Tensor, labels: torch.Tensor) -> float:
        """Sum over a window, a document at a time; <|endoftext|>, token 0, ends one."""
        ends = (inputs == 0).nonzero().flatten().tolist()
        total, start = 0.0, 0
        for end in [*(end + 1 for end in ends), len(inputs)]:
            if end > start:
                got = model(inputs[start:end][None]).logits[0]
                total += F.cross_entropy(got, labels[start:end], reduction="sum").item()
            start = end
        return total

    with torch.no_grad():
        batch = micro_batches(mix(corpus, settings), settings, 0, 0, 1)
        expected = sum(loss(micro.inputs[0], micro.labels[0]) for micro in batch) / 96
        tokens = torch.from_numpy(corpus.val["new"].read(0, corpus.val["new"].num_tokens))
        windows = [tokens[start : start + 49] for start in range(0, len(tokens) - 1, 48)]
        held_out = sum(loss(window[:-1], window[1:]) for window in windows) / (len(tokens) - 1)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["loss"] == pytest.approx(expected, rel=1e-5)
    assert rows[0]["val"]["new"] == pytest.approx(held_out, rel=1e-5)
    # It defines the result: the same command without it is another run.
    code, _, stderr = tiny.in_process(*run[:-1])
    assert code == 1
    assert "--cross-document (False before, True now)" in stderr
