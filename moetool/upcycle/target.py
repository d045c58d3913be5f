"""The family to write: the first that fits the dense model, the recipe, and the clients that must run it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moetool.arch.clients import CLIENTS, obstacles
from moetool.arch.spec import ArchSpec, candidates
from moetool.errors import ConfigError
from moetool.option import flag
from moetool.recipe import UpcycleRecipe
from moetool.upcycle.check import check_ratios, check_recipe, moe_layers


@dataclass(frozen=True)
class Settled:
    """A recipe that fits a family.

    Attributes:
        recipe: with the family's name, and a number of shared experts.
        spec: the family.
        moe: the layers that are MoE.
        config: config.json, but for what follows from the tensors.
        clients: client -> why it does not compute the result as transformers 5 does, None where it does.
    """

    recipe: UpcycleRecipe
    spec: ArchSpec
    moe: frozenset[int]
    config: dict[str, Any]
    clients: Mapping[str, str | None]

    def missing(self, clients: Sequence[str]) -> list[str]:
        """Those of some clients that do not compute it exactly."""
        return [client for client in clients if self.clients[client]]


def settle(recipe: UpcycleRecipe, dense: Mapping[str, Any], clients: Sequence[str], beside: Collection[str]) -> Settled:
    """Settle a recipe's open choices.

    Args:
        recipe: `target` may be `auto`, `shared_experts` None.
        dense: the filled dense config.
        clients: names in `arch/clients.py`; with `auto`, the first family that runs in all of them is taken.
        beside: the names of the source's files, and the special tokens of its tokenizer.

    Raises:
        ConfigError: the recipe fits no family, or what it gives does not run in a client; names the nearest
            that does.
    """
    specs = candidates(recipe.target, dense)
    first = _settle(recipe, specs[0], dense, beside)
    if not first.missing(clients):
        return first
    for spec in specs[1:]:
        other = _attempt(recipe, spec, dense, beside)
        if other and not other.missing(clients):
            return other
    client = first.missing(clients)[0]
    raise ConfigError(
        f"--for {client}: {first.spec.model_type} with these options does not run in {CLIENTS[client]}, because"
        f" {first.clients[client]}; {_nearest(recipe, dense, clients, beside)}"
    )


def _settle(recipe: UpcycleRecipe, spec: ArchSpec, dense: Mapping[str, Any], beside: Collection[str]) -> Settled:
    shared = recipe.shared_experts
    if shared is None:
        shared = spec.shared.default if spec.shared else 0
    recipe = replace(recipe, target=spec.model_type, shared_experts=shared)
    check_recipe(recipe, spec, dense)
    moe = moe_layers(recipe.moe_layers, spec, dense["num_hidden_layers"])
    check_ratios(recipe, moe, dense["num_hidden_layers"])
    config = spec.config(dense, recipe, moe)
    if not spec.ties:
        config["tie_word_embeddings"] = False
    return Settled(recipe, spec, moe, config, obstacles(config, beside))


def _attempt(
    recipe: UpcycleRecipe, spec: ArchSpec, dense: Mapping[str, Any], beside: Collection[str]
) -> Settled | None:
    try:
        return _settle(recipe, spec, dense, beside)
    except ConfigError:
        return None


def _nearest(recipe: UpcycleRecipe, dense: Mapping[str, Any], clients: Sequence[str], beside: Collection[str]) -> str:
    """Advice on what would run: the fewest options changed, the target before the others."""
    changes: list[dict[str, Any]] = [{}, {"shared_experts": None}, {"moe_layers": "all"}]
    changes += [{"shared_experts": None, "moe_layers": "all"}]
    changes += [{"shared_experts": None, "moe_layers": "all", "granularity": 1}]
    for change in changes:
        for spec in candidates("auto", dense):
            other = _attempt(replace(recipe, **change), spec, dense, beside)
            if other and not other.missing(clients):
                without = [flag(name) for name in change if getattr(recipe, name) != change[name]]
                left_out = f" and leave out {' and '.join(without)}" if without else ""
                return f"use --target {spec.model_type}{left_out}"
    wanted = " and ".join(CLIENTS[client] for client in clients)
    for spec in candidates("auto", dense):
        for file in {limit.unless for limit in spec.limits if limit.unless}:
            other = _attempt(recipe, spec, dense, {*beside, file})
            if other and not other.missing(clients):
                return f"--target {spec.model_type} would if DENSE's tokenizer had {file}"
    return f"no --target for a dense {dense['model_type']} runs in {wanted}"
