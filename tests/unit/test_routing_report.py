"""Co-activation, divergence, verdict, report.json, page and plots from counts made by hand."""

from __future__ import annotations

import json
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moetool.errors import DataError
from moetool.outside import safe_json
from moetool.routing import load_metrics, plots
from moetool.routing.capture import Route
from moetool.routing.coactivation import coactivation, expected_pairs
from moetool.routing.counts_file import read_counts
from moetool.routing.html import percent, render, visible
from moetool.routing.report import build_report, write_report
from moetool.routing.stats import RoutingStats

NASTY = "</script><script>alert(1)</script>\u202e\x07"


def stats_of(choices: list[list[int]], num_experts: int, num_layers: int = 1) -> RoutingStats:
    """The same choices (T, K) in every layer."""
    indices_TK = torch.tensor(choices)
    logits_TE = torch.zeros(len(choices), num_experts).scatter(1, indices_TK, 3.0)
    stats = RoutingStats(range(num_layers), num_experts, indices_TK.shape[1])
    stats.update(Route(layer, logits_TE, indices_TK / 1.0, indices_TK) for layer in range(num_layers))
    return stats


BALANCED = [[0, 1], [2, 3], [0, 2], [1, 3], [0, 3], [1, 2]]


def test_pairs_by_chance_have_the_true_margins() -> None:
    counts = np.array([[40, 30, 20, 10], [25, 25, 25, 25]])
    for top_k in (2, 3):
        pairs = expected_pairs(counts, top_k)
        assert pairs.sum(axis=2) == pytest.approx(counts * (top_k - 1))
        assert pairs == pytest.approx(pairs.transpose(0, 2, 1))
        assert pairs[1, 0, 1] == pytest.approx(25 * (top_k - 1) / 3)
    # Two experts take everything: their meeting is no surprise.
    assert expected_pairs(np.array([[50, 50, 0, 0]]), 2)[0, 0, 1] == pytest.approx(50)


def test_coactivation_by_hand() -> None:
    # Every pair once: what chance gives, so no distance and no pair above it.
    row = (coactivation(stats_of(BALANCED, 4)) or [])[0]
    assert row["matrix"][0] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=1e-4)
    assert row["distance"] == pytest.approx(0, abs=1e-6)
    # 0 with 1 and 2 with 3 only: balanced loads, chance spreads each expert over three partners.
    row = (coactivation(stats_of([[0, 1], [2, 3]] * 3, 4)) or [])[0]
    assert row["matrix"] == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert row["expected"][0] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=1e-4)
    assert row["distance"] == pytest.approx(2 / 3)
    assert [pair["experts"] for pair in row["pairs"]] == [[0, 1], [2, 3]]
    assert row["pairs"][0]["share"] == 0.5
    assert row["pairs"][0]["expected"] == pytest.approx(1 / 6)
    assert coactivation(stats_of([[0], [1]], 2)) is None


def test_all_pairs_of_the_top_k_count() -> None:
    row = (coactivation(stats_of([[0, 1, 2]], 4)) or [])[0]
    assert row["matrix"][0] == [0, 1, 1, 0]


def test_divergence_by_hand() -> None:
    one, other = stats_of([[0], [1]], 4), stats_of([[2], [3]], 4)
    assert load_metrics.domain_divergence(one, one) == [0]
    assert load_metrics.domain_divergence(one, other) == pytest.approx([1])
    # Loads (1/2, 1/2, 0, 0) and (1/2, 0, 1/2, 0): mean (1/2, 1/4, 1/4, 0) has 1.5 bits, each has 1.
    assert load_metrics.domain_divergence(one, stats_of([[0], [2]], 4)) == pytest.approx([0.5])


def test_report_follows_the_schema() -> None:
    report = build_report("m", {"a": stats_of(BALANCED, 4, 2), "b": stats_of([[0, 1], [0, 2]], 4, 2)})
    report = json.loads(json.dumps(report, allow_nan=False))
    assert list(report)[:6] == ["schema_version", "model", "num_layers", "num_experts", "top_k", "domains"]
    assert (report["schema_version"], report["num_layers"], report["num_experts"], report["top_k"]) == (1, 2, 4, 2)
    assert report["vocabulary_specialization"] is None
    assert report["comparison"] is None
    row = report["domains"]["b"]["layers"][1]
    assert row["layer"] == 1
    assert row["load"] == [0.5, 0.25, 0.25, 0]
    assert (row["mri"], row["mri_normalized"], row["dead_experts"]) == (1.0, 2.0, [3])
    assert sum(row["mean_probability"]) == pytest.approx(1)
    assert report["domain_divergence"][0]["domains"] == ["a", "b"]
    assert len(report["domain_divergence"][0]["layers"]) == 2
    assert set(report["coactivation"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("choices", "level"),
    [(BALANCED, "balanced"), ([*BALANCED, *[[0, 1]] * 9], "skewed"), ([[0, 1]] * 20 + [[2, 3]], "collapsed")],
)
def test_verdict(choices: list[list[int]], level: str) -> None:
    verdict = build_report("m", {"a": stats_of(choices, 4, 3)})["verdict"]
    assert verdict["level"] == level
    assert verdict["title"].lower().startswith(level)
    assert verdict["advice"]


def test_a_specialist_is_not_called_dead_or_skewed() -> None:
    verdict = build_report("m", {"a": stats_of([[0, 1], [1, 0]], 4), "b": stats_of([[2, 3], [3, 2]], 4)})["verdict"]
    assert verdict["level"] == "balanced"
    assert verdict["dead_experts"] == []
    assert verdict["worst"]["mri"] == 1.0


def test_specialists_are_called_so_and_who_is_dead_on_one_domain_is_said() -> None:
    pairs = {"a": [0, 1], "b": [2, 3], "c": [4, 5]}
    findings = build_report("m", {name: stats_of([pair], 6) for name, pair in pairs.items()})["verdict"]["findings"]
    assert "expert 0 of layer 0: it receives 100% of the tokens of a" in findings[0]
    assert findings[1].startswith("This is specialisation")
    assert findings[2] == "No expert is dead in every domain; dead on one kind of text: 4 on a, 4 on b, 4 on c."
    alone = build_report("m", {"a": stats_of([[0, 1], [2, 3], [4, 5]], 6)})["verdict"]["findings"]
    assert alone[1:] == ["No expert is dead on a."]


def test_dead_in_every_domain() -> None:
    verdict = build_report("m", {"a": stats_of([[0, 1]], 4), "b": stats_of([[1, 2]], 4)})["verdict"]
    assert verdict["dead_experts"] == [[0, 3]]
    assert "1 of 4 experts is dead" in " ".join(verdict["findings"])


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def nasty_report() -> dict[str, Any]:
    token = {"id": 1, "text": NASTY, "count": 10, "share": 0.5}
    words = {
        "num_types": 1,
        "num_tokens": 10,
        "layers": [
            {
                "layer": 0,
                "by_chance": 0.5,
                "input": {"by_type": 0.5, "by_occurrence": 0.5},
                "next": {"by_type": 0.5, "by_occurrence": 0.5},
                "experts": [{"expert": e, "tokens": [token] if e == 0 else []} for e in range(4)],
            }
        ],
    }
    return build_report(
        NASTY, {NASTY: stats_of(BALANCED, 4), "b": stats_of(BALANCED, 4)}, vocabulary_specialization=words
    )


def test_names_and_tokens_are_text_in_the_page() -> None:
    report = nasty_report()
    page = render(report)
    parsed = Page(page)
    assert parsed.tags.count("script") == 2  # the embedded data and the page's own
    assert page.lower().count("</script") == 2
    assert "</script><script>alert(1)</script>\\u202e\\u0007" in parsed.text
    assert not any(character in page for character in "\u202e\x07")
    assert {"link", "img", "iframe"}.isdisjoint(parsed.tags)
    assert not any(name in ("src", "href") or name.startswith("on") for name, _ in parsed.attributes)
    data = page.split('id="coactivation">')[1].split("</script>")[0]
    assert json.loads(data) == json.loads(json.dumps(list(report["coactivation"].values())))
    assert render(json.loads(json.dumps(report))) == page  # drawn from report.json alone


def test_control_characters_are_visible() -> None:
    assert visible("a\nb\x1b\u200b") == "a↵b\\u001b\\u200b"
    assert visible(" the") == "␣the"
    assert visible("two words") == "two words"
    assert "<" not in safe_json("</script>")
    assert json.loads(safe_json("</script>\u2028&")) == "</script>\u2028&"
    assert [percent(v).replace("\u00a0", " ") for v in (0.512, 0.125, 0.08, 0, None)] == [
        "51 %",
        "12.5 %",
        "8 %",
        "0 %",
        "–",
    ]


def test_names_of_files_are_not_made_in_advance() -> None:
    tracemalloc.start()
    names = plots._file_names({"a" + "?" * n: None for n in range(300)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [names["a"], names["a?"], names["a" + "?" * 299]] == ["a", "a-2", "a-300"]
    assert peak < 1e6


def test_files_are_written_and_stale_plots_removed(tmp_path: Path) -> None:
    both = {"a/../b": stats_of(BALANCED, 4, 2), "A_.._B": stats_of(BALANCED, 4, 2), "日本$x$": stats_of(BALANCED, 4, 2)}
    files = write_report(build_report("m", both), tmp_path)
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"mri.png", "entropy.png", "load-a_.._b.png", "load-A_.._B-2.png", "load-日本_x.png"}
    assert json.loads(Path(files["report"]).read_text())["num_layers"] == 2
    write_report(build_report("m", {"only": stats_of(BALANCED, 4)}), tmp_path)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"mri.png", "entropy.png", "load-only.png"}


def test_counts_of_another_engine(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"en": {"3": [7, 1, 0, 0], "10": [2, 2, 2, 2]}}))
    report = build_report("counts", read_counts(path, 1))
    entry = report["domains"]["en"]
    assert entry["num_tokens"] == 8
    assert [row["layer"] for row in entry["layers"]] == [3, 10]
    assert entry["layers"][0]["mri"] == 0.875
    assert entry["layers"][0]["balance_loss"] is None
    assert entry["layers"][0]["mean_probability"] is None
    assert report["coactivation"] is None
    assert "Collapsed" in render(report)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "expected"),
        ({"en": {"x": [1]}}, "layer numbers"),
        ({"en": {"0": [1, 1.5]}}, "whole numbers"),
        ({"en": {"0": [1, True]}}, "whole numbers"),
        ({"en": {"0": [2, 2], "1": [4]}}, "layer 1: 1 experts"),
        ({"en": {"0": [4, 0]}}, "top-k 2 right"),
        ({"en": {"0": [0, 0]}}, "do not fit"),
        ({"en": {"0": [1, 1]}, "de": {"1": [1, 1]}}, "domain 'de' has other"),
    ],
)
def test_counts_that_make_no_sense(tmp_path: Path, document: Any, message: str) -> None:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=message):
        read_counts(path, 2)
