"""The quickstart's corpus and the numbers of its closing table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moetool.data.installed import code, docstrings, paragraphs, prose, split, without_docstrings
from moetool.errors import DataError
from moetool.quickstart import steps, summarize, write_task

MODULE = '''"""Module text that goes."""

import os


def add(a, b):
    """Add two numbers."""
    return a + b  # a comment stays


class Thing:
    """Only a docstring."""
'''


def test_docstrings_and_code_are_taken_apart() -> None:
    assert sorted(docstrings(MODULE)) == ["Add two numbers.", "Module text that goes.", "Only a docstring."]
    left = without_docstrings(MODULE)
    assert '"""' not in left
    assert "return a + b  # a comment stays" in left
    assert docstrings("def broken(:") == []
    assert without_docstrings("def broken(:") == ""


def test_paragraphs_are_sentences() -> None:
    sentence = "The router sends each token to a few experts, and the load of the experts should be balanced."
    assert paragraphs(f"{sentence}\n\n>>> add(1, 2)\n\nshort one\n\n| a | b |") == [sentence]
    assert paragraphs(sentence.lower()) == []


def test_prose_and_code_are_at_hand_and_share_nothing() -> None:
    texts, modules = prose(60_000), code(60_000)
    assert 60_000 <= sum(map(len, texts)) < 150_000
    assert 60_000 <= sum(map(len, modules)) < 150_000
    assert len(texts) == len(set(texts))
    assert modules == code(60_000)


def test_the_split_is_by_document_and_does_not_change() -> None:
    documents = [f"document {n}" for n in range(50)]
    train, held = split(documents, 0.1)
    assert (len(train), len(held)) == (45, 5)
    assert sorted(train + held) == sorted(documents)
    assert split(documents[::-1], 0.1) == (train, held)
    with pytest.raises(DataError, match="only 1 documents"):
        split(["one"], 0.1)


def test_the_right_answer_of_the_task_is_the_text_itself(tmp_path: Path) -> None:
    documents = [" ".join(f"w{n}-{i}" for i in range(130 + n)) for n in range(40)]
    write_task(tmp_path, [*documents, "a a a a " * 50])
    rows = [json.loads(line) for line in (tmp_path / "word-order.jsonl").read_text().splitlines()]
    assert len(rows) == 40 * 2  # at words 0 and 80; what cannot be shuffled is left out
    for row in rows:
        assert len(set(row["choices"])) == 4
        assert len({tuple(sorted(choice.split())) for choice in row["choices"]}) == 1
        right = row["choices"][row["right"]]
        assert any(f"{row['context']} {right}" in document for document in documents)
        assert sum(choice in document for choice in row["choices"] for document in documents) == 1
    assert {row["right"] for row in rows} == {0, 1, 2, 3}


def test_every_step_is_a_command_that_parses(tmp_path: Path) -> None:
    import typer

    from moetool.cli import app

    group: Any = typer.main.get_command(app)
    commands = [step.arguments for step in steps(tmp_path / "a b", seed=7)]
    assert [c[0] for c in commands] == ["cpt", "upcycle", "upcycle", "cpt", "cpt", "cpt", "analyze-routing", "eval"]
    for arguments in commands:
        command = group.commands[arguments[0]]
        command.make_context(arguments[0], list(arguments[1:]))  # raises on an unknown option or a bad value


def loss(before: float, after: float) -> dict[str, dict[str, float]]:
    return {"prose": {"before": before, "after": after}, "code": {"before": before + 1, "after": after + 1}}


def test_forgetting_is_counted_from_the_dense_model() -> None:
    layers = [{"mri": 0.5}, {"mri": 0.75}]
    after = [{"mri": 0.25, "saturation": 0.5}, {"mri": 0.5, "saturation": 1.0}]
    results: dict[str, Any] = {
        "dense": {"val": loss(7.5, 4.0)},
        "cpt-copy": {"val": loss(4.0, 4.0)},
        "cpt-replay": {"val": loss(5.0, 4.25)},
        "cpt-no-replay": {"val": loss(5.0, 5.5)},
        "analyze-routing": {
            "top_k": 2,
            "num_experts": 8,
            "domains": {"prose": {"layers": layers}},
            "comparison": {"domains": {"prose": {"layers": after}}},
            "files": {"html": "report.html"},
        },
        "eval": {"results": {"dense": {"word-order": {"acc,none": {"value": 0.5, "stderr": 0.1}}}}},
    }
    summary = summarize(results, Path("q"))
    assert summary["forgetting"] == {"moe-copy": 0.0, "moe": 1.0, "cpt-replay": 0.25, "cpt-no-replay": 1.5}
    assert summary["adaptation"] == {"cpt-replay": 0.25, "cpt-no-replay": 1.5}
    assert summary["losses"]["moe"] == {"prose": 5.0, "code": 6.0}
    assert summary["losses"]["moe-copy"]["prose"] == 4.0
    routing = summary["routing"]
    assert routing["balanced"] == 0.25
    assert routing["domains"]["prose"]["before"] == {"mean": 0.625, "max": 0.75}
    assert routing["domains"]["prose"]["after"] == {"mean": 0.375, "max": 0.5}
    assert routing["domains"]["prose"]["saturation"] == 0.75
