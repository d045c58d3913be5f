"""The texts that an upcycling may read, as options."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from moetool.errors import ConfigError
from moetool.option import device_option, document_option, flag, option, text_field_option
from moetool.recipe import FITTED, UpcycleRecipe
from moetool.values import named, parse_count

PANEL = "Calibration"


@dataclass(frozen=True)
class TextOptions:
    """The texts, and how they run through a model of which one layer at a time is in memory."""

    calibrate: Mapping[str, str] = option(
        "Text for options that measure on text (repeatable): text, JSONL, Parquet or tokens, as a file, folder, glob"
        " or hf:owner/name.",
        dict, panel=PANEL, metavar="NAME=PATH", make=named,
    )  # fmt: skip
    text_field: str = text_field_option(PANEL)
    document: Literal["file", "line", "paragraph"] = document_option(PANEL)
    max_tokens: int = option(
        "Tokens read from each text, such as 1M.", 204_800, panel=PANEL, metavar="N", parse=parse_count
    )
    seq_len: int | None = option(
        "Tokens per window.", None, panel=PANEL, shown="2048, or the model's maximum if that is less", min=2
    )
    batch_size: int = option("Windows per forward pass.", 8, panel=PANEL, min=1)
    device: str = device_option(PANEL)

    dtype: ClassVar[str] = "auto"
    device_map: ClassVar[None] = None
    stream: ClassVar[bool] = True

    def check(self, typed: Collection[str]) -> None:
        """Refuse options about texts where there is none.

        Args:
            typed: the options that were typed, not read from a file.

        Raises:
            ConfigError: names the first.
        """
        own = [field.name for field in fields(self) if field.name in typed]
        if own and not self.calibrate:
            raise ConfigError(f"{flag(own[0])} has no effect without a text; give --calibrate NAME=PATH")


def reads_units(recipe: UpcycleRecipe) -> list[str]:
    """The options of a recipe that depend on units' contributions on text, as typed."""
    options = [f"--split {recipe.split}"] if recipe.split == "activation" else []
    return options + ([f"--drop-units {recipe.drop_units}"] if recipe.drop_units == "least-used" else [])


def reads_text(recipe: UpcycleRecipe) -> list[str]:
    """The options of a recipe that need a pass over text, as they are typed."""
    return reads_units(recipe) + ([f"--router {recipe.router}"] if recipe.router in FITTED else [])


def check_texts(recipe: UpcycleRecipe, run: TextOptions) -> None:
    """Refuse texts that nothing reads, and options that lack theirs.

    Args:
        recipe: settled.
        run: the texts.

    Raises:
        ConfigError: says what to give.
    """
    reading = reads_text(recipe)
    if reading and not run.calibrate:
        raise ConfigError(f"{reading[0]} needs text: give --calibrate NAME=PATH")
    if run.calibrate and not reading:
        raise ConfigError(
            "--calibrate has no effect without an option that reads its text; give --router balanced or ridge,"
            " --split activation,"
            " or --drop-units least-used, or leave it out"
        )
    if recipe.router == "ridge" and recipe.num_donors < 2:
        raise ConfigError("--router ridge tells donors apart, but DENSE is the only one; give --donor, or use balanced")
    if recipe.router == "ridge" and len(run.calibrate) != recipe.num_donors:
        raise ConfigError(
            f"--router ridge needs a text of each donor, DENSE first: give --calibrate {recipe.num_donors} times, not"
            f" {len(run.calibrate)}"
        )
    if recipe.router in FITTED and not recipe.router_std:
        raise ConfigError(f"--router {recipe.router} starts from random rows; give a --router-std above 0")
