"""Tokens of a run: which sequences each step, process and validation reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moetool.data.make_tokens import tokenized
from moetool.data.mixture import Source, TokenMixture
from moetool.data.text import TextSource
from moetool.data.tokens import TokenStream, split_validation
from moetool.errors import DataError
from moetool.progress import Progress, silent
from moetool.train.config import TrainConfig
from moetool.train.weights import phases

IGNORED = -100  # the label of a place that is not predicted


@dataclass(frozen=True)
class Corpus:
    """The token streams of a run.

    Attributes:
        train: name -> tokens that are trained on.
        replay: likewise.
        val: name -> tokens that are never trained on.
        fingerprints: option (train, replay, val) -> name -> digest of the tokens before any split.
    """

    train: Mapping[str, TokenStream]
    replay: Mapping[str, TokenStream]
    val: Mapping[str, TokenStream]
    fingerprints: Mapping[str, Mapping[str, str]]


def open_corpus(config: TrainConfig, vocab_size: int, progress: Progress = silent) -> Corpus:
    """Tokenize or open every source, and hold out the validation documents.

    A source without a validation set of its own name gives `val_fraction` of its documents to one, or the last part
    of its only document.

    Args:
        config: the run.
        vocab_size: rows of the model's embedding.
        progress: reports what is tokenized.

    Raises:
        DataError: a source cannot be read, its tokenizer knows more tokens than the model, or what is
            validated on would be trained on.
    """
    tokenizer = Path(config.model)

    def read(path: str) -> TokenStream:
        stream = tokenized(TextSource(path, config.text_field, config.document), tokenizer, progress)
        known = int(stream.manifest.get("vocab_size", 0))
        if known > vocab_size:
            raise DataError(
                f"the tokenizer in {tokenizer} has {known} tokens, but the model has {vocab_size} embedding rows;"
                " use the tokenizer that belongs to the model"
            )
        return stream

    kinds = {"train": config.train, "replay": config.replay, "val": config.val}
    streams = {kind: {name: read(path) for name, path in named.items()} for kind, named in kinds.items()}
    fingerprints = {
        kind: {name: str(stream.manifest["sha256"]) for name, stream in named.items()}
        for kind, named in streams.items()
    }
    _check_apart(config, fingerprints)
    held_out = {}
    for kind in ("train", "replay"):
        for name, stream in streams[kind].items():
            if config.val_fraction > 0 and name not in config.val:
                streams[kind][name], held_out[name] = split_validation(stream, config.val_fraction, config.seed)
    val = {**held_out, **streams["val"]}
    for name, stream in val.items():
        if stream.num_tokens < 2:
            raise DataError(f"validation set '{name}' has fewer than 2 tokens, so none can be predicted")
    return Corpus(streams["train"], streams["replay"], val, fingerprints)


def _check_apart(config: TrainConfig, fingerprints: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse a validation set that would be trained on: of the same text as a source.

    What is held out of a source is held out of its twins, too, but not of one that is trained on whole.
    """
    sources = {**fingerprints["train"], **fingerprints["replay"]}
    sets = {f"--val {name}": digest for name, digest in fingerprints["val"].items()}
    split = {name: digest for name, digest in sources.items() if config.val_fraction and name not in config.val}
    for name, digest in sources.items():
        for other, text in (sets if name in split else {**sets, **split}).items():
            if text == digest:
                raise DataError(
                    f"source '{name}' has the same text as {other}, which is used for validation and must not be"
                    " trained on; leave one of them out (without --val, documents are held out of a source)"
                )


def mix(corpus: Corpus, config: TrainConfig) -> TokenMixture:
    """The sequence of samples of a run; `config` is resolved."""
    sources = [
        Source(name, stream, phases(config.weight.get(name, 1)), replay=kind == "replay")
        for kind, named in (("train", corpus.train), ("replay", corpus.replay))
        for name, stream in named.items()
    ]
    return TokenMixture(sources, config.seq_len, config.global_batch_size, config.replay_ratio, config.seed)


@dataclass(frozen=True)
class MicroBatch:
    """The sequences that one process runs in one forward pass.

    Attributes:
        inputs: int64 (micro_batch_size, seq_len).
        labels: likewise, the token after each input; IGNORED where nothing is predicted.
        positions: likewise, each input's place in its document; None where documents see each other.
        seed: of the random numbers drawn in its forward.
        taught: how many of its sequences have a teacher; they are the first.
    """

    inputs: Tensor
    labels: Tensor
    positions: Tensor | None
    seed: int = 0
    taught: int = 0

    def ready_for(self, device: torch.device) -> MicroBatch:
        """The same, for a GPU in memory from which it copies without the processor.

        That is pinned, and one piece: of anything else torch makes a copy first, which is not pinned.
        """
        if device.type != "cuda":
            return self
        inputs, labels = self.inputs.contiguous().pin_memory(), self.labels.contiguous().pin_memory()
        positions = None if self.positions is None else self.positions.contiguous().pin_memory()
        return replace(self, inputs=inputs, labels=labels, positions=positions)


def micro_batches(
    mixture: TokenMixture, config: TrainConfig, step: int, rank: int, num_processes: int
) -> list[MicroBatch]:
    """The share of one process in the batch of a step (from 0): a pure function of its arguments.

    Micro-batches are numbered over all processes and dealt out in turn, so that their contents and
    seeds, and with them the step's result, do not depend on the number of processes.
    """

    def taught(n: int) -> bool:
        if config.teacher is None or config.teacher_on == "all":
            return config.teacher is not None
        return mixture.sources[mixture.sample(n).source].replay

    size = config.micro_batch_size
    samples = mixture.batch(step)
    share = []
    for number in range(rank, len(samples) // size, num_processes):
        chosen = sorted(samples[number * size : (number + 1) * size], key=taught, reverse=True)  # which is stable
        tokens = torch.from_numpy(np.stack([mixture.tokens(n) for n in chosen]))
        positions = None
        if not config.cross_document:
            positions = torch.from_numpy(np.stack([mixture.positions(n)[:-1] for n in chosen]))
        key = np.random.SeedSequence([config.seed, step, number]).generate_state(1, np.uint64)
        num_taught = sum(map(taught, chosen))
        share.append(MicroBatch(tokens[:, :-1], tokens[:, 1:], positions, int(key[0]), num_taught))
    return share


def validation_batches(stream: TokenStream, config: TrainConfig, rank: int, num_processes: int) -> Iterator[MicroBatch]:
    """Batches that predict every token of a stream but its first once, as many for each process.

    The last window may be shorter: its rest is filled up, to the right of all that is predicted, and
    labelled IGNORED. A process for which no window is left gets one without anything to predict, since
    all processes must take part where weights are sharded.
    """
    length, size = config.seq_len, config.micro_batch_size
    starts = range(0, max(0, stream.num_tokens - 1), length)
    for begin in range(0, len(starts), num_processes * size):
        inputs, labels, positions = [], [], []
        for start in starts[begin + rank * size : begin + (rank + 1) * size] or [stream.num_tokens - 1]:
            here = min(length + 1, stream.num_tokens - start)
            window, rest = stream.read(start, here), length + 1 - here
            inputs.append(np.pad(window[:-1], (0, rest)))
            labels.append(np.pad(window[1:], (0, rest), constant_values=IGNORED))
            positions.append(np.pad(stream.positions(start, here)[:-1], (0, rest)))
        stacked = [torch.from_numpy(np.stack(rows)) for rows in (inputs, labels, positions)]
        yield MicroBatch(stacked[0], stacked[1], None if config.cross_document else stacked[2])
