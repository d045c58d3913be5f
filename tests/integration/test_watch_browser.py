"""The page of `moetool watch` in a real browser, on runs whose numbers are known."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moetool.watch.open import open_runs
from moetool.watch.page import collect, render
from moetool.watch.server import Watcher, serve
from tests import tiny
from tests.watched import HOSTILE, row, save_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="no Playwright: pip install playwright, and apt-get install chromium"
)
if CHROMIUM is None:
    pytest.skip("no Chromium: apt-get install chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Seen:
    """A page and what happened on it."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | context))
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("dialog", lambda dialog: self.errors.append(f"dialog {dialog.message}"))
        self.page.goto(address)

    def chart(self, name: str) -> Any:
        return self.page.locator(f"#{name}")

    def csv(self, name: str) -> list[list[str]]:
        with self.page.expect_download() as download:
            self.chart(name).get_by_role("button", name="CSV").click()
        return list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))

    def fine(self) -> None:
        assert self.errors == []
        self.context.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs and their page, as one file."""
    root = tmp_path_factory.mktemp("watched")
    save_run(root / "one", steps=60)
    save_run(root / "two", steps=40, domain=HOSTILE)
    runs = open_runs([root / "one", root / "two"])
    for run in runs:
        run.refresh()
    points = {"one": {"x": [20, 40], "y": [0.25, 0.5], "stderr": [0.1, None]}}
    scores = [{"task": HOSTILE, "metric": "acc", "higher_is_better": True, "runs": points}]
    (root / "page.html").write_text(render(collect(runs, scores)), encoding="utf-8")
    return root


@pytest.fixture
def seen(browser: Any, folder: Path) -> Iterator[Seen]:
    opened = Seen(browser, f"file://{folder}/page.html")
    yield opened
    opened.fine()


def test_the_numbers_are_those_of_the_files_and_nothing_is_asked_for(seen: Seen, folder: Path) -> None:
    expected = [["one", str(step), row(step)["loss"]] for step in range(1, 61)]
    expected += [["two", str(step), row(step)["loss"]] for step in range(1, 41)]
    header, *cells = seen.csv("loss")
    assert header == ["run", "step", "value"]
    assert [[run, step, float(value)] for run, step, value in cells] == expected
    assert f"one {row(60)['loss']:.5g} at 60" in seen.chart("loss").locator("output").inner_text()
    heat = seen.csv("routers-heat")
    assert [float(cell) for cell in heat[2][1:]] == pytest.approx([row(s)["mri"][1] for s in range(1, 61)], abs=1e-5)
    assert heat[2][0] == "2"
    assert seen.csv("score-0")[1:] == [["one", "20", "0.25"], ["one", "40", "0.5"]]
    assert "150000" in seen.page.locator("#sources").inner_text()
    blobs = [url for url in seen.requests if not url.startswith(("blob:", "data:"))]
    assert blobs == [f"file://{folder}/page.html"]


def test_names_from_outside_are_shown_and_not_run(seen: Seen) -> None:
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\u001b")
    assert shown in seen.page.locator("#verdict").inner_text()
    assert seen.page.get_by_role("heading", name=f"Validation loss: {shown}").count() == 1
    assert seen.page.locator("img").count() == 0
    assert seen.page.locator("script").count() == 9
    assert not seen.page.evaluate("/[\\u202e\\u001b]/.test(document.body.innerText)")


def test_values_are_read_by_keyboard_and_mouse(seen: Seen) -> None:
    plot, values = seen.chart("loss").locator(".plot"), seen.chart("loss").locator("output")
    plot.focus()
    seen.page.keyboard.press("ArrowRight")
    assert f"step 1 one {row(1)['loss']:.5g}" in " ".join(values.inner_text().split())
    seen.page.keyboard.press("ArrowRight")
    assert f"step 2 one {row(2)['loss']:.5g}" in " ".join(values.inner_text().split())
    assert "step 2" in plot.get_attribute("aria-label")
    over = seen.chart("grad_norm").locator(".u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    over.hover(position={"x": box["width"] - 1, "y": 30})
    read = " ".join(seen.chart("grad_norm").locator("output").inner_text().split())
    assert f"step 60 one {row(60)['grad_norm']:.5g}" in read


def scale(seen: Seen, name: str) -> list[float]:
    script = "name => { const c = drawn.get(name).chart.scales.x; return [c.min, c.max]; }"
    return seen.page.evaluate(script, name)  # type: ignore[no-any-return]


def test_zoom_and_pan_are_shared_by_all_charts(seen: Seen) -> None:
    seen.page.locator("#loss .plot").focus()
    assert scale(seen, "loss") == [1, 60]
    seen.page.keyboard.press("+")
    low, high = scale(seen, "loss")
    assert high - low == pytest.approx(30, abs=1)
    assert scale(seen, "grad_norm") == [low, high]
    seen.page.keyboard.press("Shift+ArrowRight")
    assert scale(seen, "lr")[0] > low
    seen.page.keyboard.press("0")
    assert scale(seen, "loss") == [1, 60]
    over = seen.chart("loss").locator(".u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    seen.page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 40)
    seen.page.mouse.down()
    seen.page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 60, steps=3)
    seen.page.mouse.up()
    low, high = scale(seen, "grad_norm")
    assert 12 < low < 19
    assert 42 < high < 49
    # With Shift, the steps under the mouse follow it: by a tenth of the width, to the left.
    seen.page.keyboard.down("Shift")
    seen.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 40)
    seen.page.mouse.down()
    seen.page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 40, steps=3)
    seen.page.mouse.up()
    seen.page.keyboard.up("Shift")
    assert scale(seen, "loss") == scale(seen, "grad_norm")
    assert scale(seen, "loss") == pytest.approx([low + (high - low) / 10, high + (high - low) / 10], abs=0.2)
    seen.page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 40)  # the button is up: nothing follows
    assert scale(seen, "loss")[0] == pytest.approx(low + (high - low) / 10, abs=0.2)
    seen.page.get_by_role("button", name="Show all steps").click()
    assert scale(seen, "grad_norm") == [1, 60]


def test_log_scale_smoothing_and_runs_switch_on_and_off(seen: Seen) -> None:
    button = seen.page.get_by_role("button", name="Logarithmic scale: Training loss")
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert seen.page.evaluate("drawn.get('loss').chart.scales.y.distr") == 3
    seen.page.get_by_label("Smoothing").fill("0.5")
    losses = [row(step)["loss"] for step in range(1, 61)]
    last = norm = 0.0
    for loss in losses:
        last, norm = last / 2 + loss / 2, norm / 2 + 0.5
    assert f"(smoothed {last / norm:.5g})" in seen.chart("loss").locator("output").inner_text()
    seen.page.get_by_role("button", name="Show one").click()
    assert "one" not in seen.chart("loss").locator("output").inner_text()
    assert {cells[0] for cells in seen.csv("loss")[1:]} == {"two"}
    seen.page.get_by_role("button", name="Show one").click()
    seen.page.get_by_role("button", name="Validation as change").click()
    first = seen.csv("val-0")[1]
    assert first == ["one", "0", "0"]


def test_a_layer_is_chosen_by_mouse_and_keyboard(seen: Seen) -> None:
    canvas, load = seen.chart("routers-heat").locator("canvas").first, seen.chart("routers-load")
    worst = max(range(3), key=lambda layer: row(60)["mri"][layer])
    assert f"layer {worst + 1}, one" in load.locator("h3").inner_text()
    canvas.scroll_into_view_if_needed()
    canvas.click(position={"x": 300, "y": 4 + 22 * 2 + 10})
    assert "layer 3, one" in load.locator("h3").inner_text()
    heat = seen.csv("routers-load")
    assert [float(cells[-1]) for cells in heat[1:]] == row(60)["load"]["3"]
    canvas.focus()
    seen.page.mouse.move(5, 5)
    seen.page.keyboard.press("ArrowRight")
    seen.page.keyboard.press("ArrowDown")
    read = seen.chart("routers-heat").locator("output").inner_text()
    assert read == f"layer 2, step 60: {100 * row(60)['mri'][1]:.1f} %"
    seen.page.keyboard.press("Enter")
    assert "layer 2, one" in load.locator("h3").inner_text()
    seen.page.get_by_label("Measure of the routers").select_option("entropy")
    canvas.hover()
    seen.page.mouse.move(5, 5)
    least = min(range(3), key=lambda layer: row(60)["entropy"][layer])
    assert f"smallest: layer {least + 1}, step 60" in seen.chart("routers-heat").locator("output").inner_text()
    seen.page.get_by_label("Measure of the routers").select_option("dead_experts")
    assert "dead experts" in seen.chart("routers-heat").locator(".note").inner_text()


def picture(seen: Seen, name: str, x: float, y: float) -> list[int]:
    """The colour in a heatmap or a chart at a place in CSS pixels."""
    script = """([name, x, y]) => [...document.querySelector(`#${name} .plot canvas`).getContext("2d")
      .getImageData(x * devicePixelRatio, y * devicePixelRatio, 1, 1).data].slice(0, 3)"""
    return seen.page.evaluate(script, [name, x, y])  # type: ignore[no-any-return]


def test_a_heatmap_on_a_log_scale_has_its_key_and_colours(browser: Any, tmp_path: Path) -> None:
    save_run(tmp_path / "run", steps=10)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for one in lines:
        if "mri" in one:
            # 8 experts, top-2: balance is 0.25. 0.5 lies at a third between 0.25 and 1; on a log scale in the middle.
            one["mri"] = [0.25, 0.5, 1.0]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (run,) = open_runs([tmp_path / "run"])
    run.refresh()
    document = collect([run])
    document["runs"][0]["routers"] |= {"num_experts": 8, "top_k": 2}
    (tmp_path / "page.html").write_text(render(document), encoding="utf-8")
    seen = Seen(browser, f"file://{tmp_path}/page.html")
    heat = seen.chart("routers-heat")
    assert "layer 3, run" in seen.chart("routers-load").locator("h3").inner_text()
    # viridis has nine colours; the third of eight parts is two thirds on from the third to the fourth colour.
    places = [(300, 4 + 22 * layer + 10) for layer in range(3)]
    ends = [68, 1, 84], [253, 231, 37]
    third = [59 + (44 - 59) * 2 / 3, 81 + (113 - 81) * 2 / 3, 139 + (142 - 139) * 2 / 3]
    assert picture(seen, "routers-heat", *places[0]) == ends[0]
    assert picture(seen, "routers-heat", *places[1]) == pytest.approx(third, abs=1)
    assert picture(seen, "routers-heat", *places[2]) == ends[1]
    assert "middle 62.5 %" in heat.locator(".key").inner_text()
    button = heat.get_by_role("button", name="Logarithmic scale")
    button.focus()
    seen.page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    assert picture(seen, "routers-heat", *places[0]) == ends[0]
    assert picture(seen, "routers-heat", *places[1]) == pytest.approx([33, 144, 141], abs=1)
    assert picture(seen, "routers-heat", *places[2]) == ends[1]
    assert "logarithmic, middle 50.0 %" in heat.locator(".key").inner_text()
    seen.page.evaluate("scrollTo(0, document.querySelector('#routers').offsetTop)")
    heat.locator("canvas").first.hover(position={"x": 300, "y": places[1][1]})
    assert heat.locator("output").inner_text().endswith(": 50.0 %")
    # The mark in the key lies at the value that is told.
    mark = """() => { const bar = document.querySelector("#routers-heat .key canvas"), data = bar.getContext("2d").getImageData(0, 7, bar.width, 1).data;
      return [...Array(bar.width).keys()].find((x) => data[4 * x] === 29 && data[4 * x + 1] === 33) / bar.width; }"""  # noqa: E501
    assert seen.page.evaluate(mark) == pytest.approx(0.5, abs=0.02)
    button.click()
    heat.locator("canvas").first.hover(position={"x": 300, "y": places[1][1]})
    assert seen.page.evaluate(mark) == pytest.approx(1 / 3, abs=0.02)
    seen.fine()


def test_each_line_is_switched_off_and_on(seen: Seen) -> None:
    loss, y = seen.chart("loss"), "drawn.get('loss').chart.scales.y.max"
    one = loss.get_by_role("button", name=re.compile("^one "))
    two = loss.locator(".line").nth(1)
    top = seen.page.evaluate(y)
    one.click()
    off = loss.locator(".line").first
    assert (off.get_attribute("aria-pressed"), two.get_attribute("aria-pressed")) == ("false", "true")
    assert off.inner_text() == "one off"
    assert {cells[0] for cells in seen.csv("loss")[1:]} == {"two"}
    assert scale(seen, "loss") == [1, 40]  # the run of 60 steps has left
    assert seen.chart("lr").locator(".line").first.get_attribute("aria-pressed") == "true"
    two.focus()
    seen.page.keyboard.press("Enter")
    assert two.evaluate("(e) => e === document.activeElement")
    assert two.get_attribute("aria-pressed") == "false"
    assert seen.csv("loss") == [["run", "step", "value"]]
    assert "one off; two off" in loss.locator(".plot").get_attribute("aria-label")
    loss.locator(".plot").focus()
    for key in ("ArrowRight", "+", "-", "0"):
        seen.page.keyboard.press(key)
    off.click()
    assert scale(seen, "loss") == [1, 60]
    assert seen.page.evaluate(y) == top
    # A run that is hidden and shown again finds its lines as they were.
    seen.page.get_by_role("button", name="Show one").click()
    seen.page.get_by_role("button", name="Show one").click()
    assert [line.get_attribute("aria-pressed") for line in loss.locator(".line").all()] == ["true", "false"]


def test_a_line_without_the_highest_values_leaves_the_scale(seen: Seen) -> None:
    # Both runs have the same values at a step; the second ends at step 40, and code's validation falls with the steps.
    low = "drawn.get('val-1').chart.scales.y.max"
    assert seen.page.evaluate(low) > 3.3  # prose is 3 + step / 200: one ends at 3.3
    seen.chart("val-1").locator(".line").first.click()
    assert seen.page.evaluate(low) < 3.23  # two at 3.2, and 6 % of 0.2


def test_the_phases_of_each_schedule_are_named_and_shaded(browser: Any, seen: Seen, tmp_path: Path) -> None:
    lr = seen.chart("lr")
    assert lr.locator(".key").inner_text().split() == ["warm-up", "constant", "decay"]
    header, *cells = seen.csv("lr")
    assert header == ["run", "step", "value", "phase"]
    # 100 steps, 10 of warm-up, constant up to 80: update 10 is the last of the warm-up.
    assert [cells[step - 1][3] for step in (1, 10, 11, 60)] == ["warm-up", "warm-up", "constant", "constant"]
    lr.locator(".plot").focus()
    seen.page.keyboard.press("ArrowRight")
    assert "step 1 one 1e-4 (warm-up) two 1e-4 (warm-up)" in " ".join(lr.locator("output").inner_text().split())
    shade = "name => { const p = document.createElement('canvas').getContext('2d'); p.fillStyle = phaseColor(name); p.fillRect(0, 0, 1, 1); return [...p.getImageData(0, 0, 1, 1).data].slice(0, 3); }"  # noqa: E501
    place = "step => drawn.get('lr').chart.valToPos(step, 'x') + drawn.get('lr').chart.bbox.left / devicePixelRatio"
    top = "drawn.get('lr').chart.bbox.top / devicePixelRatio"
    colors = {name: seen.page.evaluate(shade, name) for name in ("warm-up", "cooldown", "constant", "decay")}
    assert len({tuple(color) for color in colors.values()}) == 4
    for step, name in ((7, "warm-up"), (13, "constant"), (57, "constant")):
        x = seen.page.evaluate(place, step)
        assert picture(seen, "lr", x, seen.page.evaluate(top) - 16) == colors[name]
        assert picture(seen, "lr", x, 160) == pytest.approx(colors[name], abs=4)  # under the line, and lighter

    for name, options in {
        "infinite": {"schedule": "infinite", "warmup_steps": 10, "cooldown_end": 0.3, "constant_end": 0.4},
        "cosine": {"schedule": "cosine", "warmup_steps": 20},
    }.items():
        save_run(tmp_path / name, steps=60)
        file = tmp_path / name / "moetool.partial.json"
        partial = json.loads(file.read_text())
        file.write_text(json.dumps(partial | {"options": partial["options"] | options}))
    runs = open_runs([tmp_path / "infinite", tmp_path / "cosine"])
    for run in runs:
        run.refresh()
    (tmp_path / "page.html").write_text(render(collect(runs)), encoding="utf-8")
    both = Seen(browser, f"file://{tmp_path}/page.html")
    assert both.chart("lr").locator(".key").inner_text().split() == ["warm-up", "cooldown", "constant", "decay"]
    assert both.chart("loss").locator(".key").inner_text() == ""  # no shade of one run where runs differ
    # One band a run above the chart, of 18 pixels each.
    above = both.page.evaluate(top)
    for step, first, second in ((8, "warm-up", "warm-up"), (25, "cooldown", "decay"), (38, "constant", "decay")):
        x = both.page.evaluate(place, step)
        assert picture(both, "lr", x, above - 36 + 2) == colors[first]
        assert picture(both, "lr", x, above - 18 + 2) == colors[second]
    assert {cells[3] for cells in both.csv("lr") if cells[:2] == ["infinite", "35"]} == {"constant"}
    both.chart("lr").locator(".line").first.click()  # one schedule is left: it shades the chart
    assert both.chart("lr").locator(".key").inner_text().split() == ["warm-up", "decay"]
    assert picture(both, "lr", both.page.evaluate(place, 25), both.page.evaluate(top) - 16) == colors["decay"]
    both.fine()


def test_heatmaps_show_the_steps_that_the_charts_show(seen: Seen) -> None:
    canvas, values = seen.chart("routers-heat").locator("canvas").first, seen.chart("routers-heat").locator("output")
    canvas.focus()
    seen.page.keyboard.press("+")
    low, high = scale(seen, "loss")
    assert (low, high) == (15, 45)
    seen.page.keyboard.press("ArrowRight")  # begins at the last column that is shown
    assert "step 45" in values.inner_text()
    for _ in range(40):
        seen.page.keyboard.press("ArrowLeft")
    assert "step 15" in values.inner_text()
    seen.page.keyboard.press("0")
    assert scale(seen, "loss") == [1, 60]


def test_a_run_whose_rows_have_no_loads_does_not_show_those_of_another(browser: Any, tmp_path: Path) -> None:
    save_run(tmp_path / "new", steps=20)
    save_run(tmp_path / "old", steps=20)
    rows = [json.loads(line) for line in (tmp_path / "old" / "metrics.jsonl").read_text().splitlines()]
    less = [{key: value for key, value in one.items() if key != "load"} for one in rows]
    (tmp_path / "old" / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in less))
    runs = open_runs([tmp_path / "new", tmp_path / "old"])
    for run in runs:
        run.refresh()
    (tmp_path / "page.html").write_text(render(collect(runs)), encoding="utf-8")
    seen = Seen(browser, f"file://{tmp_path}/page.html")
    which = seen.page.get_by_label("Run whose routers are shown")
    for name, shown in (("old", 0), ("new", 1), ("old", 0)):
        which.select_option(name)
        assert seen.chart("routers-load").count() == shown
        assert seen.page.get_by_text("no loads of single experts").count() == 1 - shown
    seen.fine()


def test_pictures_are_saved(seen: Seen) -> None:
    for name in ("loss", "routers-heat"):
        with seen.page.expect_download() as download:
            seen.chart(name).get_by_role("button", name="PNG").click()
        data = Path(download.value.path()).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert min(struct.unpack(">II", data[16:24])) > 100


def test_everything_that_is_focused_has_a_name(seen: Seen) -> None:
    named = seen.page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, summary, [tabindex]")]
        .map((e) => [e.outerHTML.slice(0, 80), e.getAttribute("aria-label") || e.innerText || (e.labels && e.labels[0].innerText)])
        .filter(([, name]) => !name || !name.trim())"""  # noqa: E501
    )
    assert named == []
    assert seen.page.get_by_role("progressbar", name="Progress of one").count() == 1
    assert seen.page.get_by_role("region").count() >= 3
    reached = set()
    for _ in range(60):
        seen.page.keyboard.press("Tab")
        reached.add(seen.page.evaluate("document.activeElement.closest('figure')?.id || document.activeElement.id"))
    assert {"smoothing", "loss", "lr", "routers-heat"} <= reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_and_reads_in_both_schemes(browser: Any, folder: Path, scheme: str, width: int) -> None:
    size = {"width": width, "height": 900}
    seen = Seen(browser, f"file://{folder}/page.html", viewport=size, color_scheme=scheme)
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    # Of every text the contrast with what lies behind it: WCAG 2.2, 1.4.3.
    poor = seen.page.evaluate(
        """() => {
          const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c; } };
          return [...document.querySelectorAll("body *")].filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && e.offsetParent)
            .map((e) => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))]; return [e.outerHTML.slice(0, 60), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]; })
            .filter(([, contrast]) => contrast < 4.5);
        }"""  # noqa: E501
    )
    assert poor == []
    drawn = seen.page.evaluate("drawn.get('loss').chart.ctx.getImageData(0, 0, 400, 200).data.some((v) => v > 0)")
    assert drawn
    seen.fine()


def test_it_prints_light_without_its_controls(browser: Any, folder: Path) -> None:
    seen = Seen(browser, f"file://{folder}/page.html", color_scheme="dark")
    dark = seen.page.evaluate("color('--card')")
    seen.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert seen.page.evaluate("color('--card')") == "#ffffff" != dark
    seen.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert seen.page.evaluate("color('--card')") == dark
    seen.page.emulate_media(media="print")
    assert not seen.page.get_by_label("Smoothing").is_visible()
    assert not seen.page.get_by_role("button", name="CSV of Training loss").is_visible()
    lines = seen.chart("loss").locator(".line")
    assert lines.nth(0).is_visible()  # what the colours mean
    lines.nth(1).evaluate("(e) => e.click()")
    assert not lines.nth(1).is_visible()  # a line that is switched off
    assert seen.page.locator("#verdict").is_visible()
    assert seen.page.pdf().startswith(b"%PDF")
    seen.fine()


def test_it_lives_while_the_run_goes_on(browser: Any, tmp_path: Path) -> None:
    save_run(tmp_path / "run", steps=5)
    addresses: list[str] = []
    watcher = Watcher(open_runs([tmp_path / "run"]))
    threading.Thread(target=serve, args=(watcher, None, addresses.append), daemon=True).start()
    while not addresses:
        time.sleep(0.02)
    seen = Seen(browser, addresses[0])
    seen.page.locator("#loss output", has_text="at 5").wait_for()
    seen.page.get_by_role("button", name="Logarithmic scale: Training loss").click()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(6)) + "\n")
    seen.page.locator("#loss output", has_text=f"{row(6)['loss']:.5g} at 6").wait_for()
    pressed = seen.page.get_by_role("button", name="Logarithmic scale: Training loss").get_attribute("aria-pressed")
    seen.page.get_by_label("Layer whose experts are shown").select_option("layer 2")
    seen.chart("grad_norm").locator(".line").click()
    plot, values = seen.chart("loss").locator(".plot"), seen.chart("loss").locator("output")
    assert values.get_attribute("aria-live") == "off"  # news are not read aloud unasked
    plot.focus()
    assert values.get_attribute("aria-live") == "polite"
    seen.page.keyboard.press("ArrowRight")
    seen.page.keyboard.press("ArrowRight")
    assert "step 2" in values.inner_text()
    summary = seen.page.locator("#more summary").first
    seen.page.evaluate("document.querySelector('#more summary').same = true")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(7) | {"dead_experts": [[], [6], []]}) + "\n")
    seen.page.locator("#lr output", has_text="at 7").wait_for()
    assert "step 2" in values.inner_text()  # what is being read stays
    assert "layer 2, run" in seen.chart("routers-load").locator("h3").inner_text()
    assert seen.chart("grad_norm").locator(".line").get_attribute("aria-pressed") == "false"
    seen.page.get_by_label("Layer whose experts are shown").select_option("worst layer now")
    worst = max(range(3), key=lambda layer: row(7)["mri"][layer])
    assert f"layer {worst + 1}, run" in seen.chart("routers-load").locator("h3").inner_text()
    assert summary.evaluate("(e) => e.same") is True
    assert not seen.page.locator("#runs").is_visible()  # a single run needs no switch
    assert pressed == "true"  # what was set stays
    assert {url.rpartition("?")[0] or url for url in seen.requests if not url.startswith("data:")} <= {
        addresses[0], f"{addresses[0]}runs.json"
    }  # fmt: skip
    seen.fine()


@pytest.mark.slow
def test_the_scores_of_a_real_evaluation_are_found_and_shown(browser: Any, tmp_path: Path, jsonl: Path) -> None:
    tiny.save_mixtral(tmp_path / "moe")
    train = ("--train", f"new={jsonl}", "--seq-len", 16, "--global-batch-size", 4, "--max-steps", 4, "--lr", 1e-3)
    out = tmp_path / "runs" / "code"
    code, _, err = tiny.in_process("cpt", tmp_path / "moe", out, *train, "--save-every", 2)
    assert code == 0, err
    code, _, err = tiny.in_process(
        "eval", out / "checkpoints" / "step-000002", out, tmp_path / "moe", "--text", f"new={jsonl}", "--limit", 4,
        "--out", tmp_path / "runs" / "eval", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "runs" / "eval" / "results.json").read_text())["moetool"]
    scored = {Path(found["models"][name]).name: tasks["new"] for name, tasks in found["results"].items()}
    code, _, err = tiny.in_process("watch", out, "--html", tmp_path / "page.html")
    assert code == 0, err
    seen = Seen(browser, f"file://{tmp_path}/page.html")
    title = seen.chart("score-0").locator("h3").inner_text()
    assert title.startswith("new: ")
    metric = next(key for key in scored["code"] if key.removesuffix(",none") == title.removeprefix("new: "))
    rows = [[run, step, float(value)] for run, step, value in seen.csv("score-0")[1:]]
    assert rows == [
        ["code", "2", scored["step-000002"][metric]["value"]],
        ["code", "4", scored["code"][metric]["value"]],
    ]
    last = scored["code"][metric]
    read = seen.chart("score-0").locator("output").inner_text()
    assert f"code {last['value']:.5g}"[:8] in read
    assert "±" in read
    seen.fine()
