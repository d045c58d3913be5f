"""Which experts of two checkpoints correspond, by their changes since they were one model (moetool.json).

Shapes: E experts of a checkpoint, A experts of the model that both come from, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetool.checkpoint.reader import CheckpointReader, content_fingerprint, sha256_file
from moetool.checkpoint.step_folder import in_state
from moetool.errors import CheckpointError
from moetool.lineage import LINEAGE, lineage_entries, read_experts, recorded_sources
from moetool.routing.load_metrics import Array

Entries = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Alignment:
    """Two checkpoints of one model, of which experts were copied, left out or put in another order.

    Attributes:
        originals: of each checkpoint: layer -> for each expert the one of the model that both come from.
        since: of each checkpoint, the commands since then.
    """

    originals: tuple[Mapping[int, Sequence[int]], Mapping[int, Sequence[int]]]
    since: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def num_originals(self) -> int:
        """A, as far as one of the checkpoints still has them."""
        return 1 + max(expert for one in self.originals for layer in one.values() for expert in layer)

    def map(self, side: int, layer: int) -> Tensor:
        """The original of each expert of the first (0) or second (1) checkpoint: (E,), int64."""
        return torch.tensor(self.originals[side][layer])

    def pooled(self, side: int, values_LE: Array) -> Array:
        """Sums over the copies of each original: (L, A)."""
        sums_LA = np.zeros((len(values_LE), self.num_originals))
        for row, originals in enumerate(self.originals[side].values()):
            np.add.at(sums_LA[row], list(originals), values_LE[row])
        return sums_LA

    def counterparts(self, layer: int) -> list[list[int]]:
        """For each expert of the second checkpoint, those of the first that come from the same original."""
        first, second = (one[layer] for one in self.originals)
        return [[e for e, original in enumerate(first) if original == wanted] for wanted in second]

    def describe(self) -> dict[str, Any]:
        """The report's `comparison.experts`."""
        rows = []
        for layer, first in self.originals[0].items():
            counterparts = self.counterparts(layer)
            together: dict[tuple[int, ...], list[int]] = {}
            for expert, those in enumerate(counterparts):
                together.setdefault(tuple(those), []).append(expert)
            pruned = together.pop((), [])
            found = {expert for those in together for expert in those}
            copies = [{"of": list(those), "experts": now} for those, now in together.items() if len((*those, *now)) > 2]
            rows.append(
                {
                    "layer": layer,
                    "counterparts": counterparts,
                    "copies": copies,
                    "pruned_in_first": pruned,
                    "pruned_in_second": [expert for expert in range(len(first)) if expert not in found],
                }
            )
        return {"since": [list(commands) for commands in self.since], "layers": rows}


def line_up(folders: tuple[Path, Path], num_experts: tuple[int, int], layers: Sequence[int]) -> Alignment | None:
    """Line up the experts of two checkpoints.

    Args:
        folders: of them.
        num_experts: of each, per layer.
        layers: those with experts.

    Returns:
        None where moetool.json does not name a model that both come from, or where no command since then has changed
        which experts there are: experts of one number then correspond, if there are as many.

    Raises:
        CheckpointError: a moetool.json is damaged, or not of its checkpoint.
    """
    first, second = lineages = [lineage_entries(folder) for folder in folders]
    shared = 0
    while shared < min(map(len, lineages)) and first[shared] == second[shared]:
        shared += 1
    tails = [lineage[shared:] for lineage in lineages]
    if not any(_experts_of(entry) for tail in tails for entry in tail):
        return None
    if not shared and not _same_beginning(folders, first, second):  # last, because it may have to read a whole model
        return None
    # A checkpoint whose experts nobody has changed has as many as the model that both come from.
    sides = list(zip(tails, num_experts, folders, strict=True))
    known = next((number for tail, number, _ in sides if not any(map(_experts_of, tail))), None)
    found = [originals(tail, number, layers, folder / LINEAGE, known) for tail, number, folder in sides]
    commands = [tuple(str(entry.get("command")) for entry in tail) for tail in tails]
    return Alignment((found[0], found[1]), (commands[0], commands[1]))


def originals(
    entries: Entries, num_experts: int, layers: Sequence[int], path: Path, first: int | None = None
) -> dict[int, list[int]]:
    """For each expert of a checkpoint, the one that it comes from before some entries of its lineage.

    Args:
        entries: that were added since, in order.
        num_experts: of the checkpoint, per layer.
        layers: those with experts.
        path: moetool.json.
        first: experts per layer before, where that is known.

    Raises:
        CheckpointError: the entries are not of such a checkpoint.
    """
    now = {layer: list(range(num_experts)) for layer in layers}
    recorded = [found for entry in reversed(entries) if (found := _experts_of(entry)) is not None]
    for number, one in enumerate(recorded):
        before = read_experts(one, 2**31)
        if before.keys() != now.keys():
            raise CheckpointError(f"{path}: the layers of an entry are others than those with experts")
        counts = {len(experts) for experts in before.values()}
        needed = 1 + max(expert for experts in now.values() for expert in experts)
        # The last entry has as many as the checkpoint; of an earlier one, the later ones may have left some out.
        if len(counts) != 1 or min(counts) < needed or (number == 0 and counts != {num_experts}):
            other = f"a later entry has expert {needed - 1}" if number else f"config.json says {num_experts}"
            raise CheckpointError(
                f"{path} says {min(counts)} experts, but {other}; delete it to analyse the checkpoint without it"
            )
        now = {layer: [before[layer][expert] for expert in now[layer]] for layer in layers}
    last = max(expert for experts in now.values() for expert in experts)
    if first is not None and (last >= first or (not recorded and last + 1 != first)):
        other = f"one comes from expert {last}" if recorded else f"config.json says {num_experts}"
        raise CheckpointError(
            f"{path} says {first} experts, but {other}; delete it to analyse the checkpoint without it"
        )
    return now


def _experts_of(entry: Mapping[str, Any]) -> Any:
    return entry.get("recipe", {}).get("experts")


def _same_beginning(folders: tuple[Path, Path], first: Entries, second: Entries) -> bool:
    """Whether two lineages without a common entry begin with the same Mixture of Experts; one may be that itself."""
    if not first and not second:
        return False
    known = [_beginning(lineage[0]) if lineage else None for lineage in (first, second)]
    if first and second:
        return known[0] is not None and known[0] == known[1]
    (folder,) = (folder for folder, lineage in zip(folders, (first, second), strict=True) if not lineage)
    (recorded,) = (one for one, lineage in zip(known, (first, second), strict=True) if lineage)
    if isinstance(recorded, dict):
        shards = CheckpointReader(folder).shards
        return set(shards) == recorded.keys() and all(sha256_file(folder / s) == recorded[s] for s in shards)
    return recorded is not None and recorded == content_fingerprint(folder)


def _beginning(entry: Mapping[str, Any]) -> dict[str, str] | str | None:
    """The content of the model that a first entry began with: SHA-256 of its files, or of a training its fingerprint.

    None where it is not known, or where that model had no experts.
    """
    if entry.get("command") == "cpt":
        return str(entry["model"]) if entry.get("model") else None
    files = recorded_sources(dict(entry))[0].get("sha256")
    if entry.get("command") == "upcycle" or not isinstance(files, dict):
        return None
    return {str(name): str(sha256) for name, sha256 in files.items() if not in_state(str(name))} or None
