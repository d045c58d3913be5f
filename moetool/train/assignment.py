"""Which process writes which part of a step folder: a pure function of the processes' shards.

A part is what one process makes whole at a time: a parameter that lies in the checkpoint under names of its own, a
moment of the optimizer, or the state of a balance strategy. It becomes some tensors on disk. Every part has a writer,
every writer its own files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from moetool.train.shards import Region, num_elements
from moetool.train.tensor_file import Entry

# The kinds of files, and their names; of `model` none is larger than this.
FILES = {
    "model": "model{}.safetensors",
    "master": "training_state/master{}.safetensors",
    "optimizer": "training_state/optimizer{}.safetensors",
    "balance": "training_state/balance{}.safetensors",
}
MAX_MODEL_FILE = "5GB"
# Whole tensors by name -> what they become on disk: kind of file, name there, tensor.
Contents = Callable[[Mapping[str, Tensor]], Iterable[tuple[str, str, Tensor]]]


@dataclass(frozen=True)
class Held:
    """A tensor, and the regions of it that the processes hold, one each."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Part:
    """Tensors that one process makes whole at the same time, and writes, to files of some kinds."""

    names: tuple[str, ...]
    writer: int
    kinds: frozenset[str]


@dataclass(frozen=True)
class File:
    """A file of a step folder: its path, the process that writes it, and its tensors."""

    path: str
    kind: str
    writer: int
    entries: Mapping[str, Entry]


@dataclass(frozen=True)
class Assignment:
    """The work of each process to save a step.

    Attributes:
        rounds: of parts, at most one of each writer.
        sources: of each tensor: which process gives which region of it.
        held: the tensors.
        files: all that hold tensors.
    """

    rounds: tuple[tuple[Part, ...], ...]
    sources: Mapping[str, Mapping[int, Region]]
    held: Mapping[str, Held]
    files: tuple[File, ...]

    def given(self, rank: int) -> list[str]:
        """The tensors of which a process gives a region, to another one or to itself."""
        return [name for name, regions in self.sources.items() if rank in regions]

    def only(self, kinds: Collection[str]) -> Assignment:
        """The part of it that is for some kinds of files: every process still gives and writes what it does for all."""
        rounds = tuple(tuple(part for part in parts if not part.kinds.isdisjoint(kinds)) for parts in self.rounds)
        names = [name for parts in rounds for part in parts for name in part.names]
        files = tuple(file for file in self.files if file.kind in kinds)
        return replace(self, rounds=rounds, sources={name: self.sources[name] for name in names}, files=files)

    def sent(self, rank: int) -> int:
        """Bytes that a process sends to others."""
        writers = {name: part.writer for parts in self.rounds for part in parts for name in part.names}
        return sum(
            num_elements(self.sources[name][rank]) * self.held[name].dtype.itemsize
            for name in self.given(rank)
            if writers[name] != rank
        )


def assign(held: Mapping[str, Held], units: Sequence[tuple[str, ...]], contents: Contents, size: int) -> Assignment:
    """Share out the work of saving a step.

    Args:
        held: all tensors that are saved, by name.
        units: names of tensors that are converted together, in the order of the checkpoint.
        contents: what they become on disk; is called with tensors on torch's meta device.
        size: number of processes.

    Raises:
        ValueError: the processes do not hold all of a tensor.
    """
    made = [list(contents({name: _empty(held[name]) for name in names})) for names in units]
    writers = balanced([sum(tensor.nbytes for _, _, tensor in entries) for entries in made], size)
    sources: dict[str, Mapping[int, Region]] = {}
    for turn, (names, writer) in enumerate(zip(units, writers, strict=True)):
        sources |= {name: givers(name, held[name], writer, turn) for name in names}
    queues: list[dict[frozenset[str], list[Part]]] = [{} for _ in range(size)]
    # The largest first, so that parts of one round take about the same time.
    order = sorted(range(len(units)), key=lambda i: (-sum(tensor.nbytes for _, _, tensor in made[i]), i))
    for i in order:
        part = Part(units[i], writers[i], frozenset(kind for kind, _, _ in made[i]))
        queues[part.writer].setdefault(part.kinds, []).append(part)
    rounds = tuple(
        tuple(part for part in parts if part) for parts in zip_longest(*(spread(queue.values()) for queue in queues))
    )
    return Assignment(rounds, sources, held, tuple(_files(made, writers, size)))


def balanced(sizes: Sequence[int], size: int) -> list[int]:
    """A process for each of some pieces of work: the largest first, to the one that has least."""
    loads, chosen = [0] * size, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        chosen[i] = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[chosen[i]] += sizes[i]
    return chosen


def spread(groups: Iterable[Sequence[Part]]) -> list[Part]:
    """All parts of some groups, each group in its order and evenly spread, so that all files grow at the same time."""
    placed = [((n + 0.5) / len(group), part) for group in groups for n, part in enumerate(group)]
    return [part for _, part in sorted(placed, key=lambda place: place[0])]


def givers(name: str, held: Held, writer: int, turn: int) -> dict[int, Region]:
    """The processes that together hold a tensor once, and what each gives: of copies the writer's own, or in turn.

    Raises:
        ValueError: they do not hold all of it.
    """
    holders: dict[Region, list[int]] = {}
    for rank, region in enumerate(held.regions):
        if num_elements(region):
            holders.setdefault(region, []).append(rank)
    total = math.prod(held.shape)
    if sum(map(num_elements, holders)) != total:
        raise ValueError(f"the processes hold {sum(map(num_elements, holders))} of {total} elements of {name}")
    return {writer if writer in ranks else ranks[turn % len(ranks)]: region for region, ranks in holders.items()}


def _empty(held: Held) -> Tensor:
    return torch.empty(held.shape, dtype=held.dtype, device="meta")


def _files(made: Sequence[list[tuple[str, str, Tensor]]], writers: Sequence[int], size: int) -> Iterable[File]:
    for kind, pattern in FILES.items():
        packs: list[tuple[int, dict[str, Tensor]]] = []
        for rank in range(size):
            own = (entries for entries, writer in zip(made, writers, strict=True) if writer == rank)
            tensors = {name: tensor for entries in own for of, name, tensor in entries if of == kind}
            if kind == "model":
                split = split_torch_state_dict_into_shards(tensors, max_shard_size=MAX_MODEL_FILE)
                packs += [(rank, {n: tensors[n] for n in names}) for names in split.filename_to_tensors.values()]
            elif tensors:
                packs.append((rank, tensors))
        for number, (rank, tensors) in enumerate(packs, 1):
            suffix = "" if len(packs) == 1 else f"-{number:05d}-of-{len(packs):05d}"
            entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            yield File(pattern.format(suffix), kind, rank, entries)
