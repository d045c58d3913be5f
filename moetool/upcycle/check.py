"""Whether sources and a recipe fit together: every refusal names values that would work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moetool import registry
from moetool.arch.dense import EMBEDDING, FFN, LM_HEAD, DenseSpec, dims, layer_tensors, shape
from moetool.arch.forms import dense_tensors
from moetool.arch.spec import ArchSpec
from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.reader import CheckpointReader
from moetool.errors import CheckpointError, ConfigError
from moetool.layers import LayerRatios, check_layer_ratios, chosen_layers
from moetool.option import flag
from moetool.recipe import UpcycleRecipe
from moetool.upcycle.donors import check_weights
from moetool.values import FLOAT_DTYPES

MAX_STD = 1000  # far above any use; fp16 ends at 65504
MAX_EXPERTS = 10_000  # a layer: a plan holds a line for each matrix
# Left behind by old exporters, and models compute it; and what predicts several tokens at once, which no reader needs.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|^mtp\.")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")


def check_recipe(recipe: UpcycleRecipe, spec: ArchSpec, dense: Mapping[str, Any]) -> None:
    """Check a recipe against itself, the family and the dense model.

    Args:
        recipe: with `shared_experts` a number.
        spec: the family to write.
        dense: the filled dense config.

    Raises:
        ConfigError: a number is out of range or does not divide; names those that would work.
    """
    registry.check("method", recipe.method)
    registry.check("router", recipe.router)
    for name, choices in (
        ("drop_index", ("shared", "per-matrix")),
        ("drop_units", ("random", "least-used")),
        ("split", ("contiguous", "random", "activation")),
        ("dtype", ("auto", *FLOAT_DTYPES)),
    ):
        if getattr(recipe, name) not in choices:
            raise ConfigError(f"{name} {getattr(recipe, name)[:60]!r} is not one of {', '.join(choices)}")
    for name in ("drop_ratio", "noise_ratio"):
        if not isinstance(getattr(recipe, name), LayerRatios) and not 0 <= getattr(recipe, name) <= 1:
            raise ConfigError(f"{name.replace('_', ' ')} {getattr(recipe, name)} is not between 0 and 1")
    for name in ("router_std", "noise_std", "noise_scale"):
        if not 0 <= (getattr(recipe, name) or 0) <= MAX_STD:
            raise ConfigError(f"{name.replace('_', ' ')} {getattr(recipe, name)} is not between 0 and {MAX_STD}")
    if not 2 <= recipe.num_experts <= MAX_EXPERTS:
        raise ConfigError(f"--num-experts {recipe.num_experts} is not between 2 and {MAX_EXPERTS}")
    if not 1 <= recipe.top_k <= recipe.num_experts:
        raise ConfigError(f"--top-k {recipe.top_k} is not between 1 and the number of experts, {recipe.num_experts}")
    if (recipe.drop_units, recipe.drop_index) == ("least-used", "per-matrix"):
        raise ConfigError(
            "--drop-units least-used chooses whole units, but --drop-index per-matrix changes parts of them"
        )
    units, parts = dense["intermediate_size"], recipe.granularity
    if parts < 1 or units % parts:
        fitting = _few(n for n in range(1, min(units, MAX_EXPERTS) + 1) if units % n == 0)
        raise ConfigError(f"--granularity {parts} does not divide the intermediate size {units}; choose from {fitting}")
    if recipe.drop_units == "least-used" and not any(
        recipe.num_redrawn(units // parts, layer) for layer in range(dense["num_hidden_layers"])
    ):
        raise ConfigError(
            f"--drop-units least-used has no effect, because no unit of {units // parts} is changed; give a larger"
            f" --{recipe.method}-ratio{' or fewer --keep-experts-whole' * bool(recipe.keep_experts_whole)}, or leave it"
            " out"
        )
    _check_shared(recipe, spec)
    check_weights(recipe)
    if recipe.method == "scratch":
        if not spec.scratch:
            raise ConfigError(f"--method scratch does not know how to initialise {spec.model_type}; use another one")
        return
    group, donors = recipe.group_size, recipe.num_donors
    together = f"{group} experts together make up one dense FFN"
    if shared := recipe.shared_parts:
        together = f"{parts} parts minus {shared} in the shared expert leave groups of {group} experts"
    if recipe.num_experts % (group * donors):
        step = group * donors
        reasons = [together] * (group > 1)
        reasons += [f"each of {donors} donors provides the same number"] * (donors > 1)
        raise ConfigError(
            f"--num-experts {recipe.num_experts} is not a multiple of {step} ({', '.join(reasons)}); choose from"
            f" {_few(_multiples(step, recipe.num_experts))}"
        )
    whole, step = recipe.keep_experts_whole, group * donors
    if whole % step or not 0 <= whole <= recipe.num_experts:
        reasons = [together] * (group > 1) + [f"each of {donors} dense models keeps the same number"] * (donors > 1)
        because = f" and a multiple of {step} ({', '.join(reasons)})" if reasons else ""
        raise ConfigError(
            f"--keep-experts-whole {whole} is not between 0 and --num-experts {recipe.num_experts}{because}; choose"
            f" from {_few(range(0, recipe.num_experts + 1, step))}"
        )
    if recipe.top_k % group:
        raise ConfigError(
            f"--top-k {recipe.top_k} is not a multiple of {group}, so the start would not match the dense model"
            f" ({together}); choose from {_few(range(group, recipe.num_experts + 1, group))}"
        )
    if group > 1 and (recipe.router == "zeros" or recipe.router_std == 0):
        others = ", ".join(name for name in registry.names("router") if name != "zeros")
        raise ConfigError(
            f"--router zeros ties all groups of experts, so parts of several would be chosen; choose from {others},"
            " with --router-std above 0"
        )


def _check_shared(recipe: UpcycleRecipe, spec: ArchSpec) -> None:
    shared, parts = recipe.shared_experts or 0, recipe.granularity
    if spec.shared is None:
        if shared:
            raise ConfigError(
                f"{spec.model_type} has no shared experts; leave out --shared-experts {shared}, or choose a --target"
                f" that has them: {_with(lambda other: other.shared is not None)}"
            )
        return
    allowed = [*range(parts), *(n * parts for n in range(1, 5))]
    fitting = [n for n in allowed if n in spec.shared.sizes or not spec.shared.sizes]
    if shared < 0 or (shared > parts and shared % parts) or (spec.shared.sizes and shared not in spec.shared.sizes):
        raise ConfigError(
            f"--shared-experts {shared} does not fit {spec.model_type} with granularity {parts}; choose from"
            f" {_few(fitting)}"
        )


def _with(has: Callable[[ArchSpec], bool]) -> str:
    return ", ".join(name for name in registry.names("target") if has(registry.load("target", name)))


def _multiples(step: int, near: int) -> list[int]:
    first = max(1, near // step - 1)
    return [n * step for n in range(first, first + 5) if n * step > 1]


def _few(numbers: Iterable[int]) -> str:
    shown = list(numbers)
    return ", ".join(map(str, shown[:24])) + (", ..." if len(shown) > 24 else "")


def moe_layers(text: str, spec: ArchSpec, layers: int) -> frozenset[int]:
    """The layers that become MoE, of `--moe-layers`.

    Args:
        text: see `chosen_layers`.
        spec: the family to write.
        layers: of the dense model.

    Raises:
        ConfigError: it names no layers, or the family cannot have these dense layers.
    """
    chosen = chosen_layers(text, layers, "--moe-layers")
    if len(chosen) < layers:
        able = _with(lambda other: other.moe_layers is not None)
        if spec.moe_layers is None:
            raise ConfigError(
                f"--moe-layers {text}: {spec.model_type} cannot have dense layers; choose a --target that can: {able}"
            )
        try:
            spec.moe_layers(chosen, layers)
        except ValueError as error:
            raise ConfigError(f"--moe-layers {text} does not fit {spec.model_type}: {error}") from None
    return chosen


def check_ratios(recipe: UpcycleRecipe, moe: frozenset[int], layers: int) -> None:
    """Check the layers for which a recipe has ratios of their own.

    Raises:
        ConfigError: one is not there, has no experts, or is named twice.
    """
    for name in ("drop_ratio", "noise_ratio"):
        ratios = getattr(recipe, name)
        if isinstance(ratios, LayerRatios):
            check_layer_ratios(ratios, moe, layers, flag(name))


def check_tensors(reader: CheckpointReader, dense_spec: DenseSpec, dense: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Check every tensor of a dense model against its family and config.json; return those to use.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape than config.json says, or
            does not hold plain floating-point numbers.
    """
    if dense["num_hidden_layers"] > len(reader.tensors):  # before names are made of a number that may be anything
        raise CheckpointError(
            f"{reader.folder}: config.json says {dense['num_hidden_layers']} layers, but there are only"
            f" {len(reader.tensors)} tensors; fetch the checkpoint again"
        )
    sizes = dims(dense)
    expected = {EMBEDDING: "V D", dense_spec.norm: "D", LM_HEAD: "V D"}
    for layer in range(dense["num_hidden_layers"]):
        inner = layer_tensors(dense_spec, dense, layer) | FFN
        expected |= {f"model.layers.{layer}.{name}": letters for name, letters in inner.items()}
    tensors = dense_tensors(reader.tensors, reader.config, dense_spec, dense)
    found = {name: info for name, info in tensors.items() if not IGNORED.search(name)}
    for name, info in found.items():
        if name not in expected:
            raise CheckpointError(f"{reader.folder}: tensor {name[:100]} does not belong in a {dense_spec.model_type}")
        if info.shape != shape(expected[name], sizes):
            raise CheckpointError(
                f"{reader.folder}: tensor {name} has shape {list(info.shape)},"
                f" config.json says {list(shape(expected[name], sizes))}"
            )
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{reader.folder}: tensor {name} has dtype {info.dtype}; only {', '.join(FLOAT_DTYPES)} can be upcycled"
            )
    missing = [name for name in expected if name not in found and name != LM_HEAD]
    if not missing and LM_HEAD not in found and not dense["tie_word_embeddings"]:
        raise CheckpointError(
            f"{reader.folder} has no output head ({LM_HEAD}), and its embeddings are not tied, so it is a base model"
            " without its language-modelling head; save the ...ForCausalLM that it belongs to"
        )
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{reader.folder}: tensor {missing[0]}{more} is missing; fetch the checkpoint again")
    # A head saved beside tied embeddings is dropped only if it is the same tensor; transformers
    # unties them when it is not, and so do we.
    if LM_HEAD in found and dense["tie_word_embeddings"] and reader.same(found[LM_HEAD], found[EMBEDDING]):
        del found[LM_HEAD]
    return found


def check_donor(
    first: CheckpointReader, donor: CheckpointReader, configs: tuple[Mapping[str, Any], Mapping[str, Any]]
) -> None:
    """Check a donor against the first dense model: tensors can be averaged only where all else is the same.

    Args:
        first: DENSE.
        donor: another.
        configs: what the family's config.json would be for either, without the token ids.

    Raises:
        ConfigError: their configs or tokenizers differ; says where.
    """
    ours, theirs = configs
    differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"--donor {donor.folder}: {key} is {theirs.get(key)!r}, but {ours.get(key)!r} in {first.folder}; donors"
            " must be trained from the same dense model and differ only in weights"
        )
    # tokenizer.json says all; what lies beside it is what it was made from, which not everybody keeps.
    whole = all((reader.folder / TOKENIZER_FILES[0]).is_file() for reader in (first, donor))
    for name in TOKENIZER_FILES[:1] if whole else TOKENIZER_FILES:
        if _content(first, name) != _content(donor, name):
            raise ConfigError(
                f"--donor {donor.folder}: its {name} differs from that of {first.folder};"
                " all donors must have the same tokenizer"
            )


def _content(reader: CheckpointReader, name: str) -> Any:
    path = reader.folder / name
    if not path.is_file():
        return None
    raw = path.read_bytes()
    try:
        document = json.loads(raw) if name == "tokenizer.json" else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        return raw
    # Truncation and padding say how somebody called it last, not what it is; merges were written "a b" before
    # they were written ["a", "b"].
    model = document.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        document["model"] = model | {"merges": merges}
    return {key: value for key, value in document.items() if key not in ("truncation", "padding", "version")}
