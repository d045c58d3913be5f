"""The suites' table in docs/eval.md is the suites' data."""

from pathlib import Path

from moetool import registry


def test_docs_list_the_suites() -> None:
    page = (Path(__file__).parents[2] / "docs" / "eval.md").read_text(encoding="utf-8")
    table = page.partition("<!-- suites -->\n")[2].partition("<!-- /suites -->")[0]
    rows = []
    for suite in registry.names("suite"):
        rows.append(f"| **{suite}** | | | | |")
        for b in registry.load("suite", suite).benchmarks:
            metric, _, name = b.metric.partition(",")
            shown = metric + (f" ({name})" if name not in ("", "none") else "")
            rows.append(f"| {b.name} | {b.task or 'missing'} | {b.shots} | {shown} | {b.note + ' ' if b.note else ''}|")
    assert table.strip().splitlines() == rows
