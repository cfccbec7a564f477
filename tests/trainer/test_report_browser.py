"""The report in Chromium: it can be read on a desk and on a phone, and asks nobody for anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image
from playwright.sync_api import Browser

from tests.chromium import TEXTS, chromium, overlapping
from tests.launcher.test_verbs_report import JOURNAL, event_line, step_line
from tests.trainer.test_report_time import crashed
from trainer.report_run import write_report

SMALLEST_PX = {"page": 11.0, "figure": 9.0}
# Of each figure: its texts, and whether it can be moved sideways where it is too wide.
FIGURES = """() => [...document.querySelectorAll("figure svg")].map((svg) => ({
  texts: [...svg.querySelectorAll("text")].map((text) => text.textContent),
  smallest: Math.min(...[...svg.querySelectorAll("text")].map(
    (text) => parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a)),
  moves: getComputedStyle(svg.parentElement).overflowX === "auto",
}))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of one run, and one of two, with all that a report can hold."""
    folder = tmp_path_factory.mktemp("reports")
    for name in ("student-v2-vits-seed-1", "student-v2-vits-seed-2"):
        run = crashed(folder / name)
        run.journal += [{"time": run.now, **line} for line in JOURNAL]
        run.write()
        lines = [step_line(step) for step in range(10, 41, 10)] + [event_line(20), event_line(40)]
        with (folder / name / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps({**line, "step": line["step"] + 13}) + "\n" for line in lines)
        values = {"name": name, "steps": 40, "model": {"preset": "v2-vits"}, "data": {"input_size": 518}}
        (folder / name / "config.yaml").write_text(yaml.safe_dump(values | {"seed": int(name[-1])}))
        (folder / name / "previews").mkdir()
        Image.new("RGB", (1200, 300), (40, 90, 160)).save(folder / name / "previews" / "step_00000040.png")
        means = {"disparity": {"abs_rel": 0.0712, "delta1": 0.951, "rmse": 0.2, "log10": 0.03, "silog": 8.1}}
        datasets = [{"dataset": f"a set with a rather long name {n}", "images": 654, "means": means} for n in range(3)]
        (folder / name / "evaluation.json").write_text(json.dumps({"datasets": datasets}))
    runs = [str(path) for path in sorted(folder.iterdir())]
    one, two = folder / "one.html", folder / "two.html"
    write_report(runs[:1], str(one))
    write_report(runs, str(two))
    return {"one": one, "two": two}


@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("name", ["one", "two"])
def test_it_can_be_read(browser: Browser, pages: dict[str, Path], name: str, width: int, tmp_path: Path) -> None:
    asked: list[str] = []
    said: list[str] = []
    tab = browser.new_page(viewport={"width": width, "height": 900})
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda line: said.append(line.text))
    tab.goto(pages[name].as_uri())
    tab.screenshot(path=tmp_path / f"{name}-{width}.png", full_page=True)
    assert {url for url in asked if not url.startswith("data:")} == {pages[name].as_uri()} and said == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    texts = tab.evaluate(TEXTS)
    assert overlapping(texts) == []
    assert [text["node"] for text in texts if text["size"] < SMALLEST_PX["figure"]] == []
    figures = tab.evaluate(FIGURES)
    assert len(figures) >= 8
    for found in figures:
        assert found["smallest"] >= SMALLEST_PX["figure"] and found["moves"], found
        assert {"step"} & {*found["texts"]} or any(text.startswith("time of the run (") for text in found["texts"])
    tab.close()
