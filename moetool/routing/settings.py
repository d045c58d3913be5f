"""How texts run through a model, as options of `moetool analyze-routing`."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from moetool.errors import ConfigError
from moetool.mesh import check_shared, ep_option, fsdp_option, tp_option
from moetool.option import check_device, device_map_option, device_option, dtype_option, option
from moetool.values import parse_count

COMPARE, RUN = "Comparison and tokens", "How the texts run"


def parse_layers(text: str, flag: str) -> tuple[int, ...] | str:
    """`0,8,16-23` as layer numbers; `auto` and `all` as they are, `none` as no layer.

    Raises:
        ConfigError: it is none of these.
    """
    if text in ("auto", "all"):
        return text
    if text == "none":
        return ()
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"{flag} '{text}': write auto, all, none, or layers such as 0,8,16-23")
        layers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(layers))


@dataclass(frozen=True)
class Settings:
    """How texts go through a model."""

    max_tokens: int = option("Tokens per domain, such as 1M.", 204_800, metavar="N", parse=parse_count, after="fail_if")
    vocabulary_layers: tuple[int, ...] | str = option(
        "Layers in which each token's experts are counted: auto (as many as fit in 1 GB), all, none, or 0,8,16-23.",
        "auto", panel=COMPARE, metavar="LAYERS", typed=str, make=parse_layers, after="compare",
    )  # fmt: skip
    unit_use: bool = option(
        "In a model upcycled by moetool, measure how much the redrawn units contribute, on 8192 tokens per domain.",
        True, panel=COMPARE,
    )  # fmt: skip
    show_text: bool = option(
        "Show the first 2000 tokens of each text on the page, coloured by the expert that processes them.",
        False, flag="--show-text", panel=COMPARE,
    )  # fmt: skip
    seq_len: int | None = option(
        "Tokens per window.", None, panel=RUN, shown="2048, or the model's maximum if that is less", min=1
    )
    batch_size: int = option("Windows per forward pass.", 8, panel=RUN, min=1)
    device: str = device_option(RUN)
    dtype: str = dtype_option("Dtype of the weights in memory; auto keeps the saved one.", RUN)
    device_map: str | None = device_map_option(RUN)
    fsdp: int = fsdp_option()
    ep: int = ep_option()
    tp: int = tp_option()

    def check(self, typed: Collection[str]) -> None:
        """Raise ConfigError if options contradict each other."""
        check_device(self)
        check_shared(self)
