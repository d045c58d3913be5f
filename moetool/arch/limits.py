"""Limits of other programs that read our checkpoints: a client, a condition on config.json, and the reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


def always(config: Config) -> bool:
    """The family as such."""
    return True


@dataclass(frozen=True)
class Limit:
    """A client that does not compute some checkpoints of a family as transformers does.

    Attributes:
        client: a name in `arch/clients.py`.
        reason: what it does instead, to follow "not in CLIENT, because".
        when: whether it holds for a config.json.
        unless: a special token or a file of the tokenizer with which it does not hold.
    """

    client: str
    reason: str
    when: Callable[[Config], bool] = always
    unless: str | None = None

    def holds(self, config: Config, beside: Collection[str]) -> bool:
        """Whether it holds for a config.json, and for the files and special tokens beside it.

        A config.json that lacks what it depends on, or has nonsense there, is not said to run.
        """
        try:
            return self.when(config) and not (self.unless and self.unless in beside)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
            return True


def windowed(config: Config) -> bool:
    """Some layer looks back over a window only."""
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", True) is not False
    return used and window is not None and window < config.get("max_position_embeddings", math.inf)


def windowed_in_some(config: Config) -> bool:
    """Some layers look back over a window only, others over everything."""
    return windowed(config) and len(set(config.get("layer_types") or ())) > 1


def no_windows(config: Config) -> bool:
    """Of a family that always has a `sliding_window`, in use or not: no layer uses it."""
    return "sliding_attention" not in config.get("layer_types", ())


def not_silu(config: Config) -> bool:
    """The experts' activation is another than SiLU."""
    return bool(config.get("hidden_act", "silu") != "silu")


def untied(config: Config) -> bool:
    """The output head is a separate tensor."""
    return not tied(config)


def tied(config: Config) -> bool:
    """The output head is the embedding."""
    return bool(config.get("tie_word_embeddings"))


def grouped_queries(config: Config) -> bool:
    """Several heads share a key and a value."""
    heads = config.get("num_attention_heads")
    return (config.get("num_key_value_heads") or heads) != heads


def own_head_dim(config: Config) -> bool:
    """A head has another size than hidden_size / num_attention_heads."""
    size = config.get("head_dim")
    # Divided: a size times a text would be a text of that many repetitions.
    return size is not None and bool(size != config["hidden_size"] / config["num_attention_heads"])


def rope(*kinds: str) -> Callable[[Config], bool]:
    """Positions are scaled in one of these ways."""

    def scaled(config: Config) -> bool:
        settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
        return settings.get("rope_type", settings.get("type", "default")) in kinds

    return scaled


def none_of(key: str) -> Callable[[Config], bool]:
    """A number, or list of numbers, of config.json is zero."""
    return lambda config: not config.get(key)


def some(key: str) -> Callable[[Config], bool]:
    """A number, list or word of config.json is there and not zero."""
    return lambda config: bool(config.get(key))
