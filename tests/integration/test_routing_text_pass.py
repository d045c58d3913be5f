"""The pass over texts, the tokens of each expert and the comparison, against plain code on a tiny model."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moetool.checkpoint.model import load_model
from moetool.errors import CheckpointError, ConfigError, DataError
from moetool.routing.analysis import analyze
from moetool.routing.capture import RouterCapture
from moetool.routing.comparison import RouteFile, saturation_by_chance
from moetool.routing.drift import drift
from moetool.routing.settings import Settings
from moetool.routing.shape import probe
from moetool.routing.stats import RoutingStats
from moetool.routing.text_pass import Windows, measure, read_batches
from moetool.routing.vocabulary import TokenCounts, continual_specialization
from tests import tiny


class Text:
    """A token stream in memory."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = np.array(tokens, dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        assert start >= 0
        assert start + length <= len(self.tokens)
        return self.tokens[start : start + length]


TOKENS = np.random.default_rng(0).integers(0, 20, 103).tolist()
SETTINGS = Windows(seq_len=16, batch_size=2, max_tokens=1000)


class Words:
    """Decodes nothing but numbers."""

    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


def choices(folder: Path, tokens: list[int]) -> dict[int, list[list[int]]]:
    """Layer -> the experts of each token, window by window, one window a forward, without padding."""
    model = load_model(folder)
    capture = RouterCapture(model)
    found: dict[int, list[list[int]]] = {layer: [] for layer in capture.layers}
    for start in range(0, len(tokens), 16):
        with torch.no_grad(), capture.collect() as routes:
            model(torch.tensor([tokens[start : start + 16]]))
        for route in routes:
            found[route.layer] += route.indices_TK.sort(dim=1).values.tolist()
    return found


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 103])
def test_batches_hold_every_token_once(length: int) -> None:
    text = Text(TOKENS[:length])
    batches = list(read_batches(text, SETTINGS, 64, "--data a"))
    assert np.concatenate([batch.tokens_N for batch in batches]).tolist() == TOKENS[:length]
    assert np.concatenate([batch.next_N for batch in batches]).tolist() == TOKENS[1:length]
    for batch in batches:
        flat = batch.ids_BS.flatten()
        kept = flat if batch.mask_T is None else flat[batch.mask_T]
        assert kept.tolist() == batch.tokens_N.tolist()
        assert batch.ids_BS.shape[1] <= 16


def test_counts_equal_those_without_batches_or_padding(mixtral: Path) -> None:
    expected = choices(mixtral, TOKENS)
    model = load_model(mixtral)
    seen: list[tuple[float, float]] = []

    def progress(task: str, done: float, total: float, note: str = "") -> None:
        seen.append((done, total))

    stats = measure(model, RouterCapture(model), {"a": Text(TOKENS)}, SETTINGS, progress=progress)["a"]
    assert stats.num_tokens == 103
    for row, layer in enumerate(expected):
        counts = Counter(expert for experts in expected[layer] for expert in experts)
        assert stats.counts_LE[row].tolist() == [counts[e] for e in range(4)]
        pairs = Counter(map(tuple, expected[layer]))
        assert stats.coactivation_LEE[row, 0, 1] == pairs[(0, 1)]
    assert seen[-1] == (103, 103)


def test_first_tokens_only_and_no_tokens(mixtral: Path) -> None:
    model = load_model(mixtral)
    capture = RouterCapture(model)
    assert measure(model, capture, {"a": Text(TOKENS)}, replace(SETTINGS, max_tokens=50))["a"].num_tokens == 50
    with pytest.raises(DataError, match="no tokens"):
        measure(model, capture, {"a": Text([])}, SETTINGS)


def test_token_counts_against_plain_counting(mixtral: Path) -> None:
    expected = choices(mixtral, TOKENS)[1]
    model = load_model(mixtral)
    capture = RouterCapture(model)
    texts = {"a": Text(TOKENS)}
    counts = TokenCounts(texts, 1000, probe(model, capture), [1])
    stats = measure(model, capture, texts, SETTINGS, observers=[counts.observe])["a"]
    visits, after, totals = Counter(), Counter(), Counter(TOKENS)  # type: ignore[var-annotated]
    for place, experts in enumerate(expected):
        for expert in experts:
            visits[TOKENS[place], expert] += 1
            if place + 1 < len(TOKENS):
                after[TOKENS[place + 1], expert] += 1
    for row, token in enumerate(counts.types_U.tolist()):
        assert counts.counts_UE("input", 1)[row].tolist() == [visits[token, e] for e in range(4)]
        assert counts.counts_UE("next", 1)[row].tolist() == [after[token, e] for e in range(4)]
    report = counts.report(Words(), stats.counts_LE[1:] / stats.counts_LE[1:].sum())
    best = {token: max(visits[token, e] for e in range(4)) for token in totals}
    row = report["layers"][0]
    assert row["input"]["by_type"] == pytest.approx(np.mean([best[t] / totals[t] for t in totals]))
    assert row["input"]["by_occurrence"] == pytest.approx(sum(best.values()) / 103)
    assert row["by_chance"] == pytest.approx(stats.counts_LE[1].max() / 103)
    for expert in row["experts"]:
        for token in expert["tokens"]:
            assert token["count"] == visits[token["id"], expert["expert"]]
            assert totals[token["id"]] >= 10
        shares = [token["share"] for token in expert["tokens"]]
        assert shares == sorted(shares, reverse=True)
    same = continual_specialization(counts, counts)["layers"][0]["input"]
    assert same["by_type"] == same["before"]["by_type"] == row["input"]["by_type"]


@pytest.fixture
def changed(mixtral: Path, tmp_path: Path) -> Path:
    """The tiny Mixtral with layer 1's router negated and layer 0's expert 2 halved."""
    folder = tmp_path / "changed"
    load_model(mixtral).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.gate.weight"] *= -1
    for part in ("w1", "w2", "w3"):
        tensors[f"model.layers.0.block_sparse_moe.experts.2.{part}.weight"] *= 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_comparison_of_a_changed_model(mixtral: Path, changed: Path, tmp_path: Path) -> None:
    settings = Settings(seq_len=16, batch_size=2, device="cpu")
    report = analyze(("one", mixtral), {"a": Text(TOKENS)}, settings, compare=("two", changed), scratch=tmp_path / "s")
    before, after = choices(mixtral, TOKENS), choices(changed, TOKENS)
    rows = report["comparison"]["domains"]["a"]["layers"]
    for layer, row in enumerate(rows):
        kept = [len(set(old) & set(new)) / 2 for old, new in zip(before[layer], after[layer], strict=True)]
        assert row["saturation"] == pytest.approx(np.mean(kept))
        assert row["mri_change"] == pytest.approx(row["mri"] - report["domains"]["a"]["layers"][layer]["mri"])
    assert rows[0]["saturation"] == 1  # layer 0's router and its input are untouched
    assert rows[1]["saturation"] < 0.5
    drifted = report["comparison"]["drift"]
    assert [row["layer"] for row in drifted] == [0, 1]
    assert drifted[0]["router"] == 0
    assert drifted[1]["router"] == pytest.approx(2)
    assert drifted[0]["experts"] == pytest.approx([0, 0, 0.5, 0])
    home = report["comparison"]["vocabulary_specialization"]["layers"][0]["input"]
    assert home["by_type"] == home["before"]["by_type"]
    assert list((tmp_path / "s").iterdir()) == []


def test_a_model_against_itself_is_saturated(mixtral: Path, tmp_path: Path) -> None:
    report = analyze(
        ("m", mixtral), {"a": Text(TOKENS)}, Settings(device="cpu"), compare=("m", mixtral), scratch=tmp_path
    )
    for row in report["comparison"]["domains"]["a"]["layers"]:
        assert row["saturation"] == 1
        assert row["mri_change"] == row["load_divergence"] == 0
        assert 0.5 <= row["saturation_by_chance"] < 1
    assert all(value == 0 for row in drift(mixtral, mixtral, 4) for value in (row["router"], *row["experts"]))


def test_chance_saturation_is_the_share_of_tokens_that_reach_an_expert() -> None:
    balanced, reached = np.full((2, 4), 0.25), np.full((2, 4), 0.5)  # top-2 of 4
    assert saturation_by_chance(balanced, reached) == [0.5, 0.5]
    # 0.5 x 1 + 0.3 x 0.6 + 0.2 x 0.4
    assert saturation_by_chance(np.array([[0.5, 0.3, 0.2]]), np.array([[1, 0.6, 0.4]])) == pytest.approx([0.76])


def test_refusals(mixtral: Path) -> None:
    texts = {"a": Text(TOKENS)}
    with pytest.raises(ConfigError, match="the model has only 128 positions"):
        analyze(("m", mixtral), texts, Settings(device="cpu", seq_len=129))
    with pytest.raises(ConfigError, match="layer 7 has no router; layers with one are 0-1"):
        analyze(("m", mixtral), texts, Settings(device="cpu", vocabulary_layers=(7,)))
    assert (
        analyze(("m", mixtral), texts, Settings(device="cpu", vocabulary_layers=()))["vocabulary_specialization"]
        is None
    )


SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 3}, "the layers with a router (0-1 and 0-2)"),
    "experts": ({"num_local_experts": 6}, "the number of experts (4 and 6)"),
    "top-k": ({"num_experts_per_tok": 1}, "top-k (2 and 1)"),
    "vocabulary": ({"vocab_size": 320}, "the vocabulary (300 and 320)"),
}


@pytest.mark.parametrize("change", SHAPES)
def test_another_shape_is_refused_before_weights_are_read(
    change: str, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = SHAPES[change]
    other = tiny.save_mixtral(tmp_path / "other", **changes)
    monkeypatch.setattr("moetool.routing.analysis.load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=f"--compare o: the models differ in {re.escape(message)}"):
        analyze(("m", mixtral), {"a": Text(TOKENS)}, Settings(device="cpu"), compare=("o", other), scratch=tmp_path)


def test_a_dense_model_is_refused_before_weights_are_read(
    mixtral: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetool.routing.analysis.load_model", lambda *_: pytest.fail("a model was loaded"))
    texts, settings = {"a": Text(TOKENS)}, Settings(device="cpu")
    with pytest.raises(CheckpointError, match=r"^--compare d: LlamaForCausalLM is a dense model"):
        analyze(("m", mixtral), texts, settings, compare=("d", llama), scratch=tmp_path)
    with pytest.raises(CheckpointError, match=r"^LlamaForCausalLM is a dense model"):
        analyze(("d", llama), texts, settings)


def test_fewer_positions_in_the_second_model_are_refused(mixtral: Path, tmp_path: Path) -> None:
    shorter = tiny.save_mixtral(tmp_path / "shorter", max_position_embeddings=64)
    with pytest.raises(ConfigError, match="--seq-len 128: s has only 64 positions"):
        analyze(("m", mixtral), {"a": Text(TOKENS)}, Settings(device="cpu"), compare=("s", shorter), scratch=tmp_path)


def test_a_token_that_the_model_does_not_know(mixtral: Path) -> None:
    with pytest.raises(DataError, match="--data a: token 300 is not among the model's 300"):
        analyze(("m", mixtral), {"a": Text([1, 300, 2])}, Settings(device="cpu"))


def test_drift_of_what_cannot_be_compared_is_unknown(mixtral: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    load_model(mixtral).save_pretrained(other)
    tensors: dict[str, Any] = load_file(other / "model.safetensors")
    del tensors["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    tensors["model.layers.1.block_sparse_moe.gate.weight"] = torch.zeros(4, 32, dtype=torch.int8)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    rows = drift(mixtral, other, 4)
    assert rows[0]["experts"] == [0, None, 0, 0]
    assert rows[1]["router"] is None


def test_route_file_size(mixtral: Path, tmp_path: Path) -> None:
    model = load_model(mixtral)
    like = probe(model, RouterCapture(model))
    assert RouteFile(tmp_path, {"a": Text(TOKENS)}, 50, like).size == 2 * 50 * 2


def test_a_disk_that_is_full_is_said_before_the_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        assert (start, size) == (0, 2 * 50 * 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as caught:
        RouteFile(tmp_path, {"a": Text(TOKENS)}, 50, RoutingStats([0, 1], 8, 2))
    assert caught.value.filename == str(tmp_path)
