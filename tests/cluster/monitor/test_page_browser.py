"""The live page in Chromium: everything is there and can be read, nothing comes from elsewhere, and it keeps going."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser
from playwright.sync_api import Page as Tab

from cluster.monitor.boards import BOARDS
from cluster.monitor.page import Page
from tests.chromium import TEXTS, chromium, overlapping
from tests.cluster.monitor.synthetic import LABELLING, NODES, ODD, RUNS, Prometheus, World

PATIENCE_S = 60.0
HEIGHT = 900
SMALLEST_PX = 11.0

DRAWN = """() => {
  const panels = [...document.querySelectorAll("article")];
  return panels.length > 0 && panels.every((panel) => panel.dataset.drawn) && document.fonts.status === "loaded";
}"""
PANELS = """() => [...document.querySelectorAll("article")].map((panel) => ({
  key: panel.dataset.panel, drawn: panel.dataset.drawn, title: panel.querySelector("h3").innerText,
  ticks: [...panel.querySelectorAll("svg text")].map((tick) => [tick.getAttribute("text-anchor"), tick.textContent]),
  curves: [...panel.querySelectorAll(".plot path")].filter((path) => path.getAttribute("d").length > 8).length,
}))"""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as served:
        yield served


@pytest.fixture(scope="module")
def page(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page on a Prometheus that has scraped everything for some seconds."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    with (
        Prometheus(world, tmp_path_factory.mktemp("prometheus")) as prometheus,
        Page(f"http://{prometheus.address}", interval_s=1.0) as served,
    ):
        prometheus.until(f"count(count_over_time(up[1m]) >= 6) == {len(world.processes) + 1}")
        prometheus.until('ALERTS{alertstate="firing",severity="critical"}')
        yield served.address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


Open = Callable[..., Tab]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Opens an address, `width` px wide. At the end no tab may have complained or asked anybody else."""
    complaints: list[str] = []
    with contextlib.ExitStack() as stack:

        def made(
            address: str, choice: str = "", *, width: int = 1280, errors: bool = False, clock: bool = False,
            **options: Any,
        ) -> Tab:  # fmt: skip
            context = browser.new_context(
                viewport={"width": width, "height": HEIGHT}, timezone_id="Europe/Berlin", **options
            )
            stack.callback(context.close)
            tab = context.new_page()
            own = f"http://{address}/"
            tab.on("request", lambda request: request.url.startswith((own, "data:")) or complaints.append(request.url))
            if not errors:
                tab.on("console", lambda said: said.type == "error" and complaints.append(said.text))
            tab.on("pageerror", lambda error: complaints.append(str(error)))
            if clock:
                tab.clock.install()
            tab.goto(f"{own}#{choice}")
            return tab

        yield made
    assert complaints == []


def until(condition: Callable[[], Any], tab: Tab, what: str) -> Any:
    ends = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < ends, f"no {what} within {PATIENCE_S:.0f} s: {tab.inner_text('body')[:2000]}"
        tab.wait_for_timeout(50)
    return value


def drawn(tab: Tab) -> Tab:
    until(lambda: tab.evaluate(DRAWN), tab, "panels")
    return tab


UNITS = {
    "seconds": {"µs", "ms", "s", "min", "h", "d"}, "ratio": {"%"}, "bytes": {"B", "KiB", "MiB", "GiB", "TiB"},
    "bytes/s": {"B/s", "KiB/s", "MiB/s", "GiB/s"},
}  # fmt: skip


@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("board", BOARDS)
def test_everything_is_there_and_can_be_read(page: str, visit: Open, board: str, width: int, tmp_path: Path) -> None:
    tab = drawn(visit(page, f"board={board}&range=15m", width=width))
    tab.screenshot(path=tmp_path / f"{board}-{width}.png", full_page=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    texts = tab.evaluate(TEXTS)
    assert overlapping(texts) == []
    assert [text["node"] for text in texts if text["size"] < SMALLEST_PX or text["right"] > width] == []
    panels = {panel["key"]: panel for panel in tab.evaluate(PANELS)}
    assert list(panels) == list(BOARDS[board].panels())
    assert tab.locator("h2").all_inner_texts() == [row.question for row in BOARDS[board].rows]
    for key, panel in BOARDS[board].panels().items():
        found = panels[key]
        assert found["title"].startswith(panel.title) and found["drawn"] == panel.kind, found
        if panel.kind == "stat":
            continue
        values = [text for anchor, text in found["ticks"] if anchor == "end"]
        assert found["curves"] > 0 and len(values) >= 2, found
        assert [text for anchor, text in found["ticks"] if anchor == "middle"], found
        if panel.unit in UNITS:
            assert {text.partition("\u00a0")[2] for text in values} & UNITS[panel.unit], found
        elif panel.unit:
            assert found["title"].endswith({"1/s": "per second"}.get(panel.unit, panel.unit))


def test_alerts_say_what_and_where_to_read_on(page: str, visit: Open) -> None:
    tab = drawn(visit(page))
    first = tab.locator("#alerts li").first
    assert first.locator("b").inner_text() == "critical"
    assert "see docs/runbook.md#fathom" in first.inner_text()
    tab.locator("#alerts summary").first.click()
    assert any("given up" in text for text in tab.locator("#alerts li").all_inner_texts())


def test_a_choice_is_kept_in_the_address(page: str, visit: Open) -> None:
    tab = drawn(visit(page))
    assert tab.locator("#run option").all_inner_texts() == ["all runs", *sorted(RUNS)]
    assert tab.locator("#node option").all_inner_texts() == ["all nodes", *NODES]
    tab.select_option("#run", ODD)
    tab.select_option("#node", NODES[0])
    tab.select_option("#range", "15m")
    state = tab.locator("[data-panel='0-0'] .values")
    until(lambda: state.inner_text() == "RUNNING", tab, "state without the run's name")
    waits = tab.locator("[data-panel='3-1'] .legend .name")
    until(lambda: waits.all_inner_texts() == ["rank 0"], tab, "the one rank of the node")
    again = drawn(visit(page, tab.url.partition("#")[2]))
    assert again.input_value("#run") == ODD
    assert (again.input_value("#node"), again.input_value("#range")) == (NODES[0], "15m")
    assert again.locator("[data-panel='3-1'] .legend .name").all_inner_texts() == ["rank 0"]
    again.locator("nav a", has_text="Data").click()
    until(lambda: again.title() == BOARDS["data"].title, again, "other board")
    assert again.input_value("#run") == ODD and "board=data" in again.url
    again.go_back()
    until(lambda: again.title() == BOARDS["training"].title, again, "board before")


def test_names_are_text(page: str, visit: Open) -> None:
    tab = drawn(visit(page, "run=%3Cimg src=x onerror=alert(1)%3E"))
    assert tab.locator("#run option").last.inner_text() == "<img src=x onerror=alert(1)> (not in this time)"
    assert tab.locator("img, i").count() == 0
    other = drawn(visit(page))
    assert other.locator("i").count() == 0
    assert other.locator(".legend .name", has_text=ODD).count() > 0
    assert f"{ODD} RUNNING" in other.locator("[data-panel='0-0'] li").all_inner_texts()


def test_where_there_is_nothing_it_says_why(page: str, visit: Open) -> None:
    tab = drawn(visit(page, "run=nobody"))
    for key, panel in BOARDS["training"].panels().items():
        words = f"nothing {panel.empty}" if panel.empty else "no data yet"
        assert tab.locator(f"[data-panel='{key}'] .body").inner_text() == words


def test_stacks_of_several_runs_are_apart(page: str, visit: Open) -> None:
    tab = drawn(visit(page, "range=15m"))
    place = tab.locator("[data-panel='3-0']")
    assert place.locator("h4").all_inner_texts() == sorted(RUNS)
    assert place.locator(".plot").count() == 2
    alone = drawn(visit(page, f"board=labelling&run={LABELLING}"))
    assert alone.locator("[data-panel='1-2'] h4").count() == 0


def test_the_crosshair_and_the_help(page: str, visit: Open) -> None:
    tab = drawn(visit(page, "range=15m"))
    chart, said = tab.locator("[data-panel='2-1'] .plot > svg"), tab.locator("[data-panel='2-1'] .said")
    size = chart.bounding_box()
    assert size is not None and said.is_hidden()
    chart.hover(position={"x": size["width"] - 5, "y": 60})
    names = tab.locator("[data-panel='2-1'] .legend .name").all_inner_texts()
    assert said.locator(".name").all_inner_texts() == names and len(names) == 6
    assert all(text.endswith("s") for text in said.locator("b").all_inner_texts())
    tab.mouse.move(0, 0)
    assert said.is_hidden()
    chart.focus()
    chart.press("ArrowLeft")
    last = said.locator("p").inner_text()
    chart.press("ArrowLeft")
    chart.press("ArrowLeft")
    assert said.is_visible() and said.locator("p").inner_text() != last
    chart.press("Escape")
    assert said.is_hidden()
    button = tab.locator("[data-panel='2-1'] button")
    button.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    assert tab.locator("[data-panel='2-1'] .help").inner_text() == BOARDS["training"].panels()["2-1"].help


def test_a_touch_shows_the_values(page: str, visit: Open) -> None:
    tab = drawn(visit(page, "range=15m", width=375, has_touch=True, color_scheme="dark"))
    chart, said = tab.locator("[data-panel='2-0'] .plot > svg"), tab.locator("[data-panel='2-0'] .said")
    chart.tap(position={"x": 300, "y": 60})
    assert said.is_visible() and said.locator("li").count() > 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= 375
    tab.locator("[data-panel='2-0'] h3").tap()
    assert said.is_hidden()


def test_it_goes_on_while_it_is_seen(page: str, visit: Open) -> None:
    """The same elements with the same colours; nothing is asked while the tab is hidden."""
    tab = drawn(visit(page, "range=15m", clock=True))
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    strokes = "() => [...document.querySelectorAll('.legend li')].map((li) => " \
        "[li.querySelector('.name').textContent, li.querySelector('.swatch > *').getAttribute('class')])"  # fmt: skip
    before = tab.evaluate(strokes)
    chart = tab.query_selector("[data-panel='1-0'] .plot > svg")
    status = tab.inner_text("#status")
    until(lambda: tab.inner_text("#status").startswith("as of "), tab, "end of the first look")
    tab.clock.fast_forward(6000)
    until(lambda: any("panel=1-0" in url for url in asked) and tab.inner_text("#status") != status, tab, "second look")
    assert tab.evaluate("(chart) => chart.isConnected", chart)
    assert tab.evaluate(strokes) == before
    hide = "(hidden) => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true }); " \
        "document.dispatchEvent(new Event('visibilitychange')); }"  # fmt: skip
    tab.evaluate(hide, True)
    asked.clear()
    tab.clock.fast_forward(60_000)
    tab.wait_for_timeout(500)
    assert asked == []
    tab.evaluate(hide, False)
    until(lambda: any("/api/panel" in url for url in asked), tab, "look when it is seen again")


def test_prometheus_goes_and_the_page_says_so(world: World, visit: Open, tmp_path: Path) -> None:
    with Prometheus(world, tmp_path) as prometheus, Page(f"http://{prometheus.address}", interval_s=1.0) as served:
        prometheus.until("count(count_over_time(up[1m]) >= 3) > 9")
        tab = drawn(visit(served.address, "range=15m", errors=True, clock=True))
        until(lambda: tab.inner_text("#status").startswith("as of "), tab, "end of the first look")
        prometheus.stop()
        tab.clock.fast_forward(6000)
        until(lambda: "does not answer" in tab.inner_text("#status"), tab, "word of it")
        line = tab.inner_text("#status")
        assert line.startswith("Prometheus does not answer: Connection refused (since ") and "is from" in line
        assert tab.locator("[data-panel='2-0'] .plot path").count() > 0
    tab.clock.fast_forward(6000)
    until(lambda: tab.inner_text("#status").startswith("The monitor does not answer"), tab, "word of the page's end")


def test_numbers_as_text(page: str, visit: Open) -> None:
    tab = visit(page)
    cases = [
        [0, "", "0"], [3, "", "3"], [12345, "", "12,345"], [2.5e6, "", "2.5 M"], [0.12345, "", "0.123"],
        [2.81e-6, "", "2.81e-6"], [0, "seconds", "0 s"], [0.002, "seconds", "2 ms"], [0.34567, "seconds", "346 ms"],
        [59.95, "seconds", "60 s"],
        [12.34, "seconds", "12.3 s"], [750, "seconds", "12 min 30 s"], [8000, "seconds", "2 h 13 min"],
        [273600, "seconds", "3 d 4 h"], [-300, "seconds", "-5 min"], [1536, "bytes", "1.5 KiB"],
        [4.6e6, "bytes/s", "4.39 MiB/s"], [0.9731, "ratio", "97.3 %"], [0, "ratio", "0 %"],
        [50.04, "images/s", "50 images/s"], [0.2, "1/s", "0.2 /s"], [None, "ratio", "–"],
    ]  # fmt: skip
    format_all = "(cases) => import('/units.js').then((u) => cases.map(([value, unit]) => u.format(value, unit)))"
    said = tab.evaluate(format_all, cases)
    assert [text.replace("\u00a0", " ") for text in said] == [text for _, _, text in cases]


AXES = [
    ({"low": 0, "high": 0.94, "fixedLow": True}, "seconds", [0, 1], ["0", "0.2 s", "0.4 s", "0.6 s", "0.8 s", "1.0 s"]),
    ({"low": 0, "high": 1, "fixedLow": True, "fixedHigh": True}, "ratio", [0, 1],
     ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]),
    ({"low": 0, "high": 1, "fixedLow": True, "whole": True}, "", [0, 1], ["0", "1"]),
    ({"low": -0.3, "high": 0.7}, "", [-0.4, 0.8], ["-0.4", "-0.2", "0", "0.2", "0.4", "0.6", "0.8"]),
    ({"low": 0, "high": 3 * 2**30, "fixedLow": True}, "bytes", [0, 3 * 2**30], ["0", "1 GiB", "2 GiB", "3 GiB"]),
]  # fmt: skip


@pytest.mark.parametrize(("ends", "unit", "span", "texts"), AXES)
def test_value_axes(page: str, visit: Open, ends: Any, unit: str, span: Any, texts: list[str]) -> None:
    call = f"() => import('/units.js').then((u) => u.valueAxis({json.dumps(ends)}, {json.dumps(unit)}, 5))"
    axis = visit(page).evaluate(call)
    assert [axis["low"], axis["high"]] == pytest.approx(span)
    assert [tick["text"].replace("\u00a0", " ") for tick in axis["ticks"]] == texts


def test_time_axes_are_local_also_where_the_clocks_change(page: str, visit: Open) -> None:
    """In Berlin 2026-03-29 has no 02:30; its midnight is at 1774738800."""
    tab = visit(page)

    def texts(start: float, seconds: float, apart: float) -> list[str]:
        call = "([start, end, apart]) => import('/units.js').then((u) => u.timeAxis(start, end, apart))"
        return [tick["text"] for tick in tab.evaluate(call, [start, start + seconds, apart])]

    midnight = 1774738800
    assert texts(midnight + 60, 900, 250) == ["00:05", "00:10", "00:15"]
    assert texts(midnight - 3600, 8 * 3600, 7000) == ["29 Mar", "03:00", "06:00", "08:00"]
    assert texts(midnight - 86400, 3.5 * 86400, 80000) == ["28 Mar", "29 Mar", "30 Mar", "31 Mar"]
    assert len(texts(midnight, 30 * 86400, 6 * 86400)) in (4, 5)
    assert texts(midnight + 61, 20, 5) == ["00:01:05", "00:01:10", "00:01:15", "00:01:20"]
