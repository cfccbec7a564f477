"""`fathom quickstart` at a hundredth of its size: interrupted, continued, and asked for again."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.end_to_end.cli import Done, Running, events, fathom, gone, refuse, succeed

pytestmark = pytest.mark.timeout(1800)  # the commands have a limit of their own

ARGUMENTS = ("quickstart", "--out", "out", "--scale", "0.01")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Done]]:
    """A quickstart that Ctrl-C interrupted in its second training, and the second call, which finished it."""
    folder = tmp_path_factory.mktemp("quickstart")
    running = Running(*ARGUMENTS, cwd=folder)
    running.until(lambda: events(folder / "out" / "runs" / "teacher"), "the teacher's first entry in its journal")
    below = running.descendants()
    running.signal(signal.SIGINT)
    done = running.wait()
    assert done.status == 130 and "the same command goes on" in done.err, done.err
    assert "Traceback" not in done.err and gone(below) == []
    return folder, succeed(*ARGUMENTS, cwd=folder)


def test_an_interrupted_quickstart_goes_on_where_it_stopped(finished: tuple[Path, Done]) -> None:
    folder, _ = finished
    runs = folder / "out" / "runs"
    for name in ("encoder", "student"):
        assert [event for event in events(runs / name) if event != "checkpoint"] == ["started", "finished"]
    teacher = [event for event in events(runs / "teacher") if event != "checkpoint"]
    assert teacher == ["started", "stopped", "started", "finished"]


def test_it_ends_with_a_table_and_what_it_shows(finished: tuple[Path, Done]) -> None:
    folder, done = finished
    lines = done.out.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("row"))
    assert re.split(r"  +", lines[header])[1:3] == ["AbsRel", "delta1"]
    names = ["best constant", "teacher", "student"]
    assert [line.split("  ")[0] for line in lines[header + 1 : header + 4]] == names
    rows = json.loads((folder / "out" / "results.json").read_text())["rows"]
    for line, name in zip(lines[header + 2 : header + 4], names[1:], strict=True):
        wide = rows[name]["wide"]
        assert f"{wide['abs_rel']:.4f}" in line and f"{wide['delta1']:.4f}" in line
    assert "report.html" in lines[-1]


class Resources(HTMLParser):
    """What a page loads, and the words in it."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_report_is_one_file_with_curves_and_the_sheet(finished: tuple[Path, Done]) -> None:
    page = (finished[0] / "out" / "report.html").read_text()
    resources = Resources()
    resources.feed(page)
    assert resources.sources and all(source.startswith(("data:", "#")) for source in resources.sources)
    assert re.findall(r"url\((?!#|data:)[^)]*\)|@import", page) == []
    assert any(source.startswith("data:image/png;base64,") for source in resources.sources)
    assert "best constant" in resources.words and "no evidence that unlabelled images help" in resources.words


def test_a_second_call_does_nothing_again(finished: tuple[Path, Done]) -> None:
    folder, done = finished
    kept = [path for path in (folder / "out").rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in kept if path.suffix in (".tar", ".safetensors", ".jsonl")}
    again = succeed(*ARGUMENTS, cwd=folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.out.splitlines()[:4] == done.out.splitlines()[:4]
    for stage in ("scenes:", "steps", "shards", "images/s"):
        assert stage not in again.err


def test_another_quickstart_in_the_same_folder_is_refused(finished: tuple[Path, Done]) -> None:
    folder, _ = finished
    refuse(*ARGUMENTS[:-1], "0.02", cwd=folder, words=("sizes", "0.01", "another --out"))
    refuse(*ARGUMENTS, "--seed", "5", cwd=folder, words=("quickstart.seed: is 5, but the", "another --out"))
    assert fathom(*ARGUMENTS, cwd=folder).status == 0
