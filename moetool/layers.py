"""Layers in the names of tensors and as text (`all`, `every:2`, `0-3,8`, `4-`), and ratios per layer."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeVar

from moetool.errors import ConfigError
from moetool.values import ratio

Item = TypeVar("Item")

USUAL = Decimal("0.5")  # the share of units that a method changes, unless another is typed


def layer_of(name: str) -> int | None:
    """The decoder layer of a tensor or module, by its name; None for those outside layers."""
    found = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def chosen_layers(text: str, layers: int, flag: str) -> frozenset[int]:
    """The layers that a text names.

    Args:
        text: `all`; `every:N`, the N-th, 2N-th, ... layer, counted from 1; or a list of layers counted
            from 0 such as `0-3,8` or `4-`.
        layers: of the model.
        flag: the option, for errors.

    Raises:
        ConfigError: it is none of these, or names layers that are not there, or none.
    """
    for part, first, last in _ranges(text, flag):
        if not first <= (layers - 1 if last == math.inf else last) < layers:
            raise ConfigError(f"{flag} '{text}': '{part}' is not a range within layers 0-{layers - 1}")
    chosen = frozenset(layer for layer in range(layers) if names(text, layer))
    if not chosen:
        raise ConfigError(f"{flag} '{text}' names none of the {layers} layers")
    return chosen


def names(text: str, layer: int) -> bool:
    """Whether a text names a layer."""
    if every := _every(text):
        return (layer + 1) % every == 0
    return text == "all" or any(first <= layer <= last for _, first, last in _ranges(text, ""))


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of some items (1 or more), evenly spread, with the first and, from 2 on, the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, most - 1))] for i in range(most)]


def ranges(layers: Iterable[int]) -> str:
    """`0-3,7` for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def by_layers(numbers: Sequence[int], layers: Sequence[int], what: str = "") -> str:
    """`16 in layers 0-3, 32 in layers 4-7`; the number alone where it is the same in all layers.

    Args:
        numbers: one for each layer.
        layers: theirs.
        what: comes after the first number.
    """
    said = f" {what}" if what else ""
    if len(set(numbers)) == 1:
        return f"{numbers[0]}{said}"
    of = {n: [layer for layer, m in zip(layers, numbers, strict=True) if m == n] for n in numbers}
    parts = [f"{n}{'' if i else said} in layer{'s' * (len(of[n]) > 1)} {ranges(of[n])}" for i, n in enumerate(of)]
    return ", ".join(parts)


@dataclass(frozen=True)
class LayerRatios:
    """A ratio that differs between layers.

    Attributes:
        usual: of the layers that nothing else is said of.
        others: layers as text, and their ratio, sorted; no layer is named twice.
    """

    usual: Decimal
    others: tuple[tuple[str, Decimal], ...]

    def of(self, layer: int) -> Decimal:
        """The ratio of a layer."""
        return next((share for text, share in self.others if names(text, layer)), self.usual)

    @property
    def texts(self) -> list[str]:
        """The ratios as typed and recorded: `["0.5", "0-3=0.25"]`."""
        return [str(self.usual), *(f"{text}={share}" for text, share in self.others)]


def layer_ratios(texts: Sequence[str], flag: str = "") -> Decimal | LayerRatios:
    """RATIO for all layers, LAYERS=RATIO for some of them, in any order; a number where it holds for all.

    Raises:
        ConfigError: a text is neither, a ratio is not between 0 and 1, or two are for all layers.
    """
    usual, others = [], []
    for text in texts:
        layers, equals, share = text.rpartition("=")
        layers = layers.replace(" ", "")
        if not equals or layers == "all":
            usual.append(ratio(share))
            continue
        _ranges(layers, flag)  # or it is no text of layers
        others.append((layers, ratio(share)))
    if len(usual) > 1:
        raise ConfigError(
            f"{usual[0]} and {usual[1]} are both for all layers; give one, and LAYERS=RATIO for layers that differ"
        )
    first = usual[0] if usual else USUAL
    return LayerRatios(first, tuple(sorted(others))) if others else first


def recorded_ratios(texts: Sequence[str]) -> list[str]:
    """The same texts as they are recorded: numbers as short as they are, the one for all layers first."""
    made = layer_ratios(texts)
    return made.texts if isinstance(made, LayerRatios) else [str(made)]


def check_layer_ratios(ratios: LayerRatios, moe: Collection[int], layers: int, flag: str) -> None:
    """Check the layers that are named against a model.

    Args:
        ratios: to check.
        moe: the layers with experts.
        layers: of the model.
        flag: the option, for errors.

    Raises:
        ConfigError: one is not there, has no experts, or is named twice.
    """
    found: dict[int, str] = {}
    for text, _ in ratios.others:
        for layer in sorted(chosen_layers(text, layers, flag)):
            if layer not in moe:
                raise ConfigError(f"{flag} '{text}': layer {layer} stays dense; layers with experts are {ranges(moe)}")
            if layer in found:
                raise ConfigError(f"{flag}: both '{found[layer]}' and '{text}' name layer {layer}; name it once")
            found[layer] = text


def _every(text: str) -> int:
    """N of `every:N`, else 0."""
    found = re.fullmatch(r"every:([1-9]\d{0,8})", text)
    return int(found[1]) if found else 0


def _ranges(text: str, flag: str) -> list[tuple[str, int, float]]:
    """Of a list of layers each part, its first layer and its last one (infinite where it is open); else nothing."""
    if text == "all" or _every(text):
        return []
    found: list[tuple[str, int, float]] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:(-)(\d{0,9}))?", part.strip())
        if not match:
            raise ConfigError(f"{flag} '{text}': give all, every:2, or layers such as 4- or 0-3,8".lstrip())
        first = int(match[1])
        found.append((part, first, first if not match[2] else int(match[3]) if match[3] else math.inf))
    return found
