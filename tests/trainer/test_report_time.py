"""The report's part about time says what a run's journal and log say, however the run ended."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from trainer import report_time
from trainer.goodput import Stretch
from trainer.report import Page
from trainer.report_time import MOST_BINS, account, add_time, figure, rows

BEGAN = 1_800_000_000.0


class Writing:
    """A run's files, written by a clock of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now, self.step = folder, BEGAN, 0
        folder.mkdir(parents=True)
        self.journal: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []

    def event(self, name: str, after_s: float = 0.0, **facts: Any) -> Writing:
        self.now += after_s
        self.journal.append({"time": self.now, "event": name, **facts})
        return self

    def steps(self, count: int, **spent: float) -> Writing:
        for _ in range(count):
            self.step += 1
            self.now += sum(spent.values())
            self.lines.append({"step": self.step, "time": self.now, "spent": spent})
        return self

    def write(self, torn: str = "") -> str:
        for name, objects in (("journal.jsonl", self.journal), ("metrics.jsonl", self.lines)):
            (self.folder / name).write_text("".join(json.dumps(one) + "\n" for one in objects) + torn)
        return str(self.folder)


def crashed(folder: Path) -> Writing:
    """10 s of start-up, 100 s of steps of which 20 are lost, 5 s until it is noticed, 15 until it goes on, 50 s."""
    run = Writing(folder).event("started", attempt=1, resume=None)
    run.event("running", 10.0).steps(10, step=8.0, data_wait=2.0)
    run.event("failed", 5.0, attempt=1, kind="died", error="WorkerDied: rank 1 died")
    run.event("started", 5.0, attempt=2, resume="step_00000008")
    run.step = 8
    run.event("running", 10.0).steps(5, step=8.0, data_wait=2.0)
    return run.event("finished", step=13)


def table(*folders: str) -> dict[str, list[str]]:
    return {name: cells for name, *cells in rows([account(folder) for folder in folders])}


def test_a_crash_costs_what_it_costs(tmp_path: Path) -> None:
    found = table(crashed(tmp_path / "run").write())
    assert found["time of the run"] == ["0:03:00"]
    assert found["in steps that count"] == ["0:01:44 (57.8%)"]  # 8 of the first 10, and 5: 8 s each
    assert found["goodput"] == ["57.8%"]
    assert found["lost work"] == ["0:00:16 (8.9%)"]
    assert found["data wait"] == ["0:00:30 (16.7%)"]
    assert found["startup"] == ["0:00:20 (11.1%)"]
    assert found["recovery"] == ["0:00:10 (5.6%)"]
    assert found["attempts"] == ["2"] and found["restarted: died"] == ["1"]
    assert not {"waiting", "evaluation", "restarted: hung", "out of memory"} & found.keys()


def test_runs_beside_one_another(tmp_path: Path) -> None:
    calm = Writing(tmp_path / "calm").event("started", attempt=1).event("running", 10.0).steps(9, step=10.0)
    calm.event("finished", step=9)
    found = table(crashed(tmp_path / "run").write(), calm.write())
    assert found["goodput"] == ["57.8%", "90.0%"]
    assert found["lost work"] == ["0:00:16 (8.9%)", "-"]
    page = Page("x")
    add_time(page, {"run": str(tmp_path / "run"), "calm": str(tmp_path / "calm")})
    text = "".join(page._parts)
    assert text.count("<svg") == 2 and "run: What the time went into" in text and "calm: What" in text


def test_a_run_that_is_on_is_accounted_for_up_to_now(tmp_path: Path) -> None:
    run = Writing(tmp_path / "run")
    run.now = time.time() - 100
    folder = run.event("started", attempt=1).write()
    assert account(folder).elapsed_s == 0  # nobody is at work: it ended there
    (tmp_path / "run" / "telemetry").mkdir()
    entry = tmp_path / "run" / "telemetry" / "driver-0.json"
    entry.touch()
    assert 100 <= account(folder).elapsed_s < 200
    os.utime(entry, (time.time() - 1000, time.time() - 1000))  # a driver that was killed
    assert account(folder).elapsed_s == 0


@pytest.mark.parametrize("torn", ["", '{"time": 18', "\x00\n", "[]\n", '"text"\n'])
def test_torn_lines_change_nothing(tmp_path: Path, torn: str) -> None:
    assert table(crashed(tmp_path / "run").write(torn))["goodput"] == ["57.8%"]


def test_a_run_that_never_began_and_one_of_an_older_version(tmp_path: Path) -> None:
    page = Page("x")
    empty = Writing(tmp_path / "empty")
    add_time(page, {"empty": empty.write()})
    assert page._parts == []
    old = Writing(tmp_path / "old").event("started", attempt=1)
    old.lines = [{"step": 1, "loss": 0.5}]
    add_time(page, {"old": old.event("finished", 60.0, step=1).write()})
    text = "".join(page._parts)
    assert "does not say what its time went into" in text and "<svg" not in text


def marks(svg: str) -> set[str]:
    return set(re.findall(r">([a-z ]+ \(\d+\))</text>", svg))


def test_the_figure_has_all_that_happened(tmp_path: Path) -> None:
    run = crashed(tmp_path / "run").event("stopped", 1.0, reason="SIGINT").event("preempted").event("resizing")
    run.event("rolled_back").event("step_skipped").event("step_skipped").event("checkpoint_failed")
    svg = figure(account(run.write()).stretches, run.journal)
    assert marks(svg) == {
        "attempt begins (2)", "failed (1)", "stopped (1)", "preempted (1)", "resized (1)", "rolled back (1)",
        "step skipped (2)", "checkpoint failed (1)",
    }  # fmt: skip
    for text in ("steps", "data wait", "lost work", "startup", "recovery", "share of the time (%)"):
        assert f">{text}</text>" in svg
    assert ">time of the run (minutes)</text>" in svg


def test_pauses_are_left_out() -> None:
    day = 86_400.0
    pieces = [Stretch(begin=0, end=day, what="steps"), Stretch(begin=30 * day, end=31 * day, what="steps")]
    clock = report_time._Clock(pieces)
    assert clock.total == 2 * day
    assert [clock.at(when * day) for when in (-1, 0.5, 1, 20, 30.5, 40)] == [0, 0.5 * day, day, day, 1.5 * day, 2 * day]


def test_shares_of_every_bin_are_those_of_its_time() -> None:
    pieces = [
        Stretch(begin=float(number), end=number + 1.0, what="steps" if number % 4 else "data_wait")
        for number in range(10 * MOST_BINS)
    ]
    edges, shares = report_time._shares(pieces, report_time._Clock(pieces))
    assert len(edges) == MOST_BINS + 1 and edges[-1] == pytest.approx(10 * MOST_BINS)
    assert shares.keys() == {"steps", "data_wait"}
    for steps, waits in zip(shares["steps"], shares["data_wait"], strict=True):
        assert steps + waits == pytest.approx(100) and waits in (pytest.approx(20), pytest.approx(30))
    one = [Stretch(begin=5.0, end=6.0, what="startup")]
    assert report_time._shares(one, report_time._Clock(one))[1]["startup"] == pytest.approx([100] * MOST_BINS)


def test_a_long_run_s_figure_is_small_and_always_the_same(tmp_path: Path) -> None:
    run = Writing(tmp_path / "run").event("started", attempt=1)
    for number in range(100):
        run.steps(1000, step=20.0, data_wait=1.0 + number % 3).event("step_skipped", step=run.step)
    stretches = account(run.write()).stretches
    assert len(stretches) >= 100_000
    svg = figure(stretches, run.journal)
    assert len(svg) < 200_000 and svg == figure(stretches, run.journal)
    assert "(100)" in svg and ">time of the run (days)</text>" in svg
