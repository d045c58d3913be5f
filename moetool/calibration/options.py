"""How texts run through a model for calibration, as options of every command that does it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from moetool.errors import ConfigError
from moetool.option import (
    check_device,
    device_map_option,
    device_option,
    document_option,
    dtype_option,
    option,
    text_field_option,
)
from moetool.values import named, parse_count

RUN = "How the texts run"
IN_MEMORY = 2**30  # bytes of hidden states between two layers that are kept in memory, not in a file


class Run(Protocol):
    """How texts run, whatever a command calls them."""

    @property
    def text_field(self) -> str: ...
    @property
    def document(self) -> Literal["file", "line", "paragraph"]: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def seq_len(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device_map(self) -> str | None: ...
    @property
    def stream(self) -> bool: ...


@dataclass(frozen=True)
class CalibrationOptions:
    """The texts, and how they run."""

    data: Mapping[str, str] = option(
        "Text on which the experts are measured (repeatable): text, JSONL, Parquet or tokens, as a file, folder, glob"
        " or hf:owner/name.",
        dict, metavar="NAME=PATH", make=named,
    )  # fmt: skip
    val: Mapping[str, str] = option(
        "Text on which the loss is measured before and after the change (repeatable).",
        dict,
        metavar="NAME=PATH",
        make=named,
    )
    text_field: str = text_field_option()
    document: Literal["file", "line", "paragraph"] = document_option()
    max_tokens: int = option(
        "Tokens read from each text, such as 1M.", 204_800, panel=RUN, metavar="N", parse=parse_count
    )
    seq_len: int | None = option(
        "Tokens per window.", None, panel=RUN, shown="2048, or the model's maximum if that is less", min=2
    )
    batch_size: int = option("Windows per forward pass.", 8, panel=RUN, min=1)
    device: str = device_option(RUN)
    dtype: str = dtype_option("Dtype of the weights in memory; auto keeps the saved one.", RUN)
    device_map: str | None = device_map_option(RUN)
    stream: bool = option(
        "Hold only one layer of the model in memory at a time. The result is the same.", False,
        panel=RUN, flag="--stream",
    )  # fmt: skip

    def check(self, typed: Collection[str]) -> None:
        """Raise ConfigError if there is no text, or options contradict each other."""
        if not self.data:
            raise ConfigError("give a text to measure the experts on: --data NAME=PATH")
        self.check_run()

    def check_run(self) -> None:
        """Raise ConfigError if options of how texts run contradict each other."""
        check_device(self)
        if self.stream and self.device_map:
            raise ConfigError("--stream and --device-map exclude each other")
