"""The studies' scripts: each command that they would run is one that moetool takes."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from moetool.cli import app

STUDIES = Path(__file__).parents[2] / "docs" / "studies"


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[Any, Any]:
    """What studies share, and a study's script."""
    monkeypatch.syspath_prepend(str(STUDIES))
    for module in ("study", name):
        sys.modules.pop(module, None)
    return importlib.import_module("study"), importlib.import_module(name)


def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> list[list[str]]:
    """What a study runs, with results made up; its figures and tables are made of them."""
    study, script = load(monkeypatch, name)
    ran: list[list[str]] = []
    monkeypatch.setattr(script, "HERE", tmp_path / "results")
    monkeypatch.setattr(study.Study, "initial", lambda self, seed: f"s{seed}/init")

    def run(self: Any, *words: object, to: Path | None = None) -> None:
        ran.append([str(word) for word in words])
        if to:
            to.write_text(json.dumps(document([str(word) for word in words])))
        elif words[0] != "analyze-routing":
            out = self.folder / str(words[1 if words[0] == "average" else 2])
            out.mkdir(parents=True)
            (out / ("summary.json" if words[0] == "cpt" else "config.json")).touch()

    monkeypatch.setattr(study.Study, "run", run)
    losses = [(0, dict.fromkeys(("en", "code", "ja"), 5.0)), (2048, dict.fromkeys(("en", "code", "ja"), 4.0))]
    monkeypatch.setattr(study.Study, "losses", lambda self, run: losses)
    monkeypatch.setattr(study.Study, "rows", lambda self, run: [{"mri": [0.3] * 6}] * 3)
    monkeypatch.setattr(study.Study, "analyze", analyze(study.Study.analyze))
    words = [str(tmp_path / "work")]
    for domain in ("en", "code", "ja"):
        text = tmp_path / f"{domain}.txt"
        text.write_text("\n".join(f"{domain} line {i} " + "x" * 900 for i in range(100)))
        words += ["--text", f"{domain}={text}"]
    monkeypatch.setattr(sys, "argv", [name, *words])
    script.main()
    return ran


def document(words: list[str]) -> dict[str, Any]:
    if words[0] == "prune":
        kept = [0, 1, 2, 3] if "frequency" in words else [4, 5, 6, 7]
        return {"layers": [{"kept": kept, "mass_kept": 0.9}], "score": "ean", "errors": {"ean": 0.1}}
    if words[0] == "upcycle":
        return {"fitted": None}
    if words[0] == "sample":
        return {}
    models = {f"short {folder}": folder for folder in words[1 : words.index("--text")]}
    scores = {domain: {"bits_per_byte,none": {"value": 2.0}} for domain in ("en", "code", "ja")}
    return {"models": models, "results": dict.fromkeys(models, scores)}


def analyze(real: Any) -> Any:
    layer = {"load": [0.125] * 8, "saturation": 0.5, "mri": 0.3, "mri_change": 0.1, "mri_normalized": 1.2}
    layers = [layer] * 6
    domains = {domain: {"layers": layers} for domain in ("en", "code", "ja")}
    document: dict[str, Any] = {
        "domains": domains,
        "comparison": {"domains": domains},
        "domain_divergence": [{"mean": 0.1}],
    }
    document["upcycling"] = {"mean": {"between_experts": {"all": 0.5}}}

    def analyzed(self: Any, model: str, out: str, *words: object) -> dict[str, Any]:
        (self.folder / out).mkdir(parents=True, exist_ok=True)
        try:
            real(self, model, out, *words)
        except FileNotFoundError:  # no report was written: its command is all that we want
            return document
        raise AssertionError("a report from nowhere")

    return analyzed


@pytest.mark.parametrize(
    ("name", "least"),
    [("drop_upcycling", 101), ("forgetting", 24), ("router_robustness", 101), ("start", 101), ("surgery", 101)],
)
def test_every_command_of_a_study_is_one_that_moetool_takes(
    name: str, least: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = commands(monkeypatch, tmp_path, name)
    assert len(ran) >= least
    group = typer.main.get_command(app)
    outs: set[str] = set()
    for words in ran:
        command = group.commands[words[0]]  # type: ignore[attr-defined]
        context = command.make_context(words[0], words[1:])
        out = str(context.params["out"])
        assert words[0] == "eval" or out not in outs, f"{out} is written twice"
        outs.add(out)
    assert list((tmp_path / "results").glob("*.png"))


@pytest.mark.parametrize("page", sorted(STUDIES.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_says_what_was_run_and_measured(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text, name = page.read_text(), page.stem.replace("-", "_")
    shown = re.findall(r"^moetool .*$", text, re.MULTILINE)
    assert shown
    assert set(shown) <= {shlex.join(["moetool", *words]) for words in commands(monkeypatch, tmp_path, name)}
    _, script = load(monkeypatch, name)
    kept = json.loads((STUDIES / "results" / f"{page.stem}.json").read_text())
    assert script.table({int(seed): found for seed, found in kept.items()}) in text
    figures = re.findall(r"\]\((results/\S+)\)", text)
    assert figures
    assert all((STUDIES / figure).is_file() for figure in figures)
