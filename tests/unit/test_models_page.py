"""docs/models.md: it decides every causal decoder of transformers, and says what the program does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moetool import registry
from moetool.arch.dense_config import dense_config
from moetool.arch.dense_families import DENSE
from moetool.arch.unfit import UNFIT, why_unfit
from moetool.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
SPECS = [registry.load("target", name) for name in registry.names("target")]


def rows(heading: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    section = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return table[2:]


def names(cell: str) -> list[str]:
    return re.findall(r"`([\w.-]+)`", cell)


def test_the_dense_families_are_those_of_the_program() -> None:
    page = {names(family)[0]: (names(like), names(targets)) for family, like, targets, _ in rows("Dense families")}
    assert page == {
        name: (
            [spec.like] if spec.like else [],
            [target.model_type for target in SPECS if spec.family in target.dense],
        )
        for name, spec in DENSE.items()
    }


def test_the_reasons_are_those_of_the_program() -> None:
    page = {reason: tuple(names(cell)) for reason, cell in rows("What cannot be upcycled")}
    assert page == UNFIT
    assert not {name for refused in UNFIT.values() for name in refused} & set(DENSE)


def test_every_decoder_of_transformers_is_decided_once() -> None:
    inside = {name for _, cell in rows("Text models inside multimodal ones") for name in names(cell)}
    decided = [*DENSE, *inside, *(name for refused in UNFIT.values() for name in refused)]
    assert [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if decided.count(name) != 1] == []


@pytest.mark.parametrize("family", [name for refused in UNFIT.values() for name in refused])
def test_a_family_is_refused_with_its_reason(family: str) -> None:
    reason = why_unfit(family)
    assert reason
    with pytest.raises(ConfigError, match=re.escape(f"'{family}' cannot be upcycled, because {reason}")):
        dense_config({"model_type": family})
