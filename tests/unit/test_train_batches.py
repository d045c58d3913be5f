"""Which tokens a step and a validation read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moetool.data.tokens import TokenStream
from moetool.errors import DataError
from moetool.train.batches import IGNORED, micro_batches, mix, open_corpus, validation_batches
from moetool.train.config import TrainConfig
from tests import tiny


def config(model: Path, path: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": model, "out": Path("o"), "train": {"a": str(path)}, "max_steps": 9, "seq_len": 8,
        "global_batch_size": 8, "micro_batch_size": 2, "seed": 5,
    }  # fmt: skip
    return TrainConfig(**(values | changes)).resolve(128, {}, gpu=False)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_same_micro_batches(llama: Path, jsonl: Path, world: int) -> None:
    settings = config(llama, jsonl)
    mixture = mix(open_corpus(settings, 300), settings)
    shares = [micro_batches(mixture, settings, 3, rank, world) for rank in range(world)]
    dealt = [shares[number % world][number // world] for number in range(4)]
    expected = np.stack([mixture.tokens(n) for n in range(24, 32)])
    assert torch.equal(torch.cat([micro.inputs for micro in dealt]), torch.from_numpy(expected[:, :-1]))
    assert torch.equal(torch.cat([micro.labels for micro in dealt]), torch.from_numpy(expected[:, 1:]))
    assert all(micro.positions is None for micro in dealt)
    alone = micro_batches(mixture, settings, 3, 0, 1)
    assert [micro.seed for micro in dealt] == [micro.seed for micro in alone]
    assert len({micro.seed for step in range(3) for micro in micro_batches(mixture, settings, step, 0, 1)}) == 12


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("num_tokens", [2, 8, 9, 10, 33, 100])
def test_validation_predicts_every_token_once(world: int, num_tokens: int) -> None:
    memory = np.arange(1000, 1000 + num_tokens)
    stream = TokenStream({}, np.array([0]), np.array([0, num_tokens]), memory)
    settings = config(Path("m"), Path("p"))
    predicted = []
    batches = [list(validation_batches(stream, settings, rank, world)) for rank in range(world)]
    assert len({len(share) for share in batches}) == 1  # all take part where weights are sharded
    for batch in (batch for share in batches for batch in share):
        real = batch.labels != IGNORED
        assert (batch.labels[real] == batch.inputs[real] + 1).all()
        predicted += batch.labels[real].tolist()
    assert sorted(predicted) == memory[1:].tolist()


def test_positions_begin_anew_at_each_document(llama: Path, jsonl: Path) -> None:
    settings = config(llama, jsonl, cross_document=False)
    corpus = open_corpus(settings, 300)
    for micro in micro_batches(mix(corpus, settings), settings, 3, 0, 1):
        assert micro.positions is not None
        for inputs, positions in zip(micro.inputs.tolist(), micro.positions.tolist(), strict=True):
            place = -1
            for token, position in zip(inputs, positions, strict=True):
                place = place + 1
                assert position == place
                place = -1 if token == 0 else place  # <|endoftext|> ends its document
    for batch in validation_batches(corpus.val["a"], settings, 0, 1):
        assert batch.positions is not None
        new = batch.positions[:, 1:] == 0
        ended = (batch.inputs[:, :-1] == 0) & (batch.labels[:, 1:] != IGNORED)
        assert torch.equal(new & (batch.labels[:, 1:] != IGNORED), ended)


def test_validation_documents_are_not_trained_on(llama: Path, jsonl: Path) -> None:
    corpus = open_corpus(config(llama, jsonl, val_fraction=0.25), 300)
    whole = open_corpus(config(llama, jsonl, val_fraction=0.0), 300)
    train, val = corpus.train["a"], corpus.val["a"]
    assert (train.num_documents, val.num_documents) == (60, 20)
    assert not set(train.starts) & set(val.starts)
    assert train.num_tokens + val.num_tokens == whole.train["a"].num_tokens
    assert whole.val == {}
    assert corpus.fingerprints == whole.fingerprints


def test_the_end_of_a_single_document_is_not_trained_on(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(" ".join(map(str, range(400))))
    settings = config(llama, path, val_fraction=0.1)
    corpus = open_corpus(settings, 300)
    train, val = corpus.train["a"], corpus.val["a"]
    whole = train.num_tokens + val.num_tokens
    assert val.num_tokens == round(whole / 10)
    mixture = mix(corpus, settings)
    tokens = open_corpus(config(llama, path, val_fraction=0), 300).train["a"]
    assert tokens.num_tokens == whole
    assert val.read(0, val.num_tokens).tolist() == tokens.read(train.num_tokens, val.num_tokens).tolist()
    windows = mixture.num_windows["a"]
    for n in range(2 * windows):  # two epochs
        start = mixture.sample(n).window * 8
        assert start + 9 <= train.num_tokens
        assert mixture.tokens(n).tolist() == tokens.read(start, 9).tolist()


def test_what_is_validated_on_is_not_trained_on_under_another_name(llama: Path, jsonl: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy.jsonl"
    copied.write_bytes(jsonl.read_bytes())
    other = tiny.save_jsonl(tmp_path / "other.jsonl", ["Something else."])
    twice = {"a": str(jsonl), "b": str(copied)}
    for more in ({"val": {"v": str(copied)}}, {"train": twice, "val": {"b": str(other)}}):
        with pytest.raises(DataError, match=r"has the same text as (--val v|a), which is used for validation"):
            open_corpus(config(llama, jsonl, **more), 300)
    corpus = open_corpus(config(llama, jsonl, train=twice), 300)  # the same documents are held out of both
    assert not set(corpus.train["a"].starts) & set(corpus.val["b"].starts)
    open_corpus(config(llama, jsonl, train=twice, val={"b": str(other)}, val_fraction=0), 300)


def test_a_tokenizer_that_does_not_fit_the_model(llama: Path, jsonl: Path) -> None:
    with pytest.raises(DataError, match="but the model has 200 embedding rows"):
        open_corpus(config(llama, jsonl), 200)


def test_a_validation_set_of_one_token(llama: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_token(source: Any, *_: Any) -> TokenStream:
        offsets = np.array([0, 100 if source.path == str(jsonl) else 1])
        return TokenStream({"sha256": source.path}, offsets[:-1], offsets, np.zeros(100, np.uint16))

    monkeypatch.setattr("moetool.train.batches.tokenized", one_token)
    with pytest.raises(DataError, match="validation set 'tiny' has fewer than 2 tokens"):
        open_corpus(config(llama, jsonl, val={"tiny": "other"}, val_fraction=0), 300)
