"""`analyze-routing --show-text`: the choices on the page against a plain forward, and the page in a browser."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moetool.checkpoint.model import load_model
from moetool.routing import html
from moetool.routing.alignment import Alignment
from moetool.routing.capture import Route, RouterCapture
from moetool.routing.html import TEXT_COLOURS, render
from moetool.routing.report import build_report
from moetool.routing.shown_text import PAGE_BYTES, ShownText, _fitting
from moetool.routing.stats import RoutingStats
from moetool.routing.text_pass import Batch
from tests import tiny
from tests.colour_vision import BLINDNESS, contrast, distance, rgb

NASTY = "</script><script>alert(1)</script>\u202e\x07"


class Text:
    """A token stream in memory."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = np.array(tokens, dtype=np.int64)
        self.num_tokens = len(tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length]


class Words:
    """Each token is a name from outside."""

    def decode(self, ids: list[int]) -> str:
        return f"{NASTY}{ids[0]}"


def numbers(packed: str, dtype: str = "u1") -> Any:
    return np.frombuffer(base64.b64decode(packed), dtype)


def batch(start: int, number: int) -> Batch:
    ids = torch.zeros(1, number, dtype=torch.int64)
    return Batch(start, np.zeros(number, np.int64), np.zeros(number, np.int64), ids, None)


def route(layer: int, experts: list[list[int]], weights: list[list[float]]) -> Route:
    return Route(layer, torch.zeros(len(experts), 8), torch.tensor(weights), torch.tensor(experts))


def test_choices_are_ordered_by_weight_and_compared_at_any_rank() -> None:
    like = RoutingStats([2], 8, 2)
    shown = ShownText({"a": Text([5, 6, 7])}, 100, [like, like])
    shown.observe(0, "a", route(2, [[3, 1], [0, 4]], [[0.25, 0.75], [0.5, 0.5]]), batch(0, 2))
    shown.observe(0, "a", route(2, [[6, 7]], [[1.0, 0.0]]), batch(2, 1))
    shown.observe(1, "a", route(2, [[3, 1], [0, 5], [2, 6]], [[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]]), batch(0, 3))
    shown.observe(1, "a", route(9, [[0, 0]], [[1.0, 1.0]]), batch(0, 1))  # a layer that is not kept
    found = shown.report(Words())
    assert (found["layers"], found["num_ranks"], found["expert_bytes"]) == ([2], 2, 1)
    first, second = found["domains"]["a"]["models"]
    assert numbers(first["experts"]).tolist() == [1, 3, 0, 4, 6, 7]
    assert (numbers(first["weights"]) * first["weight_scale"]).tolist() == pytest.approx(
        [0.75, 0.25, 0.5, 0.5, 1, 0], abs=0.002
    )
    assert numbers(second["experts"]).tolist() == [3, 1, 0, 5, 2, 6]
    # Token 0 kept both; of token 1 the choice 4 became 5; of token 2 the choice 7 became 2.
    assert np.unpackbits(numbers(first["changed"]))[:6].tolist() == [0, 0, 0, 1, 0, 1]
    assert np.unpackbits(numbers(second["changed"]))[:6].tolist() == [0, 0, 0, 1, 1, 0]


def test_a_copy_of_the_expert_is_no_change() -> None:
    models = [RoutingStats([0], 2, 1), RoutingStats([0], 4, 1)]
    grown = Alignment(({0: [0, 1]}, {0: [0, 1, 0, 1]}), ((), ("grow",)))
    shown = ShownText({"a": Text([5, 6])}, 100, models, grown)
    shown.observe(0, "a", route(0, [[0], [1]], [[1.0], [1.0]]), batch(0, 2))
    shown.observe(1, "a", route(0, [[2], [2]], [[1.0], [1.0]]), batch(0, 2))
    models_shown = shown.report(Words())["domains"]["a"]["models"]
    assert numbers(models_shown[1]["experts"]).tolist() == [2, 2]
    assert np.unpackbits(numbers(models_shown[1]["changed"]))[:2].tolist() == [0, 1]


@pytest.mark.parametrize("tokens", [2000, 8000, 40_000, 1_000_000])
@pytest.mark.parametrize(("layers", "top_k", "size"), [(2, 2, 2), (60, 8, 2), (60, 1, 2), (94, 22, 3)])
def test_what_is_kept_fits_on_the_page(tokens: int, layers: int, top_k: int, size: int) -> None:
    kept, ranks = _fitting(range(layers), top_k, tokens, size)
    assert 1 <= ranks <= top_k
    assert set(kept) <= set(range(layers))
    assert len(kept) in (1, layers) or {0, layers - 1} <= set(kept)
    if len(kept) > 1:
        assert tokens * len(kept) * ranks * size * 4 / 3 <= PAGE_BYTES
    if len(kept) < layers:
        assert ranks == min(2, top_k)


def test_the_command_shows_what_a_plain_forward_chooses(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    arguments = ("analyze-routing", mixtral, "--data", f"a={jsonl}", "--max-tokens", 200, "--seq-len", 32)
    code, _, err = tiny.in_process(*arguments, "--show-text", "--out", tmp_path / "o")
    assert code == 0, err
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    text = report["text"]["domains"]["a"]
    assert len(text["tokens"]) == 200
    model = load_model(mixtral)
    capture = RouterCapture(model)
    from moetool.data.make_tokens import tokenized
    from moetool.data.text import TextSource

    ids = tokenized(TextSource(str(jsonl), "text", "file"), mixtral, lambda *a, **k: None).read(0, 32)
    with torch.no_grad(), capture.collect() as routes:
        model(torch.from_numpy(ids.astype(np.int64))[None])
    experts = numbers(text["models"][0]["experts"]).reshape(200, 2, 2)
    for row, one in enumerate(routes):
        assert experts[:32, row].tolist() == one.indices_TK[torch.arange(32)[:, None], one.weights_TK.argsort(
            dim=1, descending=True, stable=True)].tolist()  # fmt: skip
    assert "--show-text has no effect" in tiny.in_process(
        "analyze-routing", "--counts", "x.json", "--top-k", 1, "--show-text", "--out", tmp_path / "p"
    )[2]  # fmt: skip
    code, _, err = tiny.in_process(*arguments, "--out", tmp_path / "q")
    assert "text" not in json.loads((tmp_path / "q" / "report.json").read_text())


def random_report(layers: int, experts: int, top_k: int, compared: bool) -> dict[str, Any]:
    """A report with text, of random choices; a comparison as far as the text shows it."""
    draw = np.random.default_rng(0)
    stats, names = {}, ["code", NASTY, "law"]
    like = RoutingStats(range(layers), experts, top_k)
    shown = ShownText({name: Text([*range(2000)]) for name in names}, 10**6, [like] * (1 + compared))
    for name in names:
        counts_LE = draw.integers(50, 150, (layers, experts))
        counts_LE[:, 0] += 2000 * top_k - counts_LE.sum(axis=1)
        arrays = {"num_tokens": torch.tensor(2000), "counts": torch.from_numpy(np.abs(counts_LE))}
        arrays |= {"probability": torch.ones(layers, experts) * 2000 / experts}
        arrays["coactivation"] = torch.from_numpy(draw.integers(0, 9, (layers, experts, experts)))
        stats[name] = RoutingStats.from_arrays(range(layers), top_k, arrays)
        for side in range(1 + compared):
            for layer in range(layers):
                chosen = draw.permuted(np.tile(np.arange(experts), (2000, 1)), axis=1)[:, :top_k]
                weights = draw.random((2000, top_k))
                shown.observe(side, name, route(layer, chosen.tolist(), weights.tolist()), batch(0, 2000))
    return build_report("models/moe", stats, text=shown.report(Words()))


@pytest.mark.slow
def test_a_report_of_a_large_model_stays_below_its_limit() -> None:
    page = render(random_report(60, 128, 8, compared=True))
    assert len(page.encode()) < 5_000_000


PALETTE = re.findall(r"--e\d: #(\w{6})", (Path(html.__file__).parent / "templates" / "report.css").read_text())


@pytest.mark.parametrize("kind", BLINDNESS)
def test_everyone_tells_the_colours_of_experts_apart(kind: str) -> None:
    colours = [rgb(text) for text in PALETTE]
    assert len(colours) == TEXT_COLOURS
    for one, other in itertools.combinations(colours, 2):
        assert distance(one, other, BLINDNESS[kind]) > 20
    for colour in colours:
        assert min(distance(colour, rgb(card), BLINDNESS[kind]) for card in ("ffffff", "1d2026")) > 10
        assert contrast(colour, rgb("1d2129")) > 4.5  # of the letters on it


def test_more_experts_than_colours_are_told_apart_by_number(tmp_path: Path, browser: Any) -> None:
    report = random_report(2, 20, 3, compared=False)
    (tmp_path / "report.html").write_text(render(report), encoding="utf-8")
    all_experts = np.concatenate(
        [
            numbers(one["models"][0]["experts"]).reshape(2000, 2, 3)[:, 1].reshape(-1)
            for one in report["text"]["domains"].values()
        ]
    )
    routes = np.bincount(all_experts, minlength=20)
    most = sorted(sorted(range(20), key=lambda expert: (-routes[expert], expert))[:TEXT_COLOURS])
    page = browser.new_page(viewport={"width": 400, "height": 900})
    page.goto(f"file://{tmp_path}/report.html")
    assert page.get_by_label("expert numbers").is_checked()
    page.locator("#text-layer").select_option(index=1)
    drawn = page.evaluate(
        "[...document.querySelectorAll('#text-0 span')].map((s) => [+s.dataset.expert,"
        " s.style.getPropertyValue('--fill'), s.classList.contains('plain'), getComputedStyle(s, '::after').content])"
    )
    expected = [
        [e, f"var(--e{most.index(e)})" if e in most else "", e not in most, f'"{e}"']
        for e in numbers(report["text"]["domains"]["code"]["models"][0]["experts"])
        .reshape(2000, 2, 3)[:, 1, 0]
        .tolist()
    ]
    assert drawn == expected
    page.close()


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        chromium_browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield chromium_browser
        chromium_browser.close()


def test_the_page_in_a_browser(tmp_path: Path, browser: Any) -> None:
    report = random_report(3, 8, 2, compared=False)
    text = report["text"]["domains"][NASTY]
    experts = numbers(text["models"][0]["experts"]).reshape(2000, 3, 2)
    (tmp_path / "report.html").write_text(render(report), encoding="utf-8")
    page = browser.new_page(viewport={"width": 400, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.goto(f"file://{tmp_path}/report.html")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.locator("#text-domain").select_option(index=1)
    page.locator("#text-layer").select_option(index=2)
    page.locator("#text-rank").select_option(index=1)
    drawn = page.evaluate("[...document.querySelectorAll('#text-0 span')].map((s) => +s.dataset.expert)")
    assert drawn == experts[:, 2, 1].tolist()
    shown = NASTY.replace("\u202e", "\\u202e").replace("\x07", "\\u0007")
    assert page.locator("#text-0 span").first.inner_text() == f"{shown}0"
    page.locator("#text-0").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    first, second = experts[1, 2]
    tip = page.locator("#tip").inner_text()
    assert tip.startswith(f"token 2 “{shown}1”, layer 2: expert {first} (weight 0.")
    assert f", expert {second} (weight 0." in tip
    page.keyboard.press("Enter")
    faded = page.evaluate("document.querySelectorAll('#text-0 .faded').length")
    assert faded == int((experts[:, 2, 1] != second).sum())
    assert page.locator("#text-0 .picked").count() == 2000 - faded
    content = "getComputedStyle(document.querySelector('#text-0 .picked'), '::after').content"
    page.locator("#text-domain").focus()
    assert page.evaluate(content) == "none"
    page.get_by_label("expert numbers").check()
    assert page.evaluate(content) == f'"{second}"'
    assert page.evaluate("getComputedStyle(document.querySelector('#text-0 .faded'), '::after').content") == "none"
    with page.expect_download() as download:
        page.locator("#text-csv").click()
    rows = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
    assert len(rows) == 1 + 2000 * 2
    assert rows[4][:6] == ["1", "2", f"{shown}1", "2", "2", str(second)]
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV of Load of every expert, code").click()
    rows = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
    assert [float(cell) for cell in rows[1][1:]] == pytest.approx(
        report["domains"]["code"]["layers"][0]["load"], rel=1e-3
    )
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV of Balance by layer, Entropy of the load").click()
    rows = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
    assert [float(row[1]) for row in rows[1:]] == [row["entropy"] for row in report["domains"]["code"]["layers"]]
    page.locator(".heat").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.locator("#tip").inner_text().startswith("layer 1, expert 0: load ")
    page.locator("summary", has_text="code").last.click()
    table = page.locator("details[open] table").last
    table.locator("th", has_text="entropy").focus()
    page.keyboard.press("Enter")
    values = [float(cell) for cell in table.locator("td:nth-child(4)").all_inner_texts()]
    assert values == sorted(values)
    page.keyboard.press("Enter")
    assert table.locator("th", has_text="entropy").get_attribute("aria-sort") == "descending"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, select, [tabindex]')].filter((e) => !(e.getAttribute('aria-label')"
        " || e.textContent || (e.labels && e.labels[0].innerText) || '').trim())"
        ".map((e) => e.outerHTML.slice(0, 90))"
    )
    assert unnamed == []
    page.close()
    assert errors == []
