"""The table of docs/clients.md: it is complete, the page is what was measured, and the specs say what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moetool import registry
from moetool.arch.clients import CLIENTS, obstacles
from tests import tiny
from tests.clients import page
from tests.clients.cases import RECIPES, cases

ROWS = page.load()


def test_every_case_has_a_verdict_in_every_client() -> None:
    """A new pair, or a new trait, needs `make test-clients`."""
    assert [case.name for case in cases()] == list(ROWS)
    made = {name: row["clients"] for name, row in ROWS.items() if "refused" not in row}
    assert [(name, client) for name, found in made.items() for client in CLIENTS if client not in found] == []


def test_the_page_is_what_was_measured() -> None:
    _, marker, tables = page.PAGE.read_text().partition(page.MARKER)
    assert marker
    assert tables == page.generate(ROWS), "run python -m tests.clients --page"


@pytest.mark.parametrize("client", CLIENTS)
def test_the_specs_say_what_was_measured(client: str) -> None:
    wrong = []
    for name, row in ROWS.items():
        if "refused" in row or client not in row["clients"]:
            continue
        said, verdict = obstacles(row["config"], row["beside"])[client], row["clients"][client]
        if (said is None) != page.is_exact(verdict):
            measured = verdict.get("difference", verdict.get("refused"))
            wrong.append(f"{name}: measured {str(measured)[:90]}, said {said or 'exact'}")
    assert not wrong, "\n".join(["", *wrong])


@pytest.mark.parametrize("target", registry.names("target"))
def test_what_was_measured_is_what_is_written_now(target: str, tmp_path: Path) -> None:
    """Else the rows are of another program: run `make test-clients` again."""
    case = next(case for case in cases() if case.target == target)
    dense = tiny.save_dense(case.dense, tmp_path / "dense", **case.settings)
    code, _, err = tiny.in_process("upcycle", dense, tmp_path / "moe", *case.command)
    assert code == 0, err
    assert json.loads((tmp_path / "moe" / "config.json").read_text()) == ROWS[case.name]["config"]


def test_the_recipes_give_the_same_tokens_where_they_are_said_to_run() -> None:
    rows = [row for row in ROWS.values() if "as in the recipes" in row["trait"]]
    assert len(rows) == len(RECIPES)
    for row in rows:
        for client in ("transformers-4", "vllm", "llama.cpp"):
            assert row["clients"][client]["greedy"] == "32 of 32", (row["trait"], client)
