"""The checkpoints to average: their selection and order, and whether they belong to one model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moetool.average.recipe import SHAPES, AverageRecipe, coefficients
from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.model import tokenizer_sha256
from moetool.checkpoint.reader import CheckpointReader
from moetool.checkpoint.step_folder import STEPS, WEIGHTS, step_folders
from moetool.errors import ConfigError
from moetool.lineage import lineage_entries, recorded_sources
from moetool.surgery.sources import Sources

# Keys of config.json that do not change what a model computes.
_NO_MATTER = {"transformers_version", "_name_or_path", "use_cache", "output_router_logits", "dtype", "torch_dtype"}
_ALIGNED = ("cpt", "convert", "average")  # commands after which a unit is still where it was
_ADVICE = "average checkpoints of one model"


def expand(names: Sequence[str], last: int | None) -> list[str]:
    """The checkpoints that a command line names: a run's folder stands for its snapshots, or else its step folders.

    Step folders beside snapshots do not count: where a run was stopped, it has one more, out of the even distances.

    Args:
        names: folders, or models of the hub.
        last: so many checkpoints of each run; None for all.

    Raises:
        ConfigError: a run has fewer, or there is no run.
    """
    found: list[str] = []
    runs = 0
    for name in names:
        of = {kind: [*step_folders(Path(name).expanduser(), kind).values()] for kind in (WEIGHTS, STEPS)}
        path = Path(name).expanduser()
        steps = of[WEIGHTS] or of[STEPS] or [*step_folders(path.parent, path.name).values()]
        runs += bool(steps)
        if steps and last is not None and last > len(steps):
            what = "snapshots" if of[WEIGHTS] else "step folders"
            raise ConfigError(
                f"--last {last}: {name} has {len(steps)} {what}; give at most that (cpt --keep-weights keeps more)"
            )
        found += [str(step) for step in (steps[-last:] if last else steps)] or [name]
    if last is not None and not runs:
        raise ConfigError(f"--last {last}: {names[0]} is not the folder of a run; leave --last out")
    return found


def in_order(sources: Sources, recipe: AverageRecipe) -> tuple[Sources, AverageRecipe]:
    """Checkpoints, each with its weight, from the one trained least to the one trained most.

    Raises:
        ConfigError: there are more or fewer weights than checkpoints, or one is named twice.
    """
    folders = [reader.folder.resolve() for reader in sources.readers]
    if twice := [name for n, name in enumerate(sources.names) if folders[n] in folders[:n]]:
        raise ConfigError(f"{twice[0]} is given twice; to count it more, use --weights")
    keys = [
        (tokens_trained(lineage_entries(reader.folder)), str(folder))
        for reader, folder in zip(sources.readers, folders, strict=True)
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    weights = recipe.weights
    if weights not in SHAPES:
        coefficients(weights, len(order))  # one for each
        numbers = weights.split(",")
        weights = ",".join(numbers[n] for n in order)
    elif weights == "minus-sqrt" and len({tokens for tokens, _ in keys}) < len(keys):
        raise ConfigError(
            "--weights minus-sqrt counts older checkpoints more, but moetool.json does not say which were trained more"
            " than others; average step folders of one run, or give numbers"
        )
    names, readers = sources.names, sources.readers
    return Sources(tuple(names[n] for n in order), tuple(readers[n] for n in order)), AverageRecipe(weights)


def tokens_trained(entries: Iterable[Mapping[str, Any]]) -> int:
    """Tokens of all training in a lineage; of an average, those of the checkpoint that was trained most."""
    total = 0
    for entry in entries:
        if entry.get("command") == "cpt" and type(entry.get("tokens")) is int:
            total += entry["tokens"]
        elif entry.get("command") == "average":
            total += max(tokens_trained(source.get("lineage", [])) for source in recorded_sources(dict(entry)))
    return total


def check_one_model(readers: Sequence[CheckpointReader]) -> None:
    """Refuse checkpoints of which a mean would be no model.

    Raises:
        ConfigError: another architecture, other experts, or another tokenizer; says which and why.
    """
    first = readers[0]
    for other in readers[1:]:
        pair = f"{other.folder} and {first.folder}"
        for key in sorted((first.config.keys() | other.config.keys()) - _NO_MATTER):
            if other.config.get(key) != first.config.get(key):
                values = [str(config.get(key))[:60] for config in (other.config, first.config)]
                raise ConfigError(f"{pair} are different models: {key} is {values[0]} and {values[1]}; {_ADVICE}")
        for name in sorted(first.tensors.keys() | other.tensors.keys()):
            kinds = [_kind(reader.tensors.get(name)) for reader in (other, first)]
            if kinds[0] != kinds[1]:
                raise ConfigError(f"{pair} differ: tensor {name[:100]} is {kinds[0]} and {kinds[1]}; {_ADVICE}")
        if _origin(other) != _origin(first):
            raise ConfigError(
                f"{pair} do not come from one upcycling (moetool.json), so the units of their experts do not"
                f" correspond; {_ADVICE}"
            )
        starts = {start for reader in (other, first) if (start := _start(reader))}
        if len(starts) > 1:
            raise ConfigError(
                f"{pair} were trained from two models (moetool.json), so their units do not correspond; {_ADVICE}"
            )
        folders = [reader.folder for reader in (other, first) if (reader.folder / "tokenizer.json").is_file()]
        if len({tokenizer_sha256(folder) for folder in folders}) > 1:
            raise ConfigError(f"{pair} have different tokenizers; {_ADVICE}")


def _kind(info: TensorInfo | None) -> str:
    return f"{info.dtype} {list(info.shape)}" if info else "absent"


def _origin(reader: CheckpointReader) -> list[tuple[Any, ...]]:
    """What was done to a checkpoint's units: the same for two of which each unit has one origin."""
    done = [entry for entry in lineage_entries(reader.folder) if entry.get("command") not in _ALIGNED]
    return [
        (entry.get("command"), entry.get("recipe"), [source.get("sha256") for source in recorded_sources(entry)])
        for entry in done
    ]


def _start(reader: CheckpointReader) -> Any:
    """The fingerprint of the model that was trained first; None where something else was done first, or is unknown."""
    entries = lineage_entries(reader.folder)
    return entries[0].get("model") if entries and entries[0].get("command") == "cpt" else None
