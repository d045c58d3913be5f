"""Samples are drawn from the model's own distribution; the file is whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig

from moetool.data.tokens import TokenStream
from moetool.errors import CheckpointError, DataError
from moetool.sample.generate import _lengths, generate
from moetool.sample.output import Unfinished, beside, finished, hidden
from moetool.sample.prompts import open_prompts
from tests import tiny

SMALL = {
    "vocab_size": 64,  # more than the 50 that transformers keeps by default
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "head_dim": 8},
}
DENSE = ("llama", "qwen3_5_text", "granitemoehybrid", "lfm2", "cohere2")
FAMILIES = MOE | {family: tiny.DENSE[family] for family in DENSE}


def build(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**(SMALL | FAMILIES[family] | changes))
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def drawn(model: Any, ids_BP: torch.Tensor, length: int, end: int, temperature: float, seed: int) -> list[list[int]]:
    """The definition: without a cache, each token from the softmax of all logits."""
    torch.manual_seed(seed)
    rows: list[list[int]] = [[] for _ in ids_BP]
    for _ in range(length):
        logits = model(ids_BP, use_cache=False).logits[:, -1].float()
        chosen = torch.multinomial(torch.softmax(logits / temperature, -1), 1)
        for row, token in zip(rows, chosen.flatten().tolist(), strict=True):
            if end not in row:
                row.append(token)
        over = torch.tensor([[end in row[:-1]] for row in rows])
        ids_BP = torch.cat([ids_BP, torch.where(over, end, chosen)], 1)
        if all(end in row for row in rows):
            break
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_is_drawn_from_the_whole_distribution(family: str) -> None:
    model, temperature = build(family), 0.7 if family == "mixtral" else 1.0
    prompts = torch.tensor([[0], [5], [7], [9]])
    told: list[int] = []
    asked: Any = {"temperature": temperature, "seed": 11}
    # A token that comes early in a sample, as the one that ends them.
    end = generate(model, prompts, length=6, end=0, **asked, tell=told.append)[0][-1]
    asked |= {"length": 33, "end": end}
    # What a model's own settings ask for must not narrow the distribution.
    model.generation_config = GenerationConfig(top_k=1, top_p=0.1, repetition_penalty=9.0, max_length=3, min_p=0.9)
    found = generate(model, prompts, **asked, tell=told.append)
    assert found == drawn(model, prompts, **asked)
    assert found[0][-1] == end
    assert all(end not in row[:-1] for row in found)
    assert all(tokens <= sum(map(len, found)) for tokens in told)
    assert generate(model, prompts, **(asked | {"seed": 12}), tell=told.append) != found


def test_lengths_end_with_the_first_end() -> None:
    ids_BS = torch.tensor([[5, 6, 7], [5, 0, 0], [0, 0, 0], [5, 6, 0], [0, 6, 7]])
    assert _lengths(ids_BS, 0).tolist() == [3, 2, 1, 3, 1]


def test_logits_that_are_no_numbers_are_one_line() -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"not finite.*--dtype"):
        generate(model, torch.tensor([[0]]), length=4, end=0, temperature=1.0, seed=0, tell=lambda tokens: None)
    with pytest.raises(CheckpointError, match=r"divided by --temperature 0\.5, are not finite.* raise --temperature"):
        generate(model, torch.tensor([[0]]), length=4, end=0, temperature=0.5, seed=0, tell=lambda tokens: None)
    with pytest.raises(DataError, match="token 64, but the model has 64"):
        generate(model, torch.tensor([[64]]), length=4, end=0, temperature=1.0, seed=0, tell=lambda tokens: None)


def stream(*lengths: int) -> TokenStream:
    """Documents of so many tokens with their end: document d holds 10d, 10d + 1, ..."""
    tokens = np.concatenate([10 * d + np.arange(length) for d, length in enumerate(lengths)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenStream({"vocab_size": 1000}, offsets[:-1], offsets, tokens.astype(np.uint16))


def test_prompts_are_the_first_tokens_of_each_long_document_once_an_epoch() -> None:
    # With its end, a document of 3 tokens has 4: the second and the fourth are long enough.
    prompts = open_prompts(7, {"a": stream(3, 4, 2, 5), "b": stream(9)}, 3, 8, 0)
    names = [prompts.name(n) for n in range(8)]
    assert names == ["a", "b"] * 4
    of_a = [prompts.tokens(n) for n in range(0, 8, 2)]
    assert sorted(of_a[:2]) == sorted(of_a[2:]) == [[10, 11, 12], [30, 31, 32]]
    assert [prompts.tokens(n) for n in range(1, 8, 2)] == [[0, 1, 2]] * 4
    assert open_prompts(7, {}, 32, 8, 0).tokens(5) == []
    with pytest.raises(DataError, match="longest document has 4 tokens, fewer than --prompt-tokens 5"):
        open_prompts(7, {"a": stream(3, 5)}, 5, 8, 0)


def test_a_batch_is_done_or_not_at_all(tmp_path: Path) -> None:
    out, identity = tmp_path / "o.jsonl", {"seed": 0}
    hidden(out).mkdir()
    first = Unfinished(out, identity, False)
    assert not first.begun
    first.add([{"text": "é"}], num_tokens=2)
    with first.text.open("a") as file:  # a kill while the second batch was written
        file.write('{"text": "b')
    again = Unfinished(out, identity, False)
    assert again.done == first.done
    assert again.done.num_bytes == len('{"text": "é"}\n'.encode())
    again.add([{"text": "c"}], num_tokens=3)
    assert again.done.num_tokens == 5
    again.finish("# options\n")
    again.discard()
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == ["é", "c"]
    assert finished(out, identity) == again.done
    assert not hidden(out).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.jsonl", "o.jsonl.moetool.json", "o.jsonl.moetool.yaml"]


def test_other_text_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    hidden(out).mkdir()
    Unfinished(out, {"seed": 0, "model": "a"}, False).add([{"text": "x"}], num_tokens=1)
    with pytest.raises(DataError, match=r"begun with other options: --seed \(0 before, 1 now\), MODEL \(other files\)"):
        Unfinished(out, {"seed": 1, "model": "b"}, False)
    assert Unfinished(out, {"seed": 1, "model": "a"}, True).done.num_tokens == 0
    (hidden(out) / "text.jsonl").write_text("")
    with pytest.raises(DataError, match="shorter than it was"):
        Unfinished(out, {"seed": 0, "model": "a"}, False)
    (hidden(out) / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state.json is damaged.*--overwrite"):
        Unfinished(out, {"seed": 0, "model": "a"}, False)
    out.write_text("mine")
    with pytest.raises(DataError, match="it is unknown how it was made"):
        finished(out, {})
    beside(out, "moetool.json").write_bytes(Unfinished(out, {}, True)._document())
    with pytest.raises(DataError, match="has changed since it was made"):
        finished(out, {})
