"""docs/clients.md below its marker, made from measured.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moetool.arch.clients import CLIENTS
from tests.clients.environments import VERSIONS
from tests.clients.run import EXACT

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
MEASURED = Path(__file__).with_name("measured.json")
MARKER = "<!-- Below: written by python -m tests.clients --page. -->\n"
Rows = Mapping[str, Mapping[str, Any]]


def load() -> dict[str, dict[str, Any]]:
    """Case's name -> its row: dense, target, trait, options; refused, or config, beside, digest and clients."""
    return json.loads(MEASURED.read_text()) if MEASURED.exists() else {}


def store(rows: Rows) -> None:
    """One row a line, so that a diff shows what changed."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row, separators=(',', ':'))}" for name, row in rows.items())
    MEASURED.write_text("{\n" + lines + "\n}\n")


def is_exact(verdict: Mapping[str, Any]) -> bool:
    """Whether an engine computed what transformers 5 does."""
    difference = verdict.get("difference", "NaN")
    return difference != "NaN" and bool(difference <= EXACT)


def write(rows: Rows) -> None:
    """Put the tables under the page's own words."""
    PAGE.write_text(PAGE.read_text().partition(MARKER)[0] + MARKER + generate(rows))


def generate(rows: Rows) -> str:
    """What lies below the marker."""
    return "\n".join(_lines(rows)) + "\n"


def _lines(rows: Rows) -> Iterator[str]:
    pairs = dict.fromkeys((row["dense"], row["target"]) for row in rows.values())
    days = sorted({row["measured"] for row in rows.values()})
    yield f"\n{len(rows)} rows, measured {' to '.join(dict.fromkeys((days[0], days[-1])))} on a CPU in fp32. Versions:"
    yield ", ".join(VERSIONS.values()) + ".\n"
    figures = [v["difference"] for row in rows.values() for v in row.get("clients", {}).values() if "difference" in v]
    exact = [figure for figure in figures if is_exact({"difference": figure})]
    wrong = [figure for figure in figures if figure != "NaN" and figure not in exact]
    yield f"The largest difference that counts as exact is {max(exact):.1e}."
    yield f"The smallest that counts as wrong is {min(wrong)}.\n"
    yield "## Summary\n"
    yield "The number of exact rows, of those that could be made. In brackets: rows that an engine loads without an"
    yield "error and computes wrongly.\n"
    yield f"| dense -> target | {' | '.join(CLIENTS)} |"
    yield "|---" * (1 + len(CLIENTS)) + "|"
    for dense, target in pairs:
        found = [row["clients"] for row in rows.values() if (row["dense"], row["target"]) == (dense, target)]
        yield f"| {dense} -> `{target}` | {' | '.join(_count([f[c] for f in found if c in f]) for c in CLIENTS)} |"
    yield "\n## One target for transformers 4, vLLM and llama.cpp\n"
    yield "The number of rows that are exact in all three. The rows are listed below.\n"
    yield "| dense | targets |"
    yield "|---|---|"
    for dense in dict.fromkeys(row["dense"] for row in rows.values()):
        yield f"| {dense} | {_in_all(dense, rows) or 'none'} |"
    notes: dict[str, int] = {}
    for dense, target in pairs:
        yield f"\n## {dense} -> {target}\n"
        yield f"| trait | {' | '.join(CLIENTS)} |"
        yield "|---" * (1 + len(CLIENTS)) + "|"
        for row in rows.values():
            if (row["dense"], row["target"]) == (dense, target):
                yield f"| {row['trait']} | {_cells(row, notes)} |"
    yield "\n## mergekit\n"
    yield "Half of each plain checkpoint merged with half of itself, loaded by transformers 5.24.\n"
    yield "| dense -> target | difference |"
    yield "|---|---|"
    for row in rows.values():
        if "mergekit" in row.get("clients", {}):
            told = _cell("mergekit", row["clients"]["mergekit"], notes)
            yield f"| {row['dense']} -> `{row['target']}` | {told} |"
    yield "\n## Messages of the engines\n"
    yield from (f"{number}. {line}" for line, number in notes.items())


def _in_all(dense: str, rows: Rows) -> str:
    """Targets that run in the three programs that most people serve with."""
    found: dict[str, list[bool]] = {}
    for row in rows.values():
        if row["dense"] == dense and "refused" not in row:
            exact = [is_exact(row["clients"].get(client, {})) for client in ("transformers-4", "vllm", "llama.cpp")]
            found.setdefault(row["target"], []).append(all(exact))
    return ", ".join(f"`{target}` ({sum(of)} of {len(of)})" for target, of in found.items() if any(of))


def _count(verdicts: list[Mapping[str, Any]]) -> str:
    wrong = sum("difference" in verdict and not is_exact(verdict) for verdict in verdicts)
    return f"{sum(map(is_exact, verdicts))} of {len(verdicts)}" + (f" ({wrong} wrong)" if wrong else "")


def _cells(row: Mapping[str, Any], notes: dict[str, int]) -> str:
    if "refused" in row:
        note = notes.setdefault("moetool: " + _plain(row["refused"]), len(notes) + 1)
        return " | ".join([f"not made [{note}]"] * len(CLIENTS))
    return " | ".join(_cell(client, row["clients"].get(client), notes) for client in CLIENTS)


def _cell(client: str, verdict: Mapping[str, Any] | None, notes: dict[str, int]) -> str:
    if verdict is None:
        return "not run"
    if "refused" in verdict:
        return f"no [{notes.setdefault(f'{client}: ' + _plain(verdict['refused']), len(notes) + 1)}]"
    figure = verdict["difference"]
    figure = figure if figure == "NaN" else f"{figure:.1e}" if figure else "0"
    if "greedy" in verdict:
        figure += f", {verdict['greedy']} tokens equal"
    return figure if is_exact(verdict) else f"**wrong: {figure}**"


def _plain(line: str) -> str:
    return "`" + " ".join(line.replace("`", "'").split())[:240] + "`"
